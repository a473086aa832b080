"""The weights that a site keeps from order to order, where only some are merged with each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from flwr_hpc.protocol import Order
from flwr_hpc.train.trainer import Trainer


def missing_start(order: Order, last: str) -> str | None:
    """Say that an order goes on from weights that are not here, or None.

    Parameters
    ----------
    order : Order
    last : str
        Id of the order that has left the weights that are here.
    """
    if order.merges is None:
        return None
    wanted = dataclasses.replace(order, seq=int(order.options.get("after", -1))).id
    if last == wanted:
        return None
    found = f"those of {last}" if last else "none"
    return f"it goes on from the weights of order {wanted}, and here are {found}: send all of them"


class LocalWeights:
    """Reads what comes with orders; beside mixtures it keeps the global values, on the CPU.

    What the site was sent last of every tensor is the version that its order starts from: so it
    can be evaluated without being sent whole. It is forgotten with the job.

    Parameters
    ----------
    trainer : Trainer
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._given: dict[str, Tensor] = {}

    def read(self, order: Order, path: Path) -> None:
        """Load all weights, or merge those that came into the site's own."""
        if order.merges is None:
            self.forget()
            self._trainer.load_weights(path)
            self._note(self._shards() if order.returns is not None else {})
        else:
            self._merge(path, order.merges, float(order.options.get("alpha", 0.0)))

    def _merge(self, path: Path, names: list[str], alpha: float) -> None:
        self._trainer.layout(names)  # refuses names that are not the model's
        shards = {name: shard for name, shard in self._shards().items() if name in names}
        own = {name: shard.clone() for name, shard in shards.items()} if alpha else {}
        self._trainer.load_weights(path, names)
        self._note(shards if self._given else {})
        for name, mine in own.items():
            shards[name].mul_(1.0 - alpha).add_(mine, alpha=alpha)

    def forget(self) -> None:
        """Give the memory back."""
        self._given.clear()

    @contextmanager
    def version(self, order: Order) -> Iterator[bool]:
        """Have the trainer hold the version that an order starts from, if that is here, whole.

        After the block the trainer has this site's weights again.
        """
        if order.merges is None or not self._given:
            yield order.merges is None  # it has just been read
            return
        with self.kept():
            for name, shard in self._shards().items():
                shard.copy_(self._given[name])
            yield True

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put this site's weights back after the block; meanwhile they are on the CPU."""
        own = [shard.to("cpu", copy=True) for shard in self._trainer.shards()]
        try:
            yield
        finally:
            for shard, mine in zip(self._trainer.shards(), own, strict=True):
                shard.copy_(mine)

    def _shards(self) -> dict[str, Tensor]:
        return dict(zip(self._trainer.layout(), self._trainer.shards(), strict=True))

    def _note(self, shards: dict[str, Tensor]) -> None:
        self._given |= {name: shard.to("cpu", copy=True) for name, shard in shards.items()}
