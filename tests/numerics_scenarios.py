"""What the ranks of `test_numerics` do; importable, so that it can be sent to processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch_helpers import tiny_model, tiny_trainer, weights_of

from flwr_hpc.train.checkpoint import Checkpoints
from flwr_hpc.train.parallel import full
from flwr_hpc.train.progress import GO, INTERRUPTED
from flwr_hpc.train.rendezvous import Group
from flwr_hpc.train.trainer import Trainer


def trained(group: Group, folder: Path, steps: int = 4, mu: float = 0.0, **options: Any) -> Any:
    """Train and tell the losses, the last gradient norm, held-out loss and the weights."""
    trainer = tiny_trainer(group, **options)
    losses: list[float] = []
    proximal = trainer.proximal(mu) if mu else None
    done = trainer.train(steps, report=lambda _, loss: losses.append(loss()), proximal=proximal)
    held_out = trainer.evaluate()
    return {
        "losses": losses,
        "train_loss": done.loss_sum / done.tokens,
        "last_loss": done.last_loss,
        "tokens": done.tokens,
        "grad_norm": done.last_grad_norm,
        "held_out": held_out.loss,
        "held_out_counts": (held_out.tokens, held_out.sequences),
        "weights": weights_of(trainer, folder / "weights.safetensors", group),
    }


def gradients(group: Group, **options: Any) -> dict[str, Any]:
    """Return the first step's gradients: the first moment is (1 - beta1) times them."""
    trainer = tiny_trainer(group, clip=0.0, **options)
    trainer.train(1)
    return {
        name: full(value).numpy() / 0.1
        for name, value in trainer.tensors().items()
        if name.endswith(".exp_avg")
    }


def in_orders(group: Group, folder: Path, orders: list[int], **options: Any) -> Any:
    """Train order by order; each starts from the file the one before wrote."""
    trainer = tiny_trainer(group, **options)
    for steps in orders:
        trainer.train(steps)
        trainer.save_weights(folder / "weights.safetensors")
        group.broadcast(None)  # the file is there
        with torch.no_grad():  # what is loaded must not be what happened to be there
            for name, value in trainer.tensors().items():
                if name.startswith("model."):
                    value.zero_()
        trainer.evaluate()  # leaves gathered parameters behind, if anything does
        trainer.load_weights(folder / "weights.safetensors")
    return weights_of(trainer, folder / "weights.safetensors", group)


def interrupted(group: Group, folder: Path, at: int, steps: int, **options: Any) -> Any:
    """Train up to a signal, save, start afresh, restore, finish."""
    trainer = tiny_trainer(group, **options)
    trainer.train(2)  # an order before
    done = trainer.train(steps, may_go=_signal_at(trainer, 2 + at, group))
    assert (done.steps, done.ended) == (at, INTERRUPTED)
    save(group, folder / "checkpoints", trainer)
    again = tiny_trainer(group, **options)
    restore(group, folder / "checkpoints", again)
    done = again.train(steps, done)
    assert (done.steps, done.ended) == (steps, GO)
    return weights_of(again, folder / "weights.safetensors", group), done.loss_sum


def uninterrupted(group: Group, folder: Path, steps: int, **options: Any) -> Any:
    trainer = tiny_trainer(group, **options)
    trainer.train(2)
    done = trainer.train(steps)
    return weights_of(trainer, folder / "weights.safetensors", group), done.loss_sum


def save_then_go_on(group: Group, folder: Path, **options: Any) -> Any:
    trainer = tiny_trainer(group, **options)
    trainer.train(3)
    save(group, folder / "checkpoints", trainer)
    trainer.train(2)
    return weights_of(trainer, folder / "weights.safetensors", group)


def restore_then_go_on(group: Group, folder: Path, **options: Any) -> Any:
    trainer = tiny_trainer(group, **options)
    restore(group, folder / "checkpoints", trainer)
    trainer.train(2)
    return weights_of(trainer, folder / "weights.safetensors", group)


def saved_thrice(group: Group, folder: Path) -> list[str]:
    trainer = tiny_trainer(group)
    for _ in range(3):
        trainer.train(1)
        save(group, folder, trainer)
    save(group, folder, trainer)  # the same once more changes nothing
    return sorted(p.name for p in folder.iterdir())


def diverging(group: Group) -> str:
    trainer = tiny_trainer(group, lr=math.inf)
    try:
        trainer.train(4)
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}"
    return ""


def load_error(group: Group, path: Path) -> str:
    trainer = tiny_trainer(group)
    try:
        trainer.load_weights(path)
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}"
    return ""


def hub_directory(group: Group, folder: Path, lora: bool = False, path: str | None = None) -> None:
    """Write what an ``initialize`` order answers with."""
    files = tiny_model(tied=True, lora=lora, path=path).files
    trainer = tiny_trainer(group, lora=lora, path=path)
    trainer.train(2)
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    trainer.save_weights(folder / name)
    if group.ranks.rank == 0:
        for file, text in files.items():
            (folder / file).write_text(text)


def moments(group: Group) -> list[float]:
    """Size of the optimizer's state before and after forgetting it."""
    trainer = tiny_trainer(group)
    trainer.train(1)
    sizes = [_size(trainer)]
    trainer.reset_optimizer()
    return [*sizes, _size(trainer)]


def save(group: Group, folder: Path, trainer: Trainer) -> None:
    meta = {"step": trainer.step}
    Checkpoints(folder, group).save("run-a-000001", trainer.step, trainer.tensors(), meta)


def restore(group: Group, folder: Path, trainer: Trainer) -> None:
    checkpoints = Checkpoints(folder, group)
    saved = checkpoints.newest()
    assert saved is not None
    assert saved.order_id == "run-a-000001"
    checkpoints.load(saved, trainer.tensors())
    trainer.step = saved.meta["step"]


def _signal_at(trainer: Trainer, step: int, group: Group) -> Any:
    """Only the last rank gets the signal; all have to end at the same step."""
    last = group.ranks.rank == group.ranks.world_size - 1
    return lambda: INTERRUPTED if last and trainer.step == step else GO


def _size(trainer: Trainer) -> float:
    values = trainer.tensors().items()
    return sum(float(full(v).abs().sum()) for n, v in values if n.startswith("optimizer."))
