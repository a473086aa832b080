"""The site's own update in flight: the next order may start from where it will lead."""

from __future__ import annotations

from torch import Tensor

from flwr_hpc.protocol import LOCAL_UPDATE_SHARE, Order
from flwr_hpc.train.algorithms.base import Algorithm, Write
from flwr_hpc.train.trainer import Trainer


class LocalUpdate(Algorithm):
    """Remembers, shard by shard, how the last order moved the weights.

    An order that was submitted while another one was trained holds weights that lack the
    other's update. With `LOCAL_UPDATE_SHARE` in its options it starts from its weights plus that
    share of the update, and remembers its own; the reply says so, so that the server can tell
    what the site really started from.

    Parameters
    ----------
    trainer : Trainer
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._start: list[Tensor] = []
        self._moved: list[Tensor] = []
        self._seq = -1

    def begin(self, order: Order) -> dict[str, float]:
        """Move the weights just read; return what the server has to know."""
        share = order.options.get(LOCAL_UPDATE_SHARE)
        if share is None:
            self.forget()
            return {}
        shards = self._trainer.shards()
        used = float(share) if self._moved else 0.0
        for shard, moved in zip(shards, self._moved, strict=False):
            shard.add_(moved, alpha=used)
        self._start = [shard.clone() for shard in shards]
        return {"local_update_share": used, "local_update_seq": float(self._seq)} if used else {}

    def resume(self, order: Order) -> None:
        """Forget: another job has begun the order."""
        self.forget()

    def end(self, order: Order, *_: object) -> list[Write]:
        """Remember how the order has moved the weights."""
        if not self._start:
            return []
        pairs = zip(self._trainer.shards(), self._start, strict=True)
        self._moved, self._seq = [shard - start for shard, start in pairs], order.seq
        self._start = []
        return []

    def forget(self) -> None:
        """Give the memory back: the next order starts from its weights as they are."""
        self._start, self._moved, self._seq = [], [], -1
