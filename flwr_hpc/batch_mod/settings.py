"""Where a ClientApp's messages go: a facility, and what to change of it, from three places."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.config.schema import AllocationConfig

PREFIX = "flwr-hpc."  # of our keys in Flower's run and node config
HERE = "none"  # the facility that stands for: no job, run in the ClientApp's process
OWN = ("facility", "app", "config_dir", "run_check_s")


@dataclass(frozen=True)
class Settings:
    """A checked choice."""

    name: str  # The facility's
    facility: FacilityConfig
    allocation: AllocationConfig
    app: str = ""  # ``module:attribute`` of the ClientApp; empty: as its ``pyproject.toml`` says
    account: str = ""  # The facility's, and where it is from
    run_check_s: float = 0.0  # How often Flower is asked whether the run goes on (0: never)

    def root(self, context: Context) -> Path:
        """Return the folder on the shared file system of this run, node and shape of job."""
        folder = run_folder(self.facility.workdir, context)
        return folder / f"{self.name}-{self._digest()[:6]}"

    def run_key(self, context: Context) -> str:
        """Return what names this run and node in job names; short, as schedulers cut names."""
        text = f"{context.run_id} {context.node_id} {self._digest()}"
        return "b" + hashlib.sha256(text.encode()).hexdigest()[:10]

    def _digest(self) -> str:
        text = json.dumps(asdict(self.facility), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def run_folder(workdir: str | None, context: Context) -> Path:
    """Return the folder of this run and node."""
    folder = Path(workdir or ".").expanduser().absolute() / "flwr-hpc-batch"
    return folder / str(context.run_id) / str(context.node_id)


def gather(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Return the settings in force: the node's over the run's over those given in the code.

    An empty text is no setting: Flower's ``run -c`` takes only keys that the app declares. None
    is one, as in ``account=None``; Flower's configs hold no such value and spell it ``none``.
    """
    settings = {_key(k): v for k, v in given.items() if v is not None or k not in OWN}
    for config in (context.run_config, context.node_config):
        found = {k.removeprefix(PREFIX): v for k, v in config.items() if k.startswith(PREFIX)}
        settings |= {_key(k): v for k, v in found.items() if v != ""}
    return {k: None if k not in OWN and _is_none(v) else v for k, v in settings.items()}


def _is_none(value: Any) -> bool:
    return isinstance(value, str) and value.lower() == "none"


def _key(key: str) -> str:
    first, dot, rest = key.partition(".")
    return first.replace("-", "_") + dot + rest
