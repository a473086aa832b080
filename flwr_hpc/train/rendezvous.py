"""How the ranks of an allocation find each other: a file, a TCP store, process groups."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from flwr_hpc.errors import UserError
from flwr_hpc.files import publish, read_json
from flwr_hpc.spool import AllocationDir
from flwr_hpc.worker.lifeline import (
    Cause,
    Lifeline,
    LoneFailureError,
    PeerLostError,
    cause_of,
)
from flwr_hpc.worker.ranks import Ranks

T = TypeVar("T")

FOREVER = timedelta(days=30)  # an idle rank waits in a broadcast for as long as it takes
COLLECTIVE = timedelta(minutes=30)
LET_GO_S = 0.2
PATIENCE_S = 30.0  # of a rank that failed with the others that did not


@dataclass(frozen=True)
class Failure:
    """What went wrong on one rank; `fatal`: trying again will not fix it."""

    message: str
    fatal: bool
    cause: Cause = "work"

    @classmethod
    def of(cls, exc: Exception) -> Failure:
        """Only what the user can fix is fatal; anything else may work at the next try."""
        if isinstance(exc, UserError):
            return cls(str(exc), fatal=True)
        return cls(f"{type(exc).__name__}: {exc}", fatal=False, cause=cause_of(exc))


@dataclass(frozen=True)
class Group:
    """The allocation's ranks, connected."""

    ranks: Ranks
    device: torch.device  # Of this rank
    control: dist.ProcessGroup  # gloo, for decisions; never times out while idle
    # gloo, on which the ranks tell each other how an order ended; its own, because a rank
    # that failed must not meet the others inside another collective.
    verdict: dist.ProcessGroup
    lifeline: Lifeline

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value` on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def total(self, values: list[float]) -> list[float]:
        """Return the sums over the ranks; on the CPU, so that no device is waited for."""
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return [float(v) for v in tensor]

    def largest(self, value: float) -> float:
        """Return the largest of the ranks' values."""
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return float(tensor)

    def attempt(
        self, work: Callable[[], T], patience_s: float | None = None
    ) -> tuple[T | None, list[Failure]]:
        """Do a piece of work on every rank; return its result and what went wrong on any rank."""
        result, mine = None, None
        try:
            result = work()
        except Exception as exc:
            if not isinstance(exc, UserError):
                traceback.print_exc()
            mine = Failure.of(exc)
        return result, self.failures(mine, patience_s)

    def failures(self, mine: Failure | None, patience_s: float | None = None) -> list[Failure]:
        """Tell all ranks how this one fared and return what went wrong on any of them.

        The first is what to blame: a rank that lost a peer saw a consequence.

        Raises
        ------
        LoneFailureError
            If this rank failed and the others do not come here for `patience_s` (default
            `PATIENCE_S`), as they wait for it in a collective call. It must end its process.
        PeerLostError
            If another rank is gone, whatever this one met first. It must end its process.
        """
        patience = timedelta(seconds=PATIENCE_S if patience_s is None else patience_s)
        began, failed = time.monotonic(), torch.tensor(float(mine is not None))
        gathered: list[Failure | None] = [None] * self.ranks.world_size
        try:
            work = dist.all_reduce(failed, group=self.verdict, async_op=True)
            work.wait(patience if mine else COLLECTIVE)
            if failed:
                dist.all_gather_object(gathered, mine, group=self.verdict)
        except RuntimeError as exc:
            timed_out = time.monotonic() - began >= patience.total_seconds()
            words = f"rank {self.ranks.rank}: {mine.message if mine else exc}"
            if mine is not None and mine.cause != "peer" and timed_out:
                raise LoneFailureError(words, mine.fatal, mine.cause) from None
            raise PeerLostError(words) from None
        return sorted((f for f in gathered if f is not None), key=lambda f: f.cause == "peer")

    def close(self) -> None:
        """Leave in order; a collective call."""
        self.lifeline.close()
        dist.destroy_process_group()
        # gloo's threads need the interpreter to let go of the last tensors; one that asks for
        # it while the interpreter shuts down aborts the process.
        time.sleep(LET_GO_S)


def join(
    folder: Path,
    ranks: Ranks,
    timeout_s: float = 600.0,
    on_silent: Callable[[int], None] | None = None,
) -> Group:
    """Connect the ranks of an allocation.

    Parameters
    ----------
    folder : Path
        The allocation's folder; rank 0 publishes its address there.
    ranks : Ranks
    timeout_s : float
        How long to wait for the other ranks.
    on_silent : callable
        See `Lifeline`.

    Raises
    ------
    TimeoutError
        If they do not come.
    """
    if ranks.nodes == 1:
        # Loopback is always there, even on nodes without a network.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
    path = AllocationDir(folder).rendezvous(ranks.attempt)
    meet = _host if ranks.rank == 0 else _visit
    store, peers = meet(path, ranks, timeout_s)
    lifeline = Lifeline(peers, on_silent=on_silent)
    device = _device(ranks)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=COLLECTIVE,
        device_id=device if device.type == "cuda" else None,
    )
    control = dist.new_group(backend="gloo", timeout=FOREVER)
    verdict = dist.new_group(backend="gloo", timeout=COLLECTIVE)
    return Group(ranks, device, control, verdict, lifeline)


def _device(ranks: Ranks) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", ranks.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name.startswith("lo")), "lo")


Meeting = tuple[TCPStore, dict[int, socket.socket]]


def _host(path: Path, ranks: Ranks, timeout_s: float) -> Meeting:
    """Rank 0: open the store, publish where it is, let everybody connect."""
    host = "127.0.0.1" if ranks.nodes == 1 else socket.gethostname()
    token = secrets.token_hex(16)
    with socket.create_server(("127.0.0.1" if ranks.nodes == 1 else "", 0)) as door:
        store = TCPStore(
            host, 0, ranks.world_size, is_master=True, wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )  # fmt: skip
        address = {
            "host": host, "store": store.port, "lifeline": door.getsockname()[1], "token": token,
        }  # fmt: skip
        publish(path, json.dumps(address))
        path.chmod(0o600)
        return store, _welcome(door, token, ranks.world_size, timeout_s)


def _welcome(
    door: socket.socket, token: str, world_size: int, timeout_s: float
) -> dict[int, socket.socket]:
    deadline = time.monotonic() + timeout_s
    peers: dict[int, socket.socket] = {}
    while len(peers) < world_size - 1:
        door.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            connection, _ = door.accept()
        except TimeoutError:
            missing = sorted(set(range(1, world_size)) - set(peers))
            raise TimeoutError(f"ranks {missing} did not start in {timeout_s:.0f} s") from None
        connection.settimeout(5.0)
        try:
            said, _, rank = connection.makefile("r").readline().strip().partition(" ")
        except OSError:
            said, rank = "", ""
        if not secrets.compare_digest(said, token):
            connection.close()  # not one of ours
            continue
        connection.sendall(b"!")
        peers[int(rank)] = connection
    return peers


def _visit(path: Path, ranks: Ranks, timeout_s: float) -> Meeting:
    """Another rank: find rank 0, whose file may be left over from a start that died."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        address = read_json(path)
        connection = _knock(address, ranks.rank) if address else None
        if address and connection:
            store = TCPStore(
                address["host"], address["store"], ranks.world_size, is_master=False,
                wait_for_workers=False, timeout=timedelta(seconds=timeout_s),
            )  # fmt: skip
            return store, {0: connection}
        time.sleep(0.05)
    raise TimeoutError(f"rank 0 did not publish its address in {path} in {timeout_s:.0f} s")


def _knock(address: dict[str, Any], rank: int) -> socket.socket | None:
    try:
        connection = socket.create_connection((address["host"], address["lifeline"]), timeout=10)
        connection.sendall(f"{address['token']} {rank}\n".encode())
        if connection.recv(1) == b"!":
            return connection
        connection.close()
    except OSError:
        return None
    return None
