"""What the ranks of `test_numerics` do; importable, so that it can be sent to processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord
from safetensors.numpy import load_file, save_file
from worlds.torch_ranks import tiny_model, tiny_trainer, weights_of

from flwr_hpc.train.checkpoint import Checkpoints
from flwr_hpc.train.parallel import full
from flwr_hpc.train.rendezvous import Group
from flwr_hpc.train.trainer import Trainer
from flwr_hpc.train.weights import write_weights
from flwr_hpc.worker.deadline import Stop
from strategies.diloco import DiLoCo


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


def with_variates(group: Group, folder: Path, at: int = 0, steps: int = 3, **options: Any) -> Any:
    """Train with a correction, interrupted after `at` steps; return its shape in all things.

    The weights at the end, the mean gradient, and the correction, which is drawn here.
    """
    trainer = tiny_trainer(group, **options)
    file = folder / "correction.safetensors"
    draw = torch.Generator().manual_seed(3)
    given = {n: torch.randn(i.shape, generator=draw) * 1e-2 for n, i in trainer.layout().items()}
    if group.ranks.rank == 0:
        write_weights(file, trainer.layout(), given.values())
    group.broadcast(None)  # the file is there
    variates, done = trainer.variates(file), None
    if at:
        done = trainer.train(at, variates=variates)
        meta = {"step": trainer.step}
        checkpoints = Checkpoints(folder / "checkpoints", group)
        checkpoints.save("run-a-000001", at, trainer.tensors() | variates.tensors(), meta)
        trainer = tiny_trainer(group, **options)
        variates = trainer.variates(file)
        saved = checkpoints.newest()
        assert saved is not None
        checkpoints.load(saved, trainer.tensors() | variates.tensors())
        trainer.step = saved.meta["step"]
    trainer.train(steps, done, variates=variates)
    trainer.save_gradient(folder / "gradient.safetensors", variates, steps)
    mean = load_file(folder / "gradient.safetensors") if group.ranks.rank == 0 else {}
    weights = weights_of(trainer, folder / "weights.safetensors", group)
    return {
        "weights": weights,
        "mean": mean,
        "correction": {n: g.numpy() for n, g in given.items()},
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


def under_diloco(group: Group, folder: Path, orders: list[int], **options: Any) -> Any:
    """Train order by order, with the outer step of DiLoCo (eta 1, beta 0) after each."""
    trainer = tiny_trainer(group, **options)
    server = DiLoCo(outer_lr=1.0, momentum=0.0)
    server.arrays = _record(weights_of(trainer, folder / "weights.safetensors", group))
    for number, steps in enumerate(orders):
        trainer.train(steps)
        trained = _record(weights_of(trainer, folder / "weights.safetensors", group))
        stepped = dict(server.aggregate(number + 1, [trained], [1.0]))
        server.arrays = _record(stepped)
        save_file(stepped, folder / "global.safetensors")
        trainer.load_weights(folder / "global.safetensors")
    return {name: array.numpy() for name, array in server.arrays.items()}


def _record(weights: dict[str, Any]) -> ArrayRecord:
    return ArrayRecord({name: Array(tensor) for name, tensor in weights.items()})


def two_steps_with_proximal(group: Group, folder: Path, mu: float) -> Any:
    """Return the weights before and after the first step, and the first moments after two."""
    trainer = tiny_trainer(group, clip=0.0)
    proximal = trainer.proximal(mu)
    weights = [weights_of(trainer, folder / "weights.safetensors", group)]
    trainer.train(1, proximal=proximal)
    weights.append(weights_of(trainer, folder / "weights.safetensors", group))
    trainer.train(1, proximal=proximal)
    moments = {
        name.removeprefix("optimizer.").removesuffix(".exp_avg"): full(value).numpy()
        for name, value in trainer.tensors().items()
        if name.endswith(".exp_avg")
    }
    return *weights, moments


def interrupted(group: Group, folder: Path, at: int, steps: int, **options: Any) -> Any:
    """Train up to a signal, save, start afresh, restore, finish."""
    trainer = tiny_trainer(group, **options)
    trainer.train(2)  # an order before
    done = trainer.train(steps, should_stop=_signal_at(trainer, 2 + at, group))
    assert (done.steps, done.stopped) == (at, Stop.LEAVE)
    save(group, folder / "checkpoints", trainer)
    again = tiny_trainer(group, **options)
    restore(group, folder / "checkpoints", again)
    done = again.train(steps, done)
    assert (done.steps, done.stopped) == (steps, Stop.NO)
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
    return lambda: Stop.LEAVE if last and trainer.step == step else Stop.NO


def _size(trainer: Trainer) -> float:
    values = trainer.tensors().items()
    return sum(float(full(v).abs().sum()) for n, v in values if n.startswith("optimizer."))
