"""What of a site's folder may go: a model's size times the rounds would fill any disk.

Whoever calls these holds the spool's lock, and may be killed at any moment.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from flwr_hpc.protocol import Order
from flwr_hpc.spool.folders import RECEIVED, OrderDir, Spool, received_ns

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
    _drop_received(spool, spool.orders())


def make_room(spool: Spool, order: Order, keep: Collection[Path] = ()) -> None:
    """Delete the weights of orders that are settled by the word of one that is about to come.

    Those orders stay, with their results, until it is published: what is settled is known then.

    Parameters
    ----------
    spool : Spool
    order : Order
    keep : collection of Path
        Received weights that it needs.
    """
    orders = spool.orders()
    taken = [folder for folder in orders if folder.has_result and _is_settled(folder, order)]
    _unlink((folder.path for folder in taken), "*.safetensors", "*.payload")
    _drop_received(spool, (folder for folder in orders if folder not in taken), keep)


def _unlink(folders: Iterable[Path], *kinds: str) -> None:
    for path in [path for folder in folders for kind in kinds for path in folder.glob(kind)]:
        path.unlink(missing_ok=True)


def _is_settled(folder: OrderDir, by: Order) -> bool:
    order = folder.order()[0]
    return order.run_key == by.run_key and order.seq < by.settled


def _drop_received(spool: Spool, orders: Iterable[OrderDir], keep: Collection[Path] = ()) -> None:
    """Delete received weights that none of the orders needs."""
    needed: set[Path | None] = {*keep}
    newest_ns = max((folder.published_ns for folder in spool.orders()), default=0)
    for folder in orders:
        needed |= {folder.order()[1], *folder.extra_arrays().values()}
    for weights in spool.received_weights():
        if weights not in needed and received_ns(weights) < newest_ns:
            weights.with_suffix(RECEIVED).unlink(missing_ok=True)
            weights.unlink(missing_ok=True)


def clear(spool: Spool) -> None:
    """Delete all weights, and all checkpoints but the newest: run and jobs are over."""
    folders = [spool.weights_folder, *(folder.path for folder in spool.orders())]
    # And drafts, of what was killed.
    _unlink(folders, "*.safetensors", f"*{RECEIVED}", "*.payload", ".*.tmp")
    whole = sorted(spool.complete_checkpoints(), key=lambda name: int(name.rpartition("@")[2]))
    halves = (path for kind in ("tmp", "old") for path in spool.checkpoints.glob(f".*.{kind}"))
    for path in [*(spool.checkpoints / name for name in whole[:-1]), *halves]:
        shutil.rmtree(path, ignore_errors=True)
