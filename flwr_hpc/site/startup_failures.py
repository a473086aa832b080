"""When to stop replacing allocations that end; counted in files, so by any process."""

from __future__ import annotations

from collections.abc import Sequence

from flwr_hpc.protocol import Result
from flwr_hpc.site.monitor import verdict
from flwr_hpc.site.outcomes import Verdict
from flwr_hpc.spool import AllocationDir, Spool

NO_STEP = (
    "it left without a step of this order: after start-up and loading the walltime has to be "
    "long enough for the evaluation before it, one step, and the time kept for writing"
)


def startup_failures_in_a_row(spool: Spool, retries: int) -> Verdict | None:
    """Return the last verdict if allocations keep ending before they are ready, else None.

    Each is held against one answer only: asked again, the site tries again.
    """
    lost: list[tuple[AllocationDir, Verdict]] = []
    for alloc in reversed(spool.allocations()):
        how = verdict(alloc)
        if how is None or how.ready or how.then == "free":
            break
        if (alloc.path / "reported").exists():
            break
        lost.append((alloc, how))
    if not lost or (lost[0][1].then == "again" and len(lost) <= retries):
        return None
    for alloc, _ in lost:
        (alloc.path / "reported").touch()
    return lost[0][1]


def give_up(spool: Spool, order_id: str, retries: int) -> Result | None:
    """Write and return a failed result if the order's allocations ended too often, else None."""
    allocations = _with(spool, order_id)
    ends = [how for alloc in allocations if (how := verdict(alloc)) is not None]
    bad = [how for how in ends if how.then != "free"]
    closed = sum(how.why == "closed" for how in ends)
    # One that closed just as the order came in is nobody's fault.
    lost = _fruitless(ends, order_id) + max(0, closed - 1)
    final = bool(bad) and bad[-1].then in ("fail", "fatal")
    if not final and lost <= retries:
        return None
    reason = bad[-1].reason if bad else NO_STEP
    text = reason if final else f"gave up after {lost} allocations. The last one: {reason}"
    result = Result(order_id, "failed", error=text, fatal=final and bad[-1].then == "fatal")
    spool.order(order_id).write_result(result)
    return result


def _fruitless(ends: Sequence[Verdict], order_id: str) -> int:
    """Count the losses after which the order was no further than before."""
    count, before = 0, ""
    for how in ends:
        reached = max([n for n in how.checkpoints if n.rpartition("@")[0] == order_id], default="")
        count += how.then != "free" and reached <= before
        before = max(before, reached)
    return count


def forget(spool: Spool, order_id: str) -> None:
    """Make a failed order as good as new, for an allocation that knows nothing of it."""
    for alloc in _with(spool, order_id):
        alloc.release()  # its worker takes no order twice
        (alloc.path / "inbox" / order_id).unlink()
    folder = spool.order(order_id).path
    (folder / "result.json").replace(folder / "result.failed.json")


def _with(spool: Spool, order_id: str) -> list[AllocationDir]:
    return [alloc for alloc in spool.allocations() if order_id in alloc.inbox()]
