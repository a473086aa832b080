"""What a strategy's loop lives in: clock, event sink, checkpoints, settings.

Everything has a working default, so that a strategy of ours runs under plain Flower; the server
application and the simulator put their own in.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from flwr.app import Array, ArrayRecord

from strategies.parts.blocks import Lazy


class RunFailed(RuntimeError):
    """The run cannot go on; the message is for the user."""


class FatalSiteError(RunFailed):
    """A site reported an error that trying again will not fix (bad data, bad settings)."""


class Stopped(Exception):
    """The stop flag was raised."""


class Clock(Protocol):
    """Time, real or virtual."""

    def now(self) -> float:
        """Return monotonic seconds."""

    def sleep(self, seconds: float) -> None:
        """Let time pass."""


class SystemClock:
    """The real clock."""

    def now(self) -> float:
        """Return monotonic seconds."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


class CheckpointStore(Protocol):
    """Where the server's state survives."""

    def put(self, name: str, tensors: Iterable[tuple[str, Lazy]]) -> ArrayRecord:
        """Store tensors under a name, one at a time, and return them (maybe lazy)."""

    def get(self, name: str) -> ArrayRecord:
        """Return what was put; KeyError or FileNotFoundError if there is none."""

    def commit(self, state: dict[str, Any]) -> None:
        """Make `state` (JSON) the one `restore` returns, atomically.

        Tensors that ``state["tensors"]`` does not name are forgotten.
        """

    def restore(self) -> dict[str, Any] | None:
        """Return the last committed state."""


class MemoryCheckpoints:
    """Checkpoints in memory; they survive nothing but a new loop in the same process."""

    def __init__(self) -> None:
        self._records: dict[str, ArrayRecord] = {}
        self._state: str | None = None

    def put(self, name: str, tensors: Iterable[tuple[str, Lazy]]) -> ArrayRecord:
        """Store copies."""
        record = ArrayRecord({key: Array(np.asarray(tensor)) for key, tensor in tensors})
        self._records[name] = record
        return record

    def get(self, name: str) -> ArrayRecord:
        """Return what was put, or raise KeyError."""
        return self._records[name]

    def commit(self, state: dict[str, Any]) -> None:
        """Replace the state and forget the tensors it does not name."""
        text = json.dumps(state, allow_nan=False)
        self._records = {name: self._records[name] for name in state["tensors"]}
        self._state = text

    def restore(self) -> dict[str, Any] | None:
        """Return a copy of the last committed state."""
        if self._state is None:
            return None
        state: dict[str, Any] = json.loads(self._state)
        return state


@dataclass(frozen=True)
class Settings:
    """How patient a run is. Times are seconds of the injected clock; None: wait for ever."""

    wait_s: float = 60.0  # Longest time a launcher site holds a message
    # Give up on an allocation that has not started, or on an order submitted, by then.
    acquire_deadline_s: float | None = None
    order_deadline_s: float | None = None
    # How long a site may be unreachable before its order is given up.
    offline_grace_s: float = 600.0
    retries: int = 2  # How often an order that failed is sent again
    reply_grace_s: float = 900.0  # A reply later than `wait_s` by so much is taken for lost
    # Pause of the loop when nothing happened; pause before something is tried again.
    poll_s: float = 1.0
    retry_delay_s: float = 5.0
    ttl_s: float = 7 * 86400.0  # Flower's time to live of every message
    evaluate_every: int = 1  # Evaluate every so many versions together with training (0: never)
    final_evaluation_s: float = 600.0  # Time for the evaluation of the last version (0: none)
    round_deadline_s: float | None = None  # A synchronous round aggregates what has arrived by then
    min_sites: int = 1  # A synchronous round with fewer results has failed
    # So many failed rounds in a row (asynchronous: failures of every site) end the run.
    max_failed_rounds: int = 3
    # First and longest pause of a failing site, where no round waits for it (0: only
    # `retry_delay_s`, each time).
    backoff_s: float = 30.0
    backoff_max_s: float = 900.0
    partial_work: bool = True  # A result of fewer steps than were ordered counts
    # Refuse an update whose norm is above so many times the median of its site's last ones; see
    # `strategies.parts.norms`.
    update_norm_limit: float | None = None
    # Scale an update whose norm is above this, or above this quantile of the norms of all sites'
    # last updates, down to it.
    clip_update_norm: float | None = None
    clip_update_quantile: float | None = None


def _no_event(event: str, **fields: Any) -> None:
    """Drop the event."""


def _nothing_known(facility: str, message_id: str, sent_at: float) -> str:
    """Leave it to the time that has passed."""
    return ""


def weights_fault(base: Mapping[str, Any], trained: Mapping[str, Any]) -> str | None:
    """Say what is wrong with trained weights (names, shapes, finite as the model's), or None."""
    if set(base) != set(trained):
        odd = sorted(set(base) ^ set(trained))[:3]
        return f"names of tensors differ from the model's, e.g. {', '.join(odd)}"
    for name, array in base.items():
        try:
            tensor = trained[name].numpy()
        except Exception as exc:  # whatever numpy says to bytes from elsewhere
            return f"{name} cannot be read: {exc}"
        if tuple(tensor.shape) != tuple(array.shape):
            return f"{name} has shape {tuple(tensor.shape)}, expected {tuple(array.shape)}"
        if tensor.dtype.kind not in "biuf":
            return f"{name} has dtype {tensor.dtype}"
        if tensor.dtype.kind == "f":
            with np.errstate(over="ignore"):
                cast = tensor.astype(array.dtype, copy=False)
            if not np.isfinite(cast).all():
                return f"{name} is not finite in {array.dtype}"
    return None


def _anybody(node_id: int, facility: str) -> bool:
    """Take every site's word for who it is."""
    return True


@dataclass
class Runtime:
    """Surroundings of one run."""

    clock: Clock = field(default_factory=SystemClock)
    emit: Callable[..., object] = _no_event  # ``emit(event, **fields)``: one line of the event log
    checkpoints: CheckpointStore = field(default_factory=MemoryCheckpoints)
    run_key: str = "run"  # Names the training run in the ids of its orders; the same after a resume
    settings: Settings = field(default_factory=Settings)
    # Options that go with every order.
    options: dict[str, Any] = field(default_factory=dict)
    # ``check(base, trained) -> what is wrong or None``: guards the model against a launcher
    # site's weights. None where the exchange has checked them already.
    check: Callable[[Mapping[str, Any], Mapping[str, Any]], str | None] | None = weights_fault
    # ``lost(facility, message id, when sent) -> why its reply will not come``, empty if it may:
    # what is known, beside Flower, of a site that works on a message.
    lost: Callable[[str, str, float], str] = _nothing_known
    # ``restarted() -> nodes`` whose SuperNode began anew under the same id since the last call: it
    # knows nothing of what was sent before.
    restarted: Callable[[], Set[int]] = frozenset
    # ``may_speak_for(node id, facility)``: whether a node is who it says. Where sites have keys of
    # their own, one must not answer in another's name.
    may_speak_for: Callable[[int, str], bool] = _anybody
    # ``revoked() -> why, by facility``: sites that somebody has shut out, until they come back as
    # another node.
    revoked: Callable[[], Mapping[str, str]] = dict
    # Once set, the loop ends with `Stopped`.
    stop: threading.Event = field(default_factory=threading.Event)
