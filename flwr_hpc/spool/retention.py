"""What of a site's folder may go: a model's size times the rounds would fill any disk.

Whoever calls these holds the spool's lock, and may be killed at any moment.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from flwr_hpc.spool.folders import RECEIVED, Spool, received_ns

UNSETTLED = 4  # finished orders that stay where no order says which of them are settled


def settled(spool: Spool, run_key: str) -> int:
    """Return below which number the server needs no order of a run any more, by its word."""
    orders = (folder.order()[0] for folder in spool.orders())
    return max((order.settled for order in orders if order.run_key == run_key), default=0)


def prune(spool: Spool) -> None:
    """Delete settled orders, all finished ones but the last few, and weights that none needs.

    What was received after the newest order was published stays: its order is about to be.
    """
    finished = [(folder, folder.order()[0]) for folder in spool.orders() if folder.has_result]
    below = {key: settled(spool, key) for key in {order.run_key for _, order in finished}}
    for number, (folder, order) in enumerate(finished):
        if number >= UNSETTLED or order.seq < below[order.run_key]:
            for alloc in spool.allocations():  # a requeued job reads its inbox again
                alloc.unassign(folder.id)
            folder.remove()
    left = spool.orders()
    needed: set[Path | None] = set()
    for folder in left:
        needed |= {folder.order()[1], *folder.extra_arrays().values()}
    newest_ns = max((folder.published_ns for folder in left), default=0)
    for weights in spool.received_weights():
        if weights not in needed and received_ns(weights) < newest_ns:
            weights.with_suffix(RECEIVED).unlink(missing_ok=True)
            weights.unlink(missing_ok=True)


def clear(spool: Spool) -> None:
    """Delete all weights, and all checkpoints but the newest: run and jobs are over."""
    folders = [spool.weights_folder, *(folder.path for folder in spool.orders())]
    # And drafts, of what was killed.
    kinds = ("*.safetensors", f"*{RECEIVED}", "*.payload", ".*.tmp")
    for path in [p for f in folders for kind in kinds for p in f.glob(kind)]:
        path.unlink(missing_ok=True)
    whole = sorted(spool.complete_checkpoints(), key=lambda name: int(name.rpartition("@")[2]))
    halves = (path for kind in ("tmp", "old") for path in spool.checkpoints.glob(f".*.{kind}"))
    for path in [*(spool.checkpoints / name for name in whole[:-1]), *halves]:
        shutil.rmtree(path, ignore_errors=True)
