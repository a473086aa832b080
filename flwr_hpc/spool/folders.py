"""What lies where in a site's folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr_hpc import files
from flwr_hpc.files import publish, read_json
from flwr_hpc.protocol import Order, Result, from_dict
from flwr_hpc.spool.records import (
    Answering,
    Heartbeat,
    JobTimes,
    LeftOut,
    RecordFile,
    SchedulerAnswer,
    SubmissionMark,
    Verdict,
    WorkerState,
)

CHECKPOINT_META = "meta.json"  # Written last
RECEIVED = ".received"  # Beside weights: as old as their arrival


@dataclass(frozen=True)
class OrderDir:
    """One order's folder."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def exists(self) -> bool:
        """Whether the order is published and not pruned."""
        return self._order_file.exists()

    @property
    def published_ns(self) -> int:
        """When the order was published."""
        return self._order_file.stat().st_mtime_ns

    def order(self) -> tuple[Order, Path | None]:
        """Return the order and the file of the weights it starts from, if any."""
        if (raw := read_json(self._order_file)) is None:
            raise FileNotFoundError(self._order_file)
        order = from_dict(Order, raw["order"])
        return order, Path(raw["weights"]) if raw["weights"] else None

    def extra_arrays(self) -> dict[str, Path]:
        """Return the files of the extra arrays that came with the order, by their key."""
        raw = read_json(self._order_file) or {}
        return {key: Path(path) for key, path in raw.get("extra_arrays", {}).items()}

    def write_order(
        self, order: Order, weights: Path | None, extra_arrays: Mapping[str, Path] | None = None
    ) -> None:
        """Publish the order once; a second call changes nothing."""
        if not self.exists:
            body = {
                "order": dataclasses.asdict(order),
                "weights": str(weights or ""),
                "extra_arrays": {key: str(path) for key, path in (extra_arrays or {}).items()},
            }
            publish(self._order_file, json.dumps(body))

    def remove(self) -> None:
        """Delete the folder; what has no order.json is no order any more."""
        self._order_file.unlink()
        shutil.rmtree(self.path, ignore_errors=True)

    @property
    def weights(self) -> Path:
        """Where the worker writes trained weights, before the result."""
        return self.path / "weights.safetensors"

    def arrays(self, key: str) -> Path:
        """Where the worker writes extra arrays, before the result."""
        return self.path / f"{key}.safetensors"

    def published_arrays(self, key: str) -> Path:
        """Return where extra arrays are: in a file, or the shards of a manifest."""
        manifest = self.path / f"{key}.json"
        return manifest if manifest.exists() else self.arrays(key)

    def progress(self) -> dict[str, Any]:
        return read_json(self.path / "progress.json") or {}

    def write_progress(self, progress: dict[str, Any]) -> None:
        publish(self.path / "progress.json", json.dumps(progress))

    @property
    def has_result(self) -> bool:
        return self._result_file.path.exists()

    def result(self) -> Result | None:
        return self._result_file.read()

    def write_result(self, result: Result) -> None:
        self._result_file.write(result)
        if result.state == "done":  # a failed one may be set aside, and the answer is still true
            self._answer_file.path.unlink(missing_ok=True)

    def answer(self) -> Result | None:
        """Return the result that goes with the order's checkpoint, if that is what it lacks."""
        return self._answer_file.read()

    def write_answer(self, result: Result) -> None:
        """Keep a result that is to be seen only once the order's checkpoint is there."""
        self._answer_file.write(result)

    def set_result_aside(self) -> None:
        """Make the order one without a result again."""
        self._result_file.path.replace(self.path / "result.failed.json")

    @property
    def request(self) -> Path:
        """Where the batch mod puts the message."""
        return self.path / "request.pkl"

    @property
    def reply(self) -> Path:
        """Where the app's reply goes in the job."""
        return self.path / "reply.pkl"

    def rank_outcome(self, rank: int, attempt: str) -> Path:
        """Where a rank of the batch mod other than 0 says what went wrong, or that nothing did."""
        return self.path / f"rank-{rank}.{attempt}.pkl"

    @property
    def _order_file(self) -> Path:
        return self.path / "order.json"

    @property
    def _result_file(self) -> RecordFile[Result]:
        return RecordFile(self.path / "result.json", Result)

    @property
    def _answer_file(self) -> RecordFile[Result]:
        return RecordFile(self.path / "result.waits.json", Result)


@dataclass(frozen=True)
class AllocationDir:
    """One allocation's folder."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def number(self) -> int:
        """Counts a site's allocations."""
        return int(self.name[1:])

    @property
    def spool(self) -> Spool:
        return Spool(self.path.parents[1])

    def settings(self) -> dict[str, Any]:
        """Return what the worker loads."""
        return read_json(self.settings_file) or {}

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Declare the allocation."""
        publish(self.settings_file, json.dumps(settings))

    @property
    def settings_file(self) -> Path:
        return self.path / "settings.json"

    # ---- its job

    @property
    def job_folder(self) -> Path:
        """Absolute: where scripts, pickles and logs of its job lie."""
        return self.path.absolute() / "job"

    def job(self) -> dict[str, Any] | None:
        """Return the job as the scheduler's adapter described it."""
        return read_json(self.path / "job.json")

    def write_job(self, job: Mapping[str, Any]) -> None:
        publish(self.path / "job.json", json.dumps(job))

    @property
    def submission(self) -> RecordFile[SubmissionMark]:
        return RecordFile(self.path / "submitting.json", SubmissionMark)

    @property
    def times(self) -> RecordFile[JobTimes]:
        return RecordFile(self.path / "times.json", JobTimes)

    def mark_cancelling(self) -> None:
        (self.path / "cancelling").touch()

    @property
    def is_cancelling(self) -> bool:
        """Whether we may have cancelled the job."""
        return (self.path / "cancelling").exists()

    def mark_job_ended(self) -> None:
        (self.path / "job_ended").touch()

    @property
    def has_job_ended(self) -> bool:
        """Whether the scheduler has said so."""
        return (self.path / "job_ended").exists()

    # ---- its worker

    def state(self) -> WorkerState | None:
        return RecordFile(self.path / "state.json", WorkerState).read()

    def write_state(self, state: WorkerState) -> None:
        RecordFile(self.path / "state.json", WorkerState).write(state)

    @property
    def heartbeat(self) -> RecordFile[Heartbeat]:
        return RecordFile(self.path / "heartbeat.json", Heartbeat)

    def rendezvous(self, attempt: str) -> Path:
        """Where rank 0 says where it listens, in this start of the job."""
        return self.path / f"rendezvous-{attempt}.json"

    @property
    def turn(self) -> Path:
        """Where rank 0 of the batch mod tells the others what to do."""
        return self.path / "turn.json"

    # ---- its orders and its end

    def assign(self, order_id: str) -> None:
        """Put an order into the worker's inbox; again is harmless."""
        publish(self.path / "inbox" / order_id, "")

    def unassign(self, order_id: str) -> None:
        (self.path / "inbox" / order_id).unlink(missing_ok=True)

    def inbox(self) -> list[str]:
        """Ids of assigned orders, in order."""
        return _names(self.path / "inbox")

    def release(self) -> None:
        """Let the worker end when idle."""
        publish(self.path / "release", "")

    @property
    def released(self) -> bool:
        return (self.path / "release").exists()

    @property
    def released_s(self) -> float:
        """When it was released, in Unix seconds of the file system."""
        return (self.path / "release").stat().st_mtime

    @property
    def verdict(self) -> RecordFile[Verdict]:
        return RecordFile(self.path / "verdict.json", Verdict)

    def mark_reported(self) -> None:
        (self.path / "reported").touch()

    @property
    def is_reported(self) -> bool:
        """Whether its failed start was already held against an answer."""
        return (self.path / "reported").exists()


@dataclass(frozen=True)
class Spool:
    """A site's folder."""

    root: Path

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Be the only launcher; see `flwr_hpc.files.lock`."""
        return files.lock(self.root)

    @property
    def job_states(self) -> RecordFile[SchedulerAnswer]:
        return RecordFile(self.root / "job_states.json", SchedulerAnswer)

    @property
    def answering(self) -> RecordFile[Answering]:
        return RecordFile(self.root / "answering.json", Answering)

    @property
    def released(self) -> Path:
        """There once the server has said that the run is over."""
        return self.root / "released"

    @property
    def left_out(self) -> RecordFile[LeftOut]:
        return RecordFile(self.root / "left_out.json", LeftOut)

    def order(self, order_id: str) -> OrderDir:
        return OrderDir(self.root / "orders" / order_id)

    def orders(self) -> list[OrderDir]:
        """All published orders, newest first."""
        found = (self.order(name) for name in _names(self.root / "orders"))
        return sorted((o for o in found if o.exists), key=lambda o: o.published_ns, reverse=True)

    def allocation(self, name: str) -> AllocationDir:
        return AllocationDir(self.root / "allocations" / name)

    def allocations(self) -> list[AllocationDir]:
        """All allocations ever asked for, oldest first."""
        named = (self.allocation(name) for name in _names(self.root / "allocations"))
        # On a full disk there may be a folder without settings.
        return [alloc for alloc in named if alloc.settings_file.exists()]

    def new_allocation(self) -> AllocationDir:
        """Name one more; it counts once its settings are written."""
        number = max((a.number for a in self.allocations()), default=-1) + 1
        return self.allocation(f"a{number:04d}")

    def weights(self, sha256: str) -> Path:
        return self.weights_folder / f"{sha256}.safetensors"

    @property
    def weights_folder(self) -> Path:
        """Where received weights lie."""
        return self.root / "weights"

    @property
    def feedback(self) -> Path:
        """Where lies what a lossy codec left out of the last update."""
        return self.root / "feedback"

    def received_weights(self) -> list[Path]:
        """All files of received weights."""
        return sorted(self.weights_folder.glob("*.safetensors"))

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def app(self) -> Path:
        """Where the batch mod copies the user's app."""
        return self.root / "app"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def complete_checkpoints(self) -> list[str]:
        """Names of the complete ones, sorted: ``<order id>@<step>``."""
        found = self.checkpoints.glob(f"[!.]*@*/{CHECKPOINT_META}")
        return sorted(meta.parent.name for meta in found)


def mark_received(weights: Path) -> None:
    """Note that weights were received now; their file may be a link to one written long ago."""
    weights.with_suffix(RECEIVED).touch()


def received_ns(weights: Path) -> int:
    """Return when weights were received."""
    mark = weights.with_suffix(RECEIVED)
    return (mark if mark.exists() else weights).stat().st_mtime_ns


def checkpoint_name(order_id: str, step: int) -> str:
    """Return the folder of a checkpoint; the names of one order's sort by step."""
    return f"{order_id}@{step:010d}"


def order_of_checkpoint(name: str) -> str:
    """Return the id of the order that a checkpoint was written in."""
    return name.rpartition("@")[0]


def latest_checkpoint(names: Iterable[str], order_id: str) -> str:
    """Return the furthest of an order's checkpoints, ``""`` if it has none."""
    return max((n for n in names if order_of_checkpoint(n) == order_id), default="")


def _names(folder: Path) -> list[str]:
    """Return what lies in a folder, sorted, without drafts."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(name for name in names if not name.startswith("."))
