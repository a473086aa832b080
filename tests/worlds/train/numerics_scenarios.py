"""What the ranks of `test_numerics` do; importable, so that it can be sent to processes."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from flwr.app import Array, ArrayRecord
from safetensors.numpy import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from worlds.train.checkpoint_scenarios import go_to, place
from worlds.train.torch_ranks import tiny_model, tiny_trainer, weights_of

from flwr_hpc.protocol import MEAN_GRADIENT, Order
from flwr_hpc.spool import OrderDir
from flwr_hpc.train.algorithms.base import Algorithm
from flwr_hpc.train.algorithms.fedprox import FedProx
from flwr_hpc.train.algorithms.scaffold import Scaffold
from flwr_hpc.train.optim import gradient
from flwr_hpc.train.parallel.tensors import full, holders, local
from flwr_hpc.train.progress import DivergedError
from flwr_hpc.train.rendezvous import Group
from flwr_hpc.train.state.checkpoint import Checkpoints
from flwr_hpc.train.trainer import Trainer
from flwr_hpc.train.weights import write_weights
from strategies.diloco import DiLoCo


def trained(group: Group, folder: Path, steps: int = 4, mu: float = 0.0, **options: Any) -> Any:
    """Train and tell the losses, the last gradient norm, held-out loss and the weights."""
    trainer = tiny_trainer(group, **options)
    losses: list[float] = []
    pull = [_begun(FedProx(trainer, mu))] if mu else []
    done = trainer.train(steps, report=lambda _, loss: losses.append(loss()), algorithms=pull)
    held_out = trainer.evaluate()
    return {
        "losses": losses,
        "train_loss": done.loss_sum / done.tokens,
        "last_loss": done.last_loss,
        "tokens": done.tokens,
        "grad_norm": done.last_grad_norm,
        "sequences": (done.sequences, trainer.cursor.sequences),
        "held_out": held_out.loss,
        "held_out_counts": (held_out.tokens, held_out.sequences),
        "weights": weights_of(trainer, folder / "weights.safetensors", group),
    }


def path_of_torch(_: Group) -> str:
    """Return where this process has torch from."""
    return torch.__path__[0]


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
    variates, done = Scaffold(trainer, file), None
    if at:
        done = trainer.train(at, algorithms=[variates])
        checkpoints = Checkpoints(folder / "checkpoints", group)
        tensors = trainer.tensors() | variates.tensors()
        checkpoints.save("run-a-000001", at, tensors, place(trainer))
        trainer = tiny_trainer(group, **options)
        variates = Scaffold(trainer, file)
        saved = checkpoints.newest()
        assert saved is not None
        checkpoints.load(saved, trainer.tensors() | variates.tensors())
        go_to(trainer, saved.meta)
    trainer.train(steps, done, algorithms=[variates])
    for write in variates.end(_order({MEAN_GRADIENT: True}), OrderDir(folder), steps):
        write()
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
    pull = [_begun(FedProx(trainer, mu))]
    weights = [weights_of(trainer, folder / "weights.safetensors", group)]
    trainer.train(1, algorithms=pull)
    weights.append(weights_of(trainer, folder / "weights.safetensors", group))
    trainer.train(1, algorithms=pull)
    moments = {
        name.removeprefix("optimizer.").removesuffix(".exp_avg"): full(value).numpy()
        for name, value in trainer.tensors().items()
        if name.endswith(".exp_avg")
    }
    return *weights, moments


def replicas_differ(group: Group, **options: Any) -> list[str]:
    """Train; return which parameters are not the same on all ranks that hold them whole."""
    trainer = tiny_trainer(group, **options)
    trainer.train(2)
    own = {n: local(p).detach().numpy() for n, p in trainer.trained.items() if holders(p, 2) == 2}
    every: list[Any] = [None] * group.ranks.world_size
    torch.distributed.all_gather_object(every, own)
    assert own
    return [name for name in own if (every[0][name] != every[1][name]).any()]


def trainer_error(group: Group, **options: Any) -> str:
    try:
        tiny_trainer(group, **options)
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}"
    return ""


def step_flops(group: Group, checkpointing: str) -> tuple[int, int]:
    """Return the FLOPs of a step's products, and how many tensors autograd itself keeps for it."""
    model = tiny_model(checkpointing=checkpointing).model
    model.train()
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += 1
        return tensor

    ids = torch.arange(64).reshape(4, 16) % 60
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    return counter.get_total_flops(), kept


def kept_bytes(group: Group, **options: Any) -> int:
    """Return how many bytes autograd keeps for the backward pass of a step, weights too."""
    trainer = tiny_trainer(group, **options)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = max(storage.nbytes(), kept.get(storage.data_ptr(), 0))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        trainer.train(1)
    return sum(kept.values())


def diverging(group: Group) -> tuple[str, int]:
    """Return how training at an infinite learning rate ends, and after how many steps."""
    trainer = tiny_trainer(group, lr=math.inf)
    try:
        trainer.train(100)
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}", trainer.step
    return "", trainer.step


def poisoned(group: Group, folder: Path, poison: float) -> Any:
    """Take a step, and another whose gradients are spoilt on one rank; return both states."""
    trainer = tiny_trainer(group)
    trainer.train(1)
    states = [{n: full(t).numpy() for n, t in trainer.tensors().items()}]
    parameter = trainer._parameters()[0]
    last = group.ranks.rank == group.ranks.world_size - 1
    spoil: Any = SimpleNamespace(
        gradients=lambda: gradient(parameter).mul_(poison if last else 1.0)
    )
    words = ""
    try:
        trainer.train(3, algorithms=[spoil])
    except DivergedError as exc:
        words = str(exc)
    return *states, {n: full(t).numpy() for n, t in trainer.tensors().items()}, words


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


def _order(options: dict[str, Any]) -> Order:
    return Order("run", "a", 0, "train", options=options)


def _begun(algorithm: Algorithm) -> Algorithm:
    algorithm.begin(_order({}))
    return algorithm


def _size(trainer: Trainer) -> float:
    values = trainer.tensors().items()
    return sum(float(full(v).abs().sum()) for n, v in values if n.startswith("optimizer."))
