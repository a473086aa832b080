"""When to stop replacing allocations that end, and sending orders again; counted in files."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from itertools import takewhile

from flwr_hpc.protocol import Result
from flwr_hpc.spool import AllocationDir, Spool, Verdict, latest_checkpoint

NO_STEP = (
    "it left without a step of this order: after start-up and loading the walltime has to be "
    "long enough for the evaluation before it, one step, and the time kept for writing"
)

STAYS_CANCELLED = "It is not replaced: no more jobs are submitted for this run at this site"
# After a worker that could not write its folder: no small file tells whether a large one fits.
DISK_PAUSE_S, LONGEST_DISK_PAUSE_S = 60.0, 1800.0


def check_disk(spool: Spool, now_s: float) -> None:
    """Raise the error of the last allocations' disk for a while, longer each time.

    Parameters
    ----------
    spool : Spool
    now_s : float
        Unix seconds.
    """
    verdicts = [alloc.verdict.read() for alloc in reversed(spool.allocations())]
    lost = list(takewhile(lambda v: v is not None and v.why == "disk", verdicts))
    last = lost[0] if lost else None
    if last is not None:
        pause_s = min(DISK_PAUSE_S * 2.0 ** min(len(lost) - 1, 30), LONGEST_DISK_PAUSE_S)
        if 0 <= now_s - last.at_s < pause_s:
            raise OSError(errno.ENOSPC, last.reason)


def repeated_startup_failure(spool: Spool, retries: int) -> Verdict | None:
    """Return the last verdict if allocations keep ending before they are ready, else None.

    Each is held against one answer only: asked again, the site tries again.
    """
    lost: list[tuple[AllocationDir, Verdict]] = []
    for alloc in reversed(spool.allocations()):
        verdict = alloc.verdict.read()
        if verdict is None or verdict.was_ready or verdict.consequence == "replace":
            break
        if alloc.is_reported:
            break
        lost.append((alloc, verdict))
    if not lost or (lost[0][1].consequence == "retry" and len(lost) <= retries):
        return None
    for alloc, _ in lost:
        alloc.mark_reported()
    return lost[0][1]


def fail_if_retries_are_spent(spool: Spool, order_id: str, retries: int) -> Result | None:
    """Write and return a failed result if the order's allocations ended too often, else None."""
    verdicts = [a.verdict.read() for a in _allocations_with(spool, order_id)]
    ends = [verdict for verdict in verdicts if verdict is not None]
    bad = [verdict for verdict in ends if verdict.consequence != "replace"]
    closed = sum(verdict.why == "closed" for verdict in ends)
    # One may close just as the order comes in.
    lost = _count_fruitless(ends, order_id) + max(0, closed - 1)
    final = bool(bad) and bad[-1].consequence in ("fail", "fatal")
    if not final and lost <= retries:
        return None
    reason = bad[-1].reason if bad else NO_STEP
    text = reason if final else f"gave up after {lost} allocations. The last one: {reason}"
    fatal = final and bad[-1].consequence == "fatal"
    result = Result(order_id, "failed", error=text, fatal=fatal)
    spool.order(order_id).write_result(result)
    return result


def fail_if_cancelled(spool: Spool, order_id: str) -> Result | None:
    """Write and return a failed result if somebody cancelled the site's last job, else None."""
    allocations = spool.allocations()
    verdict = allocations[-1].verdict.read() if allocations else None
    if verdict is None or verdict.why != "removed":
        return None
    result = Result(order_id, "failed", error=f"{verdict.reason}\n{STAYS_CANCELLED}")
    spool.order(order_id).write_result(result)
    return result


def _count_fruitless(ends: Sequence[Verdict], order_id: str) -> int:
    """Count the losses after which the order was no further than before."""
    count, before = 0, ""
    for verdict in ends:
        reached = latest_checkpoint(verdict.checkpoints, order_id)
        count += verdict.consequence != "replace" and reached <= before
        before = max(before, reached)
    return count


def reset_order(spool: Spool, order_id: str) -> None:
    """Make a failed order as good as new, for an allocation that never had it."""
    for alloc in _allocations_with(spool, order_id):
        alloc.release()  # its worker takes no order twice
        alloc.unassign(order_id)
    spool.order(order_id).set_result_aside()


def _allocations_with(spool: Spool, order_id: str) -> list[AllocationDir]:
    return [alloc for alloc in spool.allocations() if order_id in alloc.inbox()]
