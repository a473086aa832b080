"""What a run's configuration means for the site of each facility."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flwr_hpc.config.facility import walltime_s
from flwr_hpc.config.schema import Config
from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.site.launcher import make_site
from flwr_hpc.site.manager import AllocationManager
from flwr_hpc.site.settings import SiteSettings
from flwr_hpc.worker.settings import WorkerSettings


@dataclass(frozen=True)
class Elsewhere:
    """The server of a site that has joined it."""

    store: str  # URL of the exchange
    credential: Path | None
    sites: Sequence[str]  # All that train


def site_settings(
    run: RunDir, config: Config, facility: str, run_key: str, server: Elsewhere | None = None
) -> SiteSettings:
    """Return the settings of a facility's site; `server` None: it is here."""
    return SiteSettings(
        run_key=run_key,
        name=facility,
        root=str(run.site_root(config, facility, run_key)),
        store=server.store if server else run.store_url(config, run_key),
        credential=str(server.credential) if server and server.credential else None,
        exchange=config.exchange,
        facility=config.facilities[facility],
        allocation=config.allocation,
        limits=config.site.limits,
        worker=_worker_settings(config, facility, server.sites if server else config.facilities),
    )


def write_site(run: RunDir, config: Config, facility: str, server: Elsewhere | None = None) -> Path:
    """Write the settings of a facility's site and return the file."""
    path = run.site_file(facility)
    site_settings(run, config, facility, run.key, server).write(path)
    return path


def open_sites(run: RunDir, config: Config) -> dict[str, AllocationManager]:
    """Return the sites that were set up, by facility."""
    files = {facility: run.site_file(facility) for facility in config.here}
    return {f: make_site(SiteSettings.read(file)) for f, file in files.items() if file.exists()}


def _worker_settings(config: Config, facility: str, sites: Iterable[str]) -> WorkerSettings:
    here = config.facilities[facility]
    return WorkerSettings(
        facility=facility,
        facilities=list(sites),
        seed=config.seed,
        rounds=config.rounds,
        model=config.model,
        data=config.data,
        train=config.train,
        codec=config.exchange.codec,
        feedback=config.exchange.feedback,
        idle_timeout_s=config.allocation.idle_timeout_s,
        progress_timeout_s=config.allocation.progress_timeout_s,
        walltime_s=walltime_s(here.walltime),
        peak_tflops=here.peak_tflops,
        gpus_per_node=here.gpus_per_node,
        internet=here.internet,
        lora_r=here.lora_r,
    )
