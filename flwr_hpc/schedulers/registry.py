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
from flwr_hpc.config.facility_shape import check_shape
from flwr_hpc.errors import one_of
from flwr_hpc.schedulers.base import Scheduler
from flwr_hpc.schedulers.rules import Rules, check_fields

GROUP = "flwr_hpc.schedulers"


def names() -> list[str]:
    """Return what ``scheduler`` of a facility may be."""
    return sorted({**_own(), **_others()})


def rules_of(facility: FacilityConfig, key: str = "scheduler") -> Rules:
    """Return the rules of a facility's batch system; imports nothing heavy."""
    rules = import_module(f"{_package(facility.scheduler, key)}.rules").RULES
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
    rules = rules_of(f, f"{key}.scheduler")
    check_shape(name, f)
    check_fields(key, f, rules)
    rules.check(key, f)


def check_facilities(facilities: Mapping[str, FacilityConfig]) -> None:
    """Check every facility of a run."""
    for name, facility in facilities.items():
        check_facility(name, facility)


def _package(name: str, key: str = "scheduler") -> str:
    if package := _own().get(name):
        return package
    one_of(key, name, tuple(names()))
    return _others()[name]


def _own() -> dict[str, str]:
    folder = str(Path(__file__).parent)
    return {m.name: f"{__package__}.{m.name}" for m in pkgutil.iter_modules([folder]) if m.ispkg}


def _others() -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group=GROUP)}
