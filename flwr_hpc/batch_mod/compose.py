"""From what is set for a ClientApp to a checked facility, with Hydra: once, see `cache`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from flwr_hpc.batch_mod.settings import HERE, OWN, PREFIX, Settings
from flwr_hpc.config.compose import compose_config
from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.config.overrides import quoted
from flwr_hpc.config.schema import AllocationConfig
from flwr_hpc.errors import UserError, closest
from flwr_hpc.schedulers.accounts import find_account
from flwr_hpc.schedulers.interpreter import check_interpreter
from flwr_hpc.schedulers.registry import check_facility

FACILITY = tuple(f.name for f in fields(FacilityConfig))
ALLOCATION = tuple(f.name for f in fields(AllocationConfig))
RUN_CHECK_S = 60.0
IN_JOB = ("submitit", "flwr")  # what the worker imports there


def settle(given: Mapping[str, Any]) -> Settings:
    """Compose and check the facility, and find the account where none is set."""
    name = str(given.get("facility", ""))
    if not re.fullmatch(r"\w+", name):
        raise UserError(
            "flwr_hpc.batch: which facility? Write flwr_hpc.batch('NAME'), or start the SuperNode "
            f'with --node-config \'{PREFIX}facility="NAME"\'; "{HERE}" runs the app where it is. '
            f"Found: '{name}'"
        )
    changes = {k: v for k, v in given.items() if k not in OWN}
    # A job that was submitted ahead could start when the run is long over.
    own = ['allocation.renew_ahead="off"', "allocation.replace_cancelled=false"]
    overrides = [f"+facility={name}", *own]
    overrides += [f"{_place(k, name)}={_text(v)}" for k, v in _flat(changes)]
    try:
        config = compose_config(overrides, given.get("config_dir"))
        if config.facilities[name].ssh:
            raise UserError(f"facilities.{name}.ssh: start the SuperNode on that host itself")
        facility = _one_rank(config.facilities[name], changes)
        check_facility(name, facility)
        account = find_account(name, facility)
        check_interpreter(name, facility, IN_JOB, "flwr-hpc")
    except UserError as exc:
        raise UserError(_explain(str(exc), name)) from None
    facility = replace(facility, account=account.name)
    return Settings(
        name, facility, config.allocation, str(given.get("app", "")), str(account),
        float(given.get("run_check_s", RUN_CHECK_S)),
    )  # fmt: skip


def _one_rank(facility: FacilityConfig, changes: Mapping[str, Any]) -> FacilityConfig:
    """Give one process all that the facility's file deals out to several ranks of a node."""
    if "ranks_per_node" in changes:
        return facility
    cpus = facility.cpus_per_rank
    if "cpus_per_rank" not in changes:
        cpus *= facility.ranks_per_node
    return replace(facility, ranks_per_node=1, cpus_per_rank=cpus)


def _place(key: str, facility: str) -> str:
    name = key.partition(".")[0]
    if name in FACILITY:
        return f"facilities.{facility}.{key}"
    if name in ALLOCATION:
        return f"allocation.{key}"
    valid = (*OWN, *FACILITY, *ALLOCATION)
    raise UserError(
        f"flwr_hpc.batch: unknown setting '{key}'.{closest(name, valid)} Valid: {', '.join(valid)}."
    )


def _flat(changes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield mappings key by key: they add to the facility's, as in ``env.NAME``."""
    for key, value in changes.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{k}", v) for k, v in value.items())
        else:
            yield key, value


def _text(value: Any) -> str:
    """Write a value in Hydra's grammar."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_text, value)) + "]"
    if isinstance(value, str):
        return quoted(value)
    return json.dumps(value)


def _explain(text: str, facility: str) -> str:
    """Turn advice for our command line into advice for the mod."""
    text = text.replace(f"facilities.{facility}.", "").replace("allocation.", "")
    text = text.replace("+facility=", "facility=").replace("--config-dir ", "config_dir=")
    text = re.sub(r"Add (it )?to the command:", "Give it to flwr_hpc.batch:", text)
    return (
        f"flwr_hpc.batch('{facility}'): {text.strip()} (A setting KEY is the argument KEY=VALUE, "
        f"or {PREFIX}KEY in the SuperNode's --node-config or the app's run config.)"
    )
