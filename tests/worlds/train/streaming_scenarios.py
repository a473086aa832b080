"""What the ranks of `test_streaming` do: orders of fragments, carried out by the real trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.numpy import load_file
from worlds.train.torch_ranks import TRAIN, tiny_trainer, weights_of

from flwr_hpc.config.schema import DataConfig
from flwr_hpc.protocol import Order, Result
from flwr_hpc.spool import OrderDir
from flwr_hpc.train.metrics import Meter
from flwr_hpc.train.order import OrderRunner
from flwr_hpc.train.rendezvous import Group
from flwr_hpc.train.state.background import Background
from flwr_hpc.train.state.checkpoint import Checkpoints
from flwr_hpc.train.state.site_state import SiteState
from flwr_hpc.train.weights import write_weights
from flwr_hpc.worker.deadline import Deadline, Stop
from flwr_hpc.worker.phase_timer import PhaseTimer

ALPHA = 0.25


class Site:
    """A site's allocation: one order after the other, and its files."""

    def __init__(self, group: Group, folder: Path, **options: Any) -> None:
        self.group, self.folder = group, folder
        trainer = tiny_trainer(group, **options)
        reporter: Any = SimpleNamespace(set_progress=lambda *_: None, progressed=lambda: None)
        meter = Meter(PhaseTimer(), reporter, group, TRAIN, DataConfig(), 1.0)
        checkpoints = Checkpoints(folder / "checkpoints", group)
        state = SiteState(trainer, checkpoints, Background(group), TRAIN, meter)
        self.runner = OrderRunner(state, files={}, deadline=Deadline())
        self.runner.restore()
        names = sorted(trainer.layout())
        self.parts = names[::2], names[1::2]

    def run(self, seq: int, given: Path | None, steps: int = 1, **fields: Any) -> Result | None:
        kind = fields.pop("kind", "train")
        order = Order("run", "a", seq, kind, steps=steps, **fields)
        result = self.runner.run(order, given, self.order(seq))
        if result is not None:
            self.runner.publish(self.order(seq), result)
            self.runner.background.wait()
        return result

    def order(self, seq: int) -> OrderDir:
        return OrderDir(self.folder / "orders" / str(seq))

    def merge(self, seq: int, given: Path, after: int) -> Result | None:
        """Merge the first fragment, train, and return the second one."""
        fields: dict[str, Any] = {"options": {"after": after, "alpha": ALPHA}, "evaluate": True}
        here, there = map(list, self.parts)
        return self.run(seq, given, 2, merges=here, returns=there, **fields)

    def each_step(self, ask: Callable[[], Stop | None]) -> None:
        """Have a function called before each step; what it returns may end the order."""
        self.runner.deadline.should_stop = lambda _: ask() or Stop.NO  # type: ignore[assignment, method-assign, misc]

    def weights(self) -> dict[str, Any]:
        return weights_of(self.runner.trainer, self.folder / "now.safetensors", self.group)

    def draw(self, name: str, names: Any, seed: int) -> Path:
        """Write some tensors as the server might send them."""
        trainer, path = self.runner.trainer, self.folder / f"{name}.safetensors"
        generator = torch.Generator().manual_seed(seed)
        layout = trainer.layout(names)
        given = [torch.randn(i.shape, generator=generator) * 0.1 for i in layout.values()]
        if self.group.ranks.rank == 0:
            write_weights(path, layout, given)
        self.group.broadcast(None)  # the file is there
        return path


def in_fragments(group: Group, folder: Path, **options: Any) -> dict[str, Any]:
    """Two orders of a site that keeps its weights, with an evaluation of others in between."""
    site = Site(group, folder, **options)
    whole = site.draw("whole", None, 1)
    first = site.run(0, whole, returns=list(site.parts[0]))
    kept = site.weights()
    site.run(1, site.draw("other", None, 2), kind="evaluate")
    unharmed = site.weights()
    given = site.draw("given", site.parts[0], 3)
    refused = site.merge(2, given, after=7)
    started: list[Any] = []
    site.each_step(lambda: None if started else started.append(site.weights()))
    second = site.merge(3, given, after=0)
    assert first is not None
    assert second is not None
    found: dict[str, Any] = {
        "states": [first.state, refused.state if refused else None, second.state],
        "error": refused.error if refused else "",
        "kept": kept, "unharmed": unharmed, "merged": started[0], "end": site.weights(),
    }  # fmt: skip
    found["held_out"] = second.metrics["held_out_loss"]
    site.runner.trainer.load_weights(whole)
    site.runner.trainer.load_weights(given, site.parts[0])
    found["of the version"] = site.runner.trainer.evaluate().loss
    if group.ranks.rank == 0:
        found["given"] = load_file(given)
        found["returned"] = [load_file(site.order(seq).weights) for seq in (0, 3)]
        found["bytes"] = [site.order(seq).weights.stat().st_size for seq in (0, 3)]
    return found


def interrupted(group: Group, folder: Path, **options: Any) -> dict[str, Any]:
    """The second order is interrupted after a step; a successor ends it."""
    site = Site(group, folder, **options)
    site.run(0, site.draw("whole", None, 1), returns=list(site.parts[0]))
    given = site.draw("given", site.parts[0], 3)
    answers = [Stop.NO, Stop.LEAVE]
    site.each_step(lambda: answers.pop(0))
    assert site.merge(3, given, after=0) is None
    successor = Site(group, folder, **options)
    assert successor.merge(3, given, after=0) is not None
    return successor.weights()


def taken_over(group: Group, folder: Path, **options: Any) -> dict[str, Any]:
    """The job dies in the second order, which leaves nothing; another one begins it again."""
    site = Site(group, folder, **options)
    site.run(0, site.draw("whole", None, 1), returns=list(site.parts[0]))
    given = site.draw("given", site.parts[0], 3)
    successor = Site(group, folder, **options)
    successor.run(1, site.draw("other", None, 2), kind="evaluate")
    result = successor.merge(3, given, after=0)
    assert result is not None
    assert "held_out_loss" not in result.metrics  # nobody here knows the version any more
    return successor.weights()
