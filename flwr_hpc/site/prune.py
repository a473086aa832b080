"""Old orders and weights are deleted: a model's size times the rounds would fill any disk."""

from __future__ import annotations

from flwr_hpc.spool import Spool


def prune(spool: Spool, keep: int = 4) -> None:
    """Delete all finished orders but the last `keep`, and weights that no order needs.

    Among the weights the newest `keep` stay too: their order may not be written yet.
    """
    finished = [order for order in spool.orders() if order.has_result]
    for order in finished[keep:]:
        for alloc in spool.allocations():  # a requeued job reads its inbox again
            alloc.unassign(order.id)
        order.remove()
    needed = {
        path for left in spool.orders() for path in (left.order()[1], *left.extra_arrays().values())
    }
    for weights in spool.received_weights()[keep:]:
        if weights not in needed:
            weights.unlink(missing_ok=True)
