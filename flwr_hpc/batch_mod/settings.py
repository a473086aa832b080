"""Where a ClientApp's messages go: a facility, and what to change of it, from three places."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from flwr.app import Context

from flwr_hpc.config.compose import compose_config
from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.config.overrides import quoted
from flwr_hpc.config.schema import AllocationConfig
from flwr_hpc.errors import UserError, closest
from flwr_hpc.schedulers.registry import check_facility

PREFIX = "flwr-hpc."  # of our keys in Flower's run and node config
HERE = "none"  # the facility that stands for: no job, run in the ClientApp's process
OWN = ("facility", "app", "config_dir")
FACILITY = tuple(f.name for f in fields(FacilityConfig))
ALLOCATION = tuple(f.name for f in fields(AllocationConfig))


@dataclass(frozen=True)
class Settings:
    """A checked choice."""

    name: str  # The facility's
    facility: FacilityConfig
    allocation: AllocationConfig
    app: str = ""  # ``module:attribute`` of the ClientApp; empty: as its ``pyproject.toml`` says

    def root(self, context: Context) -> Path:
        """Return the folder on the shared file system of this run, node and shape of job."""
        workdir = Path(self.facility.workdir or ".").expanduser().absolute()
        run = workdir / "flwr-hpc-batch" / str(context.run_id) / str(context.node_id)
        return run / f"{self.name}-{self._digest()[:6]}"

    def run_key(self, context: Context) -> str:
        """Return what names this run and node in job names; short, as schedulers cut names."""
        text = f"{context.run_id} {context.node_id} {self._digest()}"
        return "b" + hashlib.sha256(text.encode()).hexdigest()[:10]

    def _digest(self) -> str:
        text = json.dumps(asdict(self.facility), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def gather(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Return the settings in force: the node's over the run's over those given in the code.

    An empty text is no setting: Flower's ``run -c`` takes only keys that the app declares.
    """
    settings = {_key(k): v for k, v in given.items() if v is not None}
    for config in (context.run_config, context.node_config):
        found = {k.removeprefix(PREFIX): v for k, v in config.items() if k.startswith(PREFIX)}
        settings |= {_key(k): v for k, v in found.items() if v != ""}
    return settings


def settle(given: Mapping[str, Any]) -> Settings:
    """Compose and check the facility."""
    name = str(given.get("facility", ""))
    if not re.fullmatch(r"\w+", name):
        raise UserError(
            "flwr_hpc.batch: which facility? Write flwr_hpc.batch('NAME'), or start the SuperNode "
            f'with --node-config \'{PREFIX}facility="NAME"\'; "{HERE}" runs the app where it is. '
            f"Found: '{name}'"
        )
    changes = {k: v for k, v in given.items() if k not in OWN}
    # A job that was submitted ahead could start when the run is long over.
    overrides = [f"+facility={name}", 'allocation.renew_ahead="off"']
    overrides += [f"{_place(k, name)}={_text(v)}" for k, v in _flat(changes)]
    try:
        config = compose_config(overrides, given.get("config_dir"))
        facility = _one_rank(config.facilities[name], changes)
        check_facility(name, facility)
    except UserError as exc:
        raise UserError(_explain(str(exc), name)) from None
    return Settings(name, facility, config.allocation, str(given.get("app", "")))


def _one_rank(facility: FacilityConfig, changes: Mapping[str, Any]) -> FacilityConfig:
    """Give one process all that the facility's file deals out to several ranks of a node."""
    if "ranks_per_node" in changes:
        return facility
    cpus = facility.cpus_per_rank
    if "cpus_per_rank" not in changes:
        cpus *= facility.ranks_per_node
    return replace(facility, ranks_per_node=1, cpus_per_rank=cpus)


def _key(key: str) -> str:
    first, dot, rest = key.partition(".")
    return first.replace("-", "_") + dot + rest


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
