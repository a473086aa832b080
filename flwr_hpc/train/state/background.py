"""What is written while training goes on: copies of it, and the thread that writes them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from flwr_hpc.train.parallel.tensors import local
from flwr_hpc.train.rendezvous import Group
from flwr_hpc.worker.lifeline import Cause, RankError, cause_of

T = TypeVar("T")


class Background:
    """Does one piece of work at a time in a thread of its own, on every rank alike.

    What fails there is raised on all ranks by the next call of `check` or `wait`: rank 0 takes
    part in all that is written, so its failure is everybody's.

    Parameters
    ----------
    group : Group
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="background")
        self._work: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Do it, after what was started before."""
        self._work = self._thread.submit(work)

    def together(self, part: Callable[[], T]) -> T:
        """Do a part of the work, from its thread; raise on all ranks what fails on rank 0.

        So no rank goes on to a part in which it would wait for one that has failed.
        """
        try:
            done, error = part(), None
        except BaseException as exc:  # torch's own derive from that
            error = exc
        failed = self._group.broadcast(told(error), self._group.background)
        if error:
            raise error
        if failed:
            raise RankError(failed[0], cause=failed[1])
        return done

    @property
    def failed(self) -> bool:
        """Whether the work on this rank has ended in vain."""
        return self._work is not None and self._work.done() and bool(self._work.exception())

    def check(self) -> None:
        """Raise what has failed by now; a collective call."""
        self._raise(self._error() if self.failed else None)

    def wait(self) -> None:
        """Wait for the work, and raise what failed; a collective call."""
        error = self._error()
        self._work = None
        self._raise(error)

    def drain(self) -> None:
        """Wait for the work of this rank, however it ends."""
        self._error()

    def _error(self) -> BaseException | None:
        return self._work.exception() if self._work else None

    def _raise(self, error: BaseException | None) -> None:
        if failure := self._group.broadcast(told(error)):
            self._work = None
            words, cause = failure
            raise RankError(words, cause=cause) from error


def told(error: BaseException | None) -> tuple[str, Cause] | None:
    """Return what other ranks have to know of an error."""
    if error is None:
        return None
    words = str(error) if isinstance(error, RankError) else f"{type(error).__name__}: {error}"
    return words, cause_of(error)


class Staging:
    """Copies of this rank's shards in host memory, in buffers that are used again.

    They cost as much host memory as the shards; of a GPU's it is pinned, so that copying them takes
    a fraction of the time that writing them does.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of the same kind, sharded alike."""
        copies = {name: self._copied(name, tensor.detach()) for name, tensor in tensors.items()}
        if any(_on_gpu(local(tensor)) for tensor in tensors.values()):
            torch.accelerator.synchronize()
        return copies

    def _copied(self, name: str, tensor: Tensor) -> Tensor:
        part = local(tensor)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != part.shape:
            buffer = torch.empty_like(part, device="cpu", pin_memory=_on_gpu(part))
            self._buffers[name] = buffer
        buffer.copy_(part, non_blocking=True)
        if not isinstance(tensor, DTensor):
            return buffer
        # `from_local` would move it to the mesh's device.
        return DTensor(buffer, tensor._spec, requires_grad=False)  # type: ignore[no-untyped-call]


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"
