"""From settings with several values to the points of a sweep, by Hydra's own rules."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from flwr_hpc.config.folder import conf_dir
from flwr_hpc.config.overrides import read
from flwr_hpc.errors import UserError

FIXED = {
    "run_dir": "every point has a folder of its own; name that of the sweep: sweep.dir=FOLDER",
    "resume": "a sweep goes on with: resume=SWEEP_DIR alone",
    "dry_run": "it holds for the whole sweep",
}
EXAMPLE = "python -m flwr_hpc.run -m train.lr=1e-4,3e-4 train.batch_size=8,16"


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every point: the product of all values, in the order given.

    Comma lists, ``choice(...)``, ``range(...)`` and ``glob(...)`` of configuration groups are
    those of Hydra's BasicSweeper.
    """
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        parsed = [_parse(parser, o) for o in overrides]
        swept = [p for p in parsed if p is not None and p.is_sweep_override()]
        _check(overrides, swept)
        try:
            ((*products,),) = BasicSweeper.split_arguments(swept, None)
        except HydraException as exc:
            raise UserError(f"{exc}. Example: {EXAMPLE}") from None
    fixed = [o for o, p in zip(overrides, parsed, strict=True) if p not in swept]
    points = [[*fixed, *values] for values in products]
    return [point for i, point in enumerate(points) if point not in points[:i]]


def varied(points: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """Return of each point the settings that are not the same in all of them, by key."""
    settings = [dict(_setting(o) for o in point) for point in points]
    keys = list(dict.fromkeys(key for one in settings for key in one))
    tell = [key for key in keys if len({one.get(key) for one in settings}) > 1]
    return [{key: one.get(key, "") for key in tell} for one in settings]


def short(keys: Sequence[str]) -> list[str]:
    """Return the last part of every key, and the whole key where that is not unique."""
    last = [key.rpartition(".")[2] for key in keys]
    return [key if last.count(name) > 1 else name for key, name in zip(keys, last, strict=True)]


def _parse(parser: OverridesParser, override: str) -> Override | None:
    """Parse an override; None for one that Hydra cannot read, such as a path with spaces."""
    try:
        parsed: Override = parser.parse_overrides([override])[0]  # alone it knows no groups
    except HydraException:
        read(override)
        return None
    return parsed


def _check(overrides: Sequence[str], swept: Sequence[Override]) -> None:
    if not swept:
        raise UserError(
            "-m runs every combination of values, but no setting has several. Give some, e.g. "
            f"{EXAMPLE}, or leave -m out for one run"
        )
    for parsed in swept:
        key, text = parsed.key_or_group, str(parsed.input_line)
        if key in FIXED or key.startswith("serve."):
            raise UserError(f"'{text}' cannot be swept: {FIXED.get(key, 'a sweep has no server')}")
        if sum(_setting(o)[0] == key for o in overrides) > 1:
            raise UserError(f"'{text}': {key} is given twice; give all its values at once")
    keys = [_setting(o)[0] for o in overrides]
    if "run_dir" in keys:
        raise UserError(f"run_dir is not for a sweep: {FIXED['run_dir']}")


def _setting(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+"), value
