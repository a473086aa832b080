"""The batch systems there are: the folders beside this file, and those of other packages.

A batch system is a package with two modules: ``rules``, whose ``RULES`` are a `Rules`, and
``adapter`` with ``make_scheduler(facility)``. A package of yours is found by an entry point of
the group ``flwr_hpc.schedulers``, e.g. ``lsf = "my_centre.lsf"``.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.config.facility_rules import check_facility as check_shape
from flwr_hpc.errors import UserError, closest
from flwr_hpc.schedulers.base import Scheduler
from flwr_hpc.schedulers.rules import Rules, check_fields

GROUP = "flwr_hpc.schedulers"


def names() -> list[str]:
    """Return what ``scheduler`` of a facility may be."""
    return sorted(_packages())


def rules_of(facility: FacilityConfig) -> Rules:
    """Return the rules of a facility's batch system; imports nothing heavy."""
    rules = import_module(f"{_package(facility.scheduler)}.rules").RULES
    assert isinstance(rules, Rules)
    return rules


def make_scheduler(facility: FacilityConfig) -> Scheduler:
    """Return the adapter to a facility's batch system."""
    adapter = import_module(f"{_package(facility.scheduler)}.adapter")
    scheduler: Scheduler = adapter.make_scheduler(facility)
    return scheduler


def check_facility(name: str, f: FacilityConfig) -> None:
    """Check a facility's fields, also against the rules of its batch system."""
    key = f"facilities.{name}"
    if f.scheduler not in (known := names()):
        raise UserError(
            f"{key}.scheduler={f.scheduler} is not known.{closest(f.scheduler, known)} "
            f"Valid: {', '.join(known)}."
        )
    check_shape(name, f)
    check_fields(key, f, rules_of(f))
    rules_of(f).check(key, f)


def check_facilities(facilities: Mapping[str, FacilityConfig]) -> None:
    """Check every facility of a run."""
    for name, facility in facilities.items():
        check_facility(name, facility)


def _package(name: str) -> str:
    packages = _packages()
    if name not in packages:
        raise UserError(f"there is no batch system '{name}'. Valid: {', '.join(sorted(packages))}.")
    return packages[name]


def _packages() -> dict[str, str]:
    folder = str(Path(__file__).parent)
    own = {m.name: f"{__package__}.{m.name}" for m in pkgutil.iter_modules([folder]) if m.ispkg}
    return {point.name: point.value for point in entry_points(group=GROUP)} | own
