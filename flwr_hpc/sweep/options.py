"""What a sweep itself is told, ``sweep.*``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flwr_hpc.config.overrides import read, split_resume
from flwr_hpc.config.schema import explain
from flwr_hpc.errors import UserError, positive
from flwr_hpc.sweep.folder import SweepDir

PREFIX = "sweep."


@dataclass
class SweepOptions:
    """How the points of a sweep are run."""

    # Folder of the sweep; one that is there goes on. Default: sweeps/DATE_TIME.
    dir: str | None = None
    parallel: int = 1  # Points that run at the same time, each in jobs of its own
    # Ranks of a node that a point takes: points share jobs, as many as have room. Null: each has
    # jobs of its own.
    ranks_per_point: int | None = None
    max_points: int = 100  # Ask before more are run
    retry_failed: bool = False  # Go on with the points that have failed before, too


def is_sweep(overrides: Sequence[str]) -> bool:
    """Whether ``resume=`` names the folder of a sweep; else `sweep.*` has no meaning."""
    folder, _ = split_resume(overrides)
    if folder and SweepDir.at(folder).exists:
        return True
    if own := [o for o in overrides if o.startswith(PREFIX)]:
        raise UserError(f"'{own[0]}' is for a sweep. Add -m: python -m flwr_hpc.run -m ...")
    return False


def split_options(overrides: Sequence[str]) -> tuple[SweepOptions, list[str]]:
    """Return the sweep's own options, and the other overrides."""
    own = [o for o in overrides if o.startswith(PREFIX)]
    values = {p.key_or_group.removeprefix(PREFIX): p.value() for p in map(read, own)}
    try:
        options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SweepOptions), values))
    except OmegaConfBaseException as exc:
        raise UserError(f"{PREFIX}*: {explain(exc)}") from None
    assert isinstance(options, SweepOptions)
    positive("sweep.parallel", options.parallel)
    positive("sweep.max_points", options.max_points)
    if options.ranks_per_point is not None:
        positive("sweep.ranks_per_point", options.ranks_per_point)
        if options.parallel != 1:
            raise UserError(
                f"sweep.parallel={options.parallel} does not go with sweep.ranks_per_point: a job "
                "runs as many points at a time as it has room for. For more, give it more nodes"
            )
    return options, [o for o in overrides if o not in own]
