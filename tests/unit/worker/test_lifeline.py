"""Whether a rank is there: by its connection, its silence, and the errors of collectives."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator

import pytest
from torch import distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from worlds.clock import FakeClock

from flwr_hpc.errors import UserError
from flwr_hpc.worker import lifeline
from flwr_hpc.worker.lifeline import Lifeline, LoneFailureError, PeerLostError, cause_of

GLOO = "[/__w/pytorch/third_party/gloo/gloo/transport/tcp/"
FULL = OSError(errno.ENOSPC, "No space left on device")
# Texts as torch 2.13 has them.
CAUSES = {
    "gloo: closed": (RuntimeError(f"{GLOO}pair.cc:537] Connection closed by peer [::1]:1"), "peer"),
    "gloo: reset": (RuntimeError(f"{GLOO}pair.cc:537] Read error [::1]:1: reset by peer"), "peer"),
    "gloo: time-out": (RuntimeError(f"{GLOO}unbound_buffer.cc:78] Timed out waiting 9ms"), "peer"),
    "gloo: aborted": (RuntimeError("Application timeout caused pair closure"), "peer"),
    "gloo: wrong call": (RuntimeError(f"[enforce fail at {GLOO}pair.cc:446] op.nbytes"), "work"),
    "nccl": (dist.DistBackendError("NCCL error: remote process exited"), "peer"),
    "nccl: time-out": (dist.DistBackendError("Watchdog caught collective timeout"), "peer"),
    "store": (dist.DistNetworkError("Broken pipe"), "peer"),
    "store: gone": (dist.DistStoreError("wait timeout after 300000ms"), "peer"),
    "checkpoint": (CheckpointException("write", {1: (FULL, None)}), "disk"),  # type: ignore[dict-item]
    "disk": (FULL, "disk"),
    "file": (FileNotFoundError(errno.ENOENT, "no such file"), "work"),
    "user": (UserError("train.lr is too high"), "work"),
    "own": (RuntimeError("shape mismatch"), "work"),
    "lost": (PeerLostError("rank 1"), "peer"),
    "lone": (LoneFailureError("rank 1: no memory"), "work"),
}


@pytest.mark.parametrize("name", list(CAUSES))
def test_whose_failure_an_error_is(name: str) -> None:
    """Protects an order from being failed for what the allocation or the disk has lost."""
    error, cause = CAUSES[name]
    assert cause_of(error) == cause
    wrapped = RuntimeError("while the weights were gathered")
    wrapped.__cause__ = error
    assert cause_of(wrapped) == cause


def test_a_failure_of_its_own_stays_one() -> None:
    """Protects what a rank says of itself after it waited in vain for the others."""
    error = ValueError("bad tensor")
    error.__context__, error.__suppress_context__ = CAUSES["gloo: time-out"][0], True
    assert cause_of(error) == "work"


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Return both ends of a connection on which silence is soon noticed."""
    monkeypatch.setattr(lifeline, "BEAT_S", 0.02)
    monkeypatch.setattr(lifeline, "SILENT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as door:
        theirs = socket.create_connection(door.getsockname())
        ours, _ = door.accept()
    yield ours, theirs
    ours.close()
    theirs.close()


def test_a_peer_that_falls_silent_is_noticed(ends: tuple[socket.socket, socket.socket]) -> None:
    """Protects from a stopped process, whose sockets the kernel keeps open."""
    ours, theirs = ends
    silent, lost = threading.Event(), threading.Event()
    Lifeline({1: ours}, lambda rank: lost.set(), lambda rank: silent.set())
    assert not silent.wait(0.4)  # rank 0 is waited for until it has heard of all
    theirs.sendall(lifeline.BEAT)
    assert silent.wait(600)
    assert not lost.is_set()


def test_ranks_that_beat_live(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects a job that was suspended as a whole: the clock jumps, and nobody was silent."""
    monkeypatch.setattr(lifeline, "SILENT_S", 60.0)
    gone: list[int] = []
    clocks = [FakeClock(step=1000.0), FakeClock(step=1000.0)]
    one, other = (
        Lifeline({rank: end}, gone.append, gone.append, clock)
        for rank, (end, clock) in enumerate(zip(ends, clocks, strict=True))
    )
    while min(clock.time for clock in clocks) < 50_000.0:
        threading.Event().wait(0.02)
    closing = threading.Thread(target=one.close)
    closing.start()
    other.close()
    closing.join()
    assert gone == []
