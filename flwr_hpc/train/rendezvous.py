"""How the ranks of an allocation find each other: a file, a meeting, process groups."""

from __future__ import annotations

import json
import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from flwr_hpc.errors import UserError
from flwr_hpc.files import publish, read_json
from flwr_hpc.spool import AllocationDir
from flwr_hpc.train.runtime.device import backends, choose_device
from flwr_hpc.worker.lifeline import (
    Cause,
    Lifeline,
    LoneFailureError,
    PeerLostError,
    cause_of,
)
from flwr_hpc.worker.meeting import SECRET_BYTES, Host, Values, listening_address, proof
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
        if isinstance(exc, torch.OutOfMemoryError):
            return cls(explain_out_of_memory(exc), fatal=True)
        return cls(f"{type(exc).__name__}: {exc}", fatal=False, cause=cause_of(exc))


def explain_out_of_memory(error: torch.OutOfMemoryError) -> str:
    """Return what to change: the same work would need the same memory again."""
    return (
        f"a GPU ran out of memory: {str(error).partition('. ')[0]}. Lower train.micro_batch and "
        "raise train.accumulation as much, or set train.activation_checkpointing=full, or lower "
        "data.seq_len, or give the job more GPUs"
    )


@dataclass(frozen=True)
class Group:
    """The allocation's ranks, connected."""

    ranks: Ranks
    device: torch.device  # Of this rank
    control: dist.ProcessGroup  # gloo, for decisions; never times out while idle
    # gloo, on which the ranks tell each other how an order ended; its own, because a rank
    # that failed must not meet the others inside another collective.
    verdict: dist.ProcessGroup
    background: dist.ProcessGroup  # gloo, for a thread that writes while training goes on
    lifeline: Lifeline
    store: RankStore  # torch keeps no reference to what of it is Python

    def broadcast(self, value: Any, group: dist.ProcessGroup | None = None) -> Any:
        """Return rank 0's `value` on every rank; over `control` if no other group is given."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=group or self.control)
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

    def gather(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """Return every rank's `value` on every rank; over `control` if no other group is given."""
        gathered: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(gathered, value, group=group or self.control)
        return gathered

    def refuse_together(self, work: Callable[[], None]) -> None:
        """Do a piece of work on every rank; raise on all what the user can fix on any of them.

        The work must make no collective call: a rank that has failed takes part in none.
        """
        refusal = ""
        try:
            work()
        except UserError as exc:
            refusal = str(exc)
        if self.largest(float(bool(refusal))):
            raise UserError(next(filter(None, self.gather(refusal))))

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
    elif chosen := interfaces(os.environ.get("NCCL_SOCKET_IFNAME", "")):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", ",".join(chosen))
    path = AllocationDir(folder).rendezvous(ranks.attempt)
    meet = _host if ranks.rank == 0 else _visit
    values, peers, secret = meet(path, ranks, timeout_s)
    lifeline = Lifeline(peers, on_silent=on_silent)
    device = choose_device(ranks)
    store = RankStore(values, timeout_s)
    _open_process_group(store, ranks, device)
    control = dist.new_group(backend="gloo", timeout=FOREVER)
    verdict = dist.new_group(backend="gloo", timeout=COLLECTIVE)
    background = dist.new_group(backend="gloo", timeout=COLLECTIVE)
    for group in (None, control, verdict, background):  # None: all ranks' own
        prove(group, ranks, secret, timeout_s)
    return Group(ranks, device, control, verdict, background, lifeline, store)


def _open_process_group(store: RankStore, ranks: Ranks, device: torch.device) -> None:
    dist.init_process_group(
        backends(device),
        store=store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=COLLECTIVE,
        device_id=None if device.type == "cpu" else device,
    )


def _interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _loopback() -> str:
    return next((name for name in _interfaces() if name.startswith("lo")), "lo")


def interfaces(nccl: str, present: Sequence[str] | None = None) -> list[str]:
    """Return the network interfaces that ``NCCL_SOCKET_IFNAME`` chooses; gloo wants whole names.

    Parameters
    ----------
    nccl : str
        Names or prefixes of them; after ``=`` whole names, after ``^`` what is not to be taken.
    present : sequence of str, optional
        Default: this host's.
    """
    present = _interfaces() if present is None else present
    if not nccl:
        return []
    words = nccl.lstrip("^=").split(",")
    exact = "=" in nccl[:2]
    prefixes = () if exact else tuple(w for w in words if w not in present)
    matching = [n for n in present if n in words or n.startswith(prefixes)]
    if not nccl.startswith("^"):
        return matching
    return [n for n in present if n not in matching and not n.startswith(("lo", "docker"))]


Meeting = tuple[Values, dict[int, socket.socket], bytes]


def _host(path: Path, ranks: Ranks, timeout_s: float) -> Meeting:
    """Rank 0: say where it listens, to those who may read the file, and let everybody connect."""
    secret = os.urandom(SECRET_BYTES)
    host = Host(listening_address(ranks.nodes), secret)
    publish(path, json.dumps({"address": host.address, "secret": secret.hex()}))
    return Values(host.address, secret), host.peers(ranks.world_size, timeout_s), secret


def _visit(path: Path, ranks: Ranks, timeout_s: float) -> Meeting:
    """Another rank: find rank 0, whose file may be left over from a start that died."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if invitation := read_json(path):
            secret = bytes.fromhex(invitation["secret"])
            host, port = invitation["address"]
            values = Values((host, port), secret)
            with suppress(OSError):
                return values, {0: values.connect("peer", str(ranks.rank))}, secret
        time.sleep(0.05)
    raise TimeoutError(f"rank 0 did not publish its address in {path} in {timeout_s:.0f} s")


class RankStore(dist.Store):  # type: ignore[name-defined, misc]
    """The values that rank 0 keeps, as torch's process groups want them."""

    def __init__(self, values: Values, timeout_s: float) -> None:
        super().__init__()
        self._values = values
        self.set_timeout(timedelta(seconds=timeout_s))

    def set(self, key: str, value: str | bytes) -> None:
        self._ask("set", *_bytes(key, value))

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def add(self, key: str, value: int) -> int:
        return int(self._ask("add", *_bytes(key, str(value)))[0])

    def append(self, key: str, value: str | bytes) -> None:
        self._ask("append", *_bytes(key, value))

    def compare_set(self, key: str, expected: str | bytes, value: str | bytes) -> bytes:
        return self._ask("compare_set", *_bytes(key, expected, value))[0]

    def check(self, keys: list[str]) -> bool:
        return bool(self._ask("check", *_bytes(*keys)))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._wait(keys, self.timeout if timeout is None else timeout)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return self._wait(keys, self.timeout)

    def multi_set(self, keys: list[str], values: list[str | bytes]) -> None:
        self._ask("set", *_bytes(*chain(*zip(keys, values, strict=True))))

    def delete_key(self, key: str) -> bool:
        return bool(self._ask("delete", *_bytes(key)))

    def num_keys(self) -> int:
        return int(self._ask("count")[0])

    # As torch's own code calls them.
    deleteKey, getNumKeys = delete_key, num_keys  # noqa: N815

    def has_extended_api(self) -> bool:
        return True

    def clone(self) -> RankStore:
        return self  # any number of threads may use it

    def _ask(self, verb: str, *words: bytes) -> list[bytes]:
        try:
            return self._values.ask(verb, *words)
        except OSError as exc:
            raise dist.DistNetworkError(f"rank 0 of this allocation is gone: {exc}") from exc

    def _wait(self, keys: list[str], timeout: timedelta) -> list[bytes]:
        answer = self._ask("wait", *_bytes(str(timeout.total_seconds()), *keys))
        if not answer:
            raise dist.DistStoreError(f"waited {timeout} in vain for {', '.join(keys)}")
        return answer[1:]


def _bytes(*words: str | bytes) -> list[bytes]:
    return [word.encode() if isinstance(word, str) else word for word in words]


def prove(group: dist.ProcessGroup | None, ranks: Ranks, secret: bytes, timeout_s: float) -> None:
    """Make sure that at the other end of each of gloo's connections is the rank it should be.

    gloo takes whoever connects first, and what comes over these groups is unpickled. So before
    anything else each rank shows each other that it knows the secret.
    """

    def proofs(pairs: list[tuple[int, int]]) -> torch.Tensor:
        said = [proof(secret, b"%d to %d" % pair) for pair in pairs]
        return torch.frombuffer(bytearray(b"".join(said)), dtype=torch.uint8)

    me, everybody = ranks.rank, range(ranks.world_size)
    sent, expected = proofs([(me, k) for k in everybody]), proofs([(k, me) for k in everybody])
    received = torch.zeros_like(expected)
    work = dist.all_to_all_single(received, sent, group=group, async_op=True)
    work.wait(timedelta(seconds=timeout_s))
    if not torch.equal(received, expected):
        raise PeerLostError("a process that is not of this allocation took the place of a rank")
