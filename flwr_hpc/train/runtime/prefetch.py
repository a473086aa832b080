"""The next batch, made by a thread while the device works on this one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from flwr_hpc.data.batches import Batch


@dataclass
class Prefetch:
    """Batches by their place in the stream; the one expected next is ready or on its way.

    A batch depends on its place alone: what was made in vain (another job's checkpoint moved the
    cursor) is thrown away, and the cursor knows nothing of it.
    """

    make: Callable[[int], Batch]  # By the place of its first sequence
    _first: int = -1
    _next: Future[Batch] | None = None
    _thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="batches")
    )

    def get(self, first: int, then: int) -> Batch:
        """Return the batch at `first`, and begin the one at `then`."""
        ready = self._next if first == self._first else None
        batch = ready.result() if ready else self.make(first)
        self._first, self._next = then, self._thread.submit(self.make, then)
        return batch
