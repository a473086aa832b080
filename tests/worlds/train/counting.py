"""A trainer that only counts, and checkpoints in memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from flwr_hpc.data.batches import DataCursor
from flwr_hpc.exchange.compression.encoder import Start
from flwr_hpc.protocol import Order
from flwr_hpc.spool import OrderDir
from flwr_hpc.train.algorithms.base import Algorithm, Write
from flwr_hpc.train.progress import DivergedError, OrderProgress
from flwr_hpc.train.state.checkpoint import DamagedCheckpointError, Saved
from flwr_hpc.train.weights import Staged
from flwr_hpc.worker.deadline import Deadline, Stop

Array = np.ndarray


class CountingTrainer:
    """Each step adds one to a state that checkpoints hold, and to weights."""

    def __init__(self) -> None:
        self.step, self.state = 0, {"moments": np.zeros(())}
        self.weights = np.zeros(())
        self.cursor, self.diverges = DataCursor(), 0
        self.lr_scale = 1.0

    def train(
        self, steps: int, so_far: OrderProgress, should_stop: Any, report: Any, algorithms: Any
    ) -> OrderProgress:
        done = dataclasses.replace(so_far, stopped=Stop.NO)
        if self.diverges:
            self.diverges, self.step = self.diverges - 1, self.step + 1
            raise DivergedError("training diverged: in step 1")
        while done.steps < steps and not (stop := should_stop()):
            done.steps += 1
            self.step += 1
            self.cursor.advance(1, 4)
            self.state["moments"] += 1
            self.weights += 1
            for algorithm in algorithms:
                algorithm.gradients()
        return done if done.steps == steps else dataclasses.replace(done, stopped=stop)

    def tensors(self, with_weights: bool = True) -> dict[str, Array]:
        return self.state | ({"weights": self.weights} if with_weights else {})

    def reset_optimizer(self) -> None:
        self.state["moments"].fill(0)

    def set_residual(self, path: Path | None) -> None: ...

    def load_weights(self, path: Path, *_: object) -> None:
        """Take them as they are."""

    def layout(self, *_: object) -> dict[str, Any]:
        return {}

    def shards(self) -> list[Any]:
        return []

    def start(self, order_id: str, weights: Path | None) -> Start | None:
        return Start(order_id, weights) if weights else None

    def stage_weights(self, path: Path, names: object, start: Start | None) -> Staged:
        """A codec's payloads where they are an update of something."""
        return Staged(path, lambda: "sha", {"sent_share": 0.1} if start else {})


class Counter(Algorithm):
    """Counts the steps of an order, over all jobs that worked on it."""

    def __init__(self) -> None:
        self.count = np.zeros(())
        self.calls: list[str] = []

    def begin(self, order: Order) -> dict[str, float]:
        self.calls.append("begin")
        return {"begun": 1.0}

    def resume(self, order: Order) -> None:
        self.calls.append("resume")

    def gradients(self) -> None:
        self.count += 1

    def end(self, order: Order, folder: OrderDir, steps: int) -> list[Write]:
        words = f"{self.count:g} in {steps}"
        return [lambda: {"extra_arrays": {"gradient": words}}]

    def tensors(self) -> dict[str, Any]:
        return {"count": self.count}


def counted(trainer: Any, order: Order, extra_arrays: Any) -> list[Algorithm]:
    return [Counter()] if order.options.get("count") else []


class Answers(Deadline):
    """Gives these answers, and then its last one."""

    def __init__(self, *answers: Stop) -> None:
        self.answers = list(answers or [Stop.NO])

    def should_stop(self, next_s: float = 0.0) -> Stop:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class Shelf:
    """Checkpoints in memory, shared by the allocations of a site."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[dict[str, Any], dict[str, Array]]] = {}
        self.loads = 0
        self.full = False
        self.damaged: set[str] = set()

    def save(self, order_id: str, step: int, tensors: dict[str, Array], meta: Any) -> None:
        self.stage(order_id, step, tensors, meta)()

    def stage(self, order_id: str, step: int, tensors: dict[str, Array], meta: Any) -> Any:
        state = meta, {k: v.copy() for k, v in tensors.items()}

        def write() -> None:
            if self.full:
                raise OSError(28, "No space left on device")
            self.kept[f"{order_id}@{step:010d}"] = state

        return write

    def newest(self, order_id: str | None = None) -> Saved | None:
        all_ = [Saved(Path(name), meta) for name, (meta, _) in self.kept.items()]
        found = [saved for saved in all_ if order_id in (None, saved.order_id)]
        return max(found, key=lambda saved: saved.place, default=None)

    def load(self, saved: Saved, tensors: dict[str, Array]) -> None:
        self.loads += 1
        if saved.path.name in self.damaged:
            del self.kept[saved.path.name]
            raise DamagedCheckpointError(f"checkpoint {saved.path.name} is damaged")
        kept = self.kept[saved.path.name][1]
        for name, tensor in tensors.items():
            tensor[...] = kept[name]
