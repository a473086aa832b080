"""No rank outlives another: one TCP connection per rank to rank 0, watched by a thread.

A blocked collective notices a lost peer late or, on CUDA, only by its time-out. The kernel
closes the sockets of a killed process at once, and keep-alive probes find a lost node; so the
end of such a connection without a goodbye ends this process. A process that is stopped, or hangs
in the kernel, keeps its sockets: both ends send a byte now and then, and its silence ends this
process too.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Literal

from flwr_hpc.clock import Clock, SystemClock
from flwr_hpc.files import is_disk_trouble

GOODBYE, BEAT = b".", b"+"
BEAT_S = 5.0
SILENT_S = 120.0  # longer than anything holds the interpreter's lock while a model is loaded
FAREWELL_S = 10.0  # for the peers to leave as well
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # lost node: 25 s

# Whose failure it is: ``work`` (the order's own), ``peer`` (the allocation has lost a rank) or
# ``disk`` (the working folder cannot be written).
Cause = Literal["work", "peer", "disk"]


class RankError(RuntimeError):
    """What went wrong on a rank, in its own words; `fatal`: trying again will not fix it."""

    def __init__(self, message: str, fatal: bool = False, cause: Cause = "work") -> None:
        super().__init__(message)
        self.fatal, self.cause = fatal, cause


class LoneFailureError(RankError):
    """One rank failed, and the others wait for it elsewhere."""


class PeerLostError(RankError):
    """Another rank is gone, or does not answer: the allocation is lost, not its order."""

    def __init__(self, message: str) -> None:
        super().__init__(message, cause="peer")


def cause_of(error: BaseException) -> Cause:
    """Return whose failure an error is, by what it came from."""
    causes = list(_causes(error))
    for exc in causes:
        if isinstance(exc, RankError):
            return exc.cause
    if any(is_disk_trouble(exc) for exc in causes):
        return "disk"
    return "peer" if any(map(_shows_lost_peer, causes)) else "work"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, what it came from, and those of other ranks that it gathers."""
    while error is not None:
        yield error
        others = getattr(error, "failures", None)  # of torch's CheckpointException
        for other in others.values() if isinstance(others, dict) else ():
            yield from _causes(other[0])
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _shows_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed for want of a peer; torch has no one class for that."""
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return True  # NCCL, its time-outs, the store
    words = str(error)
    gloo = "/gloo/" in words and "enforce fail" not in words  # that is a wrong call
    return type(error) is RuntimeError and (gloo or "caused pair closure" in words)


class Lifeline:
    """Watches connected sockets, one per peer; ends the process when a peer is lost or silent.

    Parameters
    ----------
    peers : dict of int to socket
        Rank of the peer and the connection to it.
    on_lost, on_silent : callable
        Called with the rank from the watching thread; default: message and exit.
    clock : Clock
    """

    def __init__(
        self,
        peers: dict[int, socket.socket],
        on_lost: Callable[[int], None] | None = None,
        on_silent: Callable[[int], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._peers = peers
        self._on_lost, self._on_silent = on_lost or _exit, on_silent or _exit_silent
        self._clock = clock or SystemClock()
        self._closed = False
        # Since the last sign, of those that have given one: rank 0 waits until all are there.
        self._silent_s: dict[int, float] = {}
        for connection in peers.values():
            _keep_alive(connection)
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        looked_at = self._clock.now()
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._peers.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select(BEAT_S):
                    self._listen(selector, key)
                if (now := self._clock.now()) - looked_at >= BEAT_S:
                    # A job that was suspended as a whole has not been silent meanwhile.
                    self._count_silence(selector, min(now - looked_at, 2 * BEAT_S))
                    looked_at = now

    def _listen(self, selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
        heard = _receive(key.fileobj)
        self._silent_s[key.data] = 0.0
        if not heard or GOODBYE in heard:
            selector.unregister(key.fileobj)
            if not heard and not self._closed:
                self._on_lost(key.data)

    def _count_silence(self, selector: selectors.BaseSelector, passed_s: float) -> None:
        for key in list(selector.get_map().values()):
            with suppress(OSError):  # full, for a peer that is stopped; or closed
                self._peers[key.data].send(BEAT, socket.MSG_DONTWAIT)
            if key.data in self._silent_s:
                self._silent_s[key.data] += passed_s
                if self._silent_s[key.data] > SILENT_S and not self._closed:
                    self._on_silent(key.data)

    def close(self) -> None:
        """Leave in order: the peers do not count this rank as lost."""
        self._closed = True
        for connection in self._peers.values():
            try:
                connection.sendall(GOODBYE)
                connection.shutdown(socket.SHUT_WR)
            except OSError:
                continue  # the peer has left before
        self._thread.join(FAREWELL_S)


def _receive(connection: Any) -> bytes:
    try:
        return bytes(connection.recv(1024))
    except OSError:
        return b""


def _keep_alive(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # not every system has all three
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _exit(rank: int) -> None:
    end_process(f"rank {rank} of this allocation is gone; ending")


def silence(rank: int) -> str:
    """Return the words for a rank that lives no more, though its process is there."""
    return f"rank {rank} of this allocation gave no sign of life for {SILENT_S:.0f} s"


def _exit_silent(rank: int) -> None:
    end_process(f"{silence(rank)}; ending")


def end_process(message: str) -> None:
    """End at once: the interpreter's own way out waits for collectives that never end."""
    print(message, file=sys.stderr, flush=True)
    os._exit(75)
