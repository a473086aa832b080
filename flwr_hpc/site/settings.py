"""A site's settings as one file, written by the driver and read by the ClientApp."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from omegaconf import OmegaConf

from flwr_hpc.clock import SystemClock
from flwr_hpc.config.facility import FacilityConfig, walltime_s
from flwr_hpc.config.schema import AllocationConfig, Config
from flwr_hpc.exchange.client import SiteExchange
from flwr_hpc.exchange.codec import make_codec
from flwr_hpc.exchange.store import make_store
from flwr_hpc.files import publish, read_json
from flwr_hpc.schedulers.base import JobSpec
from flwr_hpc.schedulers.registry import make_scheduler
from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.site import submission
from flwr_hpc.site.manager import AllocationManager
from flwr_hpc.spool import Spool


@dataclass(frozen=True)
class Launcher:
    """What the ClientApp works with."""

    facility: str
    site: AllocationManager
    exchange: SiteExchange
    steps: int


def site_file(run: RunDir, facility: str) -> Path:
    """Return where the settings of a facility's site lie."""
    return run.flower / f"site-{facility}.json"


def worker_spec(run: RunDir, config: Config, facility: str) -> dict[str, Any]:
    """Return what the worker of an allocation loads, see `flwr_hpc.train.worker`."""
    here = config.facilities[facility]
    return {
        "facility": facility,
        "facilities": list(config.facilities),
        "seed": config.seed,
        "rounds": config.rounds,
        "spool": str(run.site_root(config, facility)),
        "model": asdict(config.model),
        "data": asdict(config.data),
        "train": asdict(config.train),
        "idle_timeout_s": config.allocation.idle_timeout_s,
        "walltime_s": walltime_s(here.walltime),
        "peak_tflops": here.peak_tflops,
        "gpus_per_node": here.gpus_per_node,
        "internet": here.internet,
    }


def write_site(run: RunDir, config: Config, facility: str) -> Path:
    """Write the settings of a facility's site and return the file."""
    target = site_file(run, facility)
    body = {
        "run_key": run.key,
        "facility": facility,
        "root": str(run.site_root(config, facility)),
        "store": run.store_url(config),
        "codec": config.exchange.codec,
        "inline_below_mb": config.exchange.inline_below_mb,
        "config": asdict(config.facilities[facility]),
        "allocation": asdict(config.allocation),
        "spec": worker_spec(run, config, facility),
    }
    publish(target, json.dumps(body, indent=1))
    return target


def job_spec(run: RunDir, config: Config, facility: str, run_key: str) -> JobSpec:
    """Return the job of a facility's first allocation, as a dry run shows it."""
    spool = Spool(run.site_root(config, facility, run_key))
    return submission.job_spec(spool, run_key, facility, config.facilities[facility])


def load_launcher(path: str) -> Launcher:
    """Build the launcher from the file that `write_site` wrote.

    Parameters
    ----------
    path : str
        Percent-encoded: Flower's node config takes no quotation marks.

    Raises
    ------
    FileNotFoundError
        If the SuperNode was started without a valid ``site="FILE"`` in its node config.
    """
    body = read_json(Path(unquote(path))) if path else None
    if body is None:
        raise FileNotFoundError(
            f"no site file at '{path}'. Start the SuperNode with --node-config 'site=\"FILE\"'"
        )
    schema = OmegaConf.structured(FacilityConfig)
    facility = OmegaConf.to_object(OmegaConf.merge(schema, body["config"]))
    assert isinstance(facility, FacilityConfig)
    from flwr_hpc.site.forecast.forecaster import Forecaster  # numpy: not for a dry run

    spool, run_key, name = Spool(Path(body["root"])), str(body["run_key"]), str(body["facility"])
    scheduler, clock = make_scheduler(facility), SystemClock()
    site = AllocationManager(
        spool=spool,
        run_key=run_key,
        facility_name=name,
        facility=facility,
        allocation=AllocationConfig(**body["allocation"]),
        scheduler=scheduler,
        spec=body["spec"],
        clock=clock,
        forecast=Forecaster(
            name, submission.job_spec(spool, run_key, name, facility), scheduler, clock
        ),
    )
    return Launcher(
        facility=name,
        site=site,
        exchange=SiteExchange(
            make_store(str(body["store"])),
            make_codec(str(body["codec"])),
            float(body["inline_below_mb"]),
        ),
        steps=int(body["spec"]["train"]["steps"]),
    )
