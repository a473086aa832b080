"""What a run's configuration means for the site of each facility."""

from __future__ import annotations

from pathlib import Path

from flwr_hpc.config.facility import walltime_s
from flwr_hpc.config.schema import Config
from flwr_hpc.exchange.codec import stages
from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.site.launcher import make_site
from flwr_hpc.site.manager import AllocationManager
from flwr_hpc.site.settings import SiteSettings
from flwr_hpc.worker.settings import WorkerSettings


def site_settings(run: RunDir, config: Config, facility: str, run_key: str) -> SiteSettings:
    """Return the settings of a facility's site."""
    return SiteSettings(
        run_key=run_key,
        name=facility,
        root=str(run.site_root(config, facility, run_key)),
        store=run.store_url(config, run_key),
        codec=stages(config.exchange.codec),
        feedback=config.exchange.feedback,
        inline_below_mb=config.exchange.inline_below_mb,
        facility=config.facilities[facility],
        allocation=config.allocation,
        worker=_worker_settings(config, facility),
    )


def write_site(run: RunDir, config: Config, facility: str) -> Path:
    """Write the settings of a facility's site and return the file."""
    path = run.site_file(facility)
    site_settings(run, config, facility, run.key).write(path)
    return path


def open_sites(run: RunDir, config: Config) -> dict[str, AllocationManager]:
    """Return the sites that were set up, by facility."""
    files = {facility: run.site_file(facility) for facility in config.facilities}
    return {f: make_site(SiteSettings.read(file)) for f, file in files.items() if file.exists()}


def _worker_settings(config: Config, facility: str) -> WorkerSettings:
    here = config.facilities[facility]
    return WorkerSettings(
        facility=facility,
        facilities=list(config.facilities),
        seed=config.seed,
        rounds=config.rounds,
        model=config.model,
        data=config.data,
        train=config.train,
        idle_timeout_s=config.allocation.idle_timeout_s,
        progress_timeout_s=config.allocation.progress_timeout_s,
        walltime_s=walltime_s(here.walltime),
        peak_tflops=here.peak_tflops,
        gpus_per_node=here.gpus_per_node,
        internet=here.internet,
    )
