"""What the ClientApp of a site works with, built from the site's settings."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from flwr_hpc.clock import SystemClock
from flwr_hpc.exchange.client import SiteExchange
from flwr_hpc.exchange.codec import make_codec, make_downlink
from flwr_hpc.exchange.store import make_store
from flwr_hpc.files import is_disk_trouble, private_folder
from flwr_hpc.schedulers.base import JobSpec
from flwr_hpc.schedulers.registry import make_scheduler
from flwr_hpc.site import submission
from flwr_hpc.site.manager import AllocationManager
from flwr_hpc.site.settings import SiteSettings
from flwr_hpc.spool import Spool

# In the environment of a session's processes, to find them all at its end. Jobs outlive it.
SESSION_MARK = "FLWR_HPC_SESSION"


@dataclass(frozen=True)
class Launcher:
    """One facility's launcher."""

    settings: SiteSettings
    site: AllocationManager
    exchange: SiteExchange


def make_launcher(settings: SiteSettings) -> Launcher:
    """Build the launcher of a site."""
    return Launcher(
        settings,
        make_site(settings),
        _exchange(settings),
    )


def _exchange(settings: SiteSettings) -> SiteExchange:
    """Build a site's half of the exchange."""
    exchange = settings.exchange
    codec = make_codec(exchange.codec)
    remote = {"credential": Path(settings.credential or ""), "stall_s": exchange.stall_s}
    store = make_store(settings.store, **(remote if settings.credential else {}))
    downlink = make_downlink(exchange.downlink, codec)
    return SiteExchange(store, codec, exchange.inline_below_mb, downlink)


def make_site(settings: SiteSettings) -> AllocationManager:
    """Build a site's side of a run."""
    from flwr_hpc.site.forecast.forecaster import Forecaster  # numpy: not for a dry run

    scheduler, clock = make_scheduler(settings.facility), SystemClock()
    return AllocationManager(
        spool=Spool(_root(settings)),
        run_key=settings.run_key,
        facility_name=settings.name,
        facility=settings.facility,
        allocation=settings.allocation,
        scheduler=scheduler,
        settings=asdict(settings.worker),
        clock=clock,
        limits=settings.limits,
        forecast=Forecaster(settings.name, job_spec(settings), scheduler, clock),
    )


def _root(settings: SiteSettings) -> Path:
    """Return the site's folder, made where it can be: what is done in it says if it cannot."""
    root = Path(settings.root)
    try:
        return private_folder(root)
    except OSError as exc:
        if not is_disk_trouble(exc):
            raise
        return root


def job_spec(settings: SiteSettings) -> JobSpec:
    """Return the job of a site's first allocation, as a dry run shows it."""
    spool = Spool(Path(settings.root))
    return submission.job_spec(spool, settings.run_key, settings.name, settings.facility)
