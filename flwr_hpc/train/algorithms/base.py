"""What a learning algorithm may do in an order: five hooks, of which most need one or two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from flwr_hpc.protocol import Order
from flwr_hpc.spool import OrderDir

# Writes something of an order, beside training; returns what its result has to say of that.
Write = Callable[[], dict[str, Any]]


class Algorithm:
    """An algorithm of one order, called on every rank alike; each hook does nothing by itself."""

    def begin(self, order: Order) -> dict[str, float]:
        """Begin with the weights that the order starts from; return metrics for its result."""
        return {}

    def resume(self, order: Order) -> None:
        """Begin in place of another job: a checkpoint then fills weights and `tensors`."""
        self.begin(order)

    def gradients(self) -> None:
        """Change the gradients of a step, before they are clipped."""

    def end(self, order: Order, folder: OrderDir, steps: int) -> list[Write]:
        """End after the last step, `steps` over all jobs; return what else is to be written."""
        return []

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint of the order holds besides; loading fills them in place."""
        return {}
