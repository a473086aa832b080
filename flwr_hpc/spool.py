"""A site's folder on its facility's shared file system: how launcher and worker talk.

Compute nodes need nothing but this folder. Every file is written under another name, synced
and renamed, so whoever sees a file sees all of it, and every process may be killed at any
moment. Standard library only.

::

    SITE/weights/<sha256>.safetensors              received weights and further arrays
    SITE/orders/<order id>/order.json              written once by the launcher
                          /progress.json           worker: {"step", "steps", "loss", ...}
                          /weights.safetensors     worker: trained weights
                          /<key>.safetensors       worker: further arrays, if asked for
                          /result.json             worker, last
    SITE/allocations/<name>/spec.json              launcher: what the worker loads
                           /job.json               launcher: the scheduler's job
                           /inbox/<order id>       launcher: this allocation works on it
                           /state.json             worker: WorkerState, about once a second
                           /release                launcher: end when idle
    SITE/checkpoints/<order id>@<step>/            worker: trainer state (sharded)
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flwr_hpc.files import publish, read_json
from flwr_hpc.protocol import Order, Result, from_json, to_json


@dataclass(frozen=True)
class WorkerState:
    """What the worker of an allocation says of itself."""

    # ``starting`` (imports, process group), ``loading`` (model, data), ``ready``, ``running``
    # (an order), ``closed`` (left on its own accord: released, idle too long, or out of
    # walltime), ``interrupted`` (told to end; whether its job is requeued only the scheduler
    # knows), ``failed``.
    state: Literal["starting", "loading", "ready", "running", "closed", "interrupted", "failed"]
    order_id: str = ""  # Of the running order
    beat: int = 0  # Grows while the worker lives
    walltime_left_s: float | None = None  # Until the job's end, on the worker's clock
    # Time so far in ``startup``, ``load``, ``train``, ``evaluate``, ``transfer``, ``idle``.
    seconds: dict[str, float] = field(default_factory=dict)
    error: str = ""  # Set when ``failed``; trying again will not fix a fatal one
    fatal: bool = False


@dataclass(frozen=True)
class OrderDir:
    """One order's folder."""

    path: Path

    @property
    def weights(self) -> Path:
        """Where the worker writes trained weights, before the result."""
        return self.path / "weights.safetensors"

    def order(self) -> tuple[Order, Path | None]:
        """Return the order and the file of the weights it starts from, if any."""
        raw = read_json(self.path / "order.json")
        if raw is None:
            raise FileNotFoundError(self.path / "order.json")
        order = from_json(Order, json.dumps(raw["order"]))
        return order, Path(raw["weights"]) if raw["weights"] else None

    def further(self) -> dict[str, Path]:
        """Return the files of the further arrays that the order carries, by their key."""
        raw = read_json(self.path / "order.json") or {}
        return {key: Path(path) for key, path in raw.get("further", {}).items()}

    def write_order(
        self, order: Order, weights: Path | None, further: Mapping[str, Path] | None = None
    ) -> None:
        """Publish the order once; a second call changes nothing."""
        target = self.path / "order.json"
        if not target.exists():
            body = {
                "order": dataclasses.asdict(order),
                "weights": str(weights or ""),
                "further": {key: str(path) for key, path in (further or {}).items()},
            }
            publish(target, json.dumps(body))

    def arrays(self, key: str) -> Path:
        """Where the worker writes further arrays, before the result."""
        return self.path / f"{key}.safetensors"

    def progress(self) -> dict[str, Any]:
        return read_json(self.path / "progress.json") or {}

    def write_progress(self, progress: dict[str, Any]) -> None:
        publish(self.path / "progress.json", json.dumps(progress))

    def result(self) -> Result | None:
        raw = read_json(self.path / "result.json")
        return from_json(Result, json.dumps(raw)) if raw is not None else None

    def write_result(self, result: Result) -> None:
        publish(self.path / "result.json", to_json(result))


@dataclass(frozen=True)
class AllocationDir:
    """One allocation's folder."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def spec(self) -> dict[str, Any]:
        return read_json(self.path / "spec.json") or {}

    def job(self) -> dict[str, Any] | None:
        return read_json(self.path / "job.json")

    def state(self) -> WorkerState | None:
        raw = read_json(self.path / "state.json")
        return from_json(WorkerState, json.dumps(raw)) if raw is not None else None

    def write_state(self, state: WorkerState) -> None:
        publish(self.path / "state.json", to_json(state))

    def assign(self, order_id: str) -> None:
        """Put an order into the worker's inbox; again is harmless."""
        publish(self.path / "inbox" / order_id, "")

    def inbox(self) -> list[str]:
        """Ids of assigned orders, in order."""
        try:
            names = os.listdir(self.path / "inbox")
        except FileNotFoundError:
            return []
        return sorted(n for n in names if not n.startswith("."))

    def release(self) -> None:
        publish(self.path / "release", "")

    @property
    def released(self) -> bool:
        return (self.path / "release").exists()


@dataclass(frozen=True)
class Spool:
    """A site's folder."""

    root: Path

    def order(self, order_id: str) -> OrderDir:
        return OrderDir(self.root / "orders" / order_id)

    def allocation(self, name: str) -> AllocationDir:
        return AllocationDir(self.root / "allocations" / name)

    def allocations(self) -> list[AllocationDir]:
        """All allocations ever asked for, oldest first."""
        try:
            names = sorted(os.listdir(self.root / "allocations"))
        except FileNotFoundError:
            return []
        return [self.allocation(n) for n in names if not n.startswith(".")]

    def weights(self, sha256: str) -> Path:
        return self.root / "weights" / f"{sha256}.safetensors"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"
