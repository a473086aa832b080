"""What the ranks of `test_numerics` do; importable, so that it can be sent to processes."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed.checkpoint as checkpoint
from flwr.app import Array, ArrayRecord
from safetensors.numpy import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from worlds.train.torch_ranks import tiny_model, tiny_trainer, weights_of

from flwr_hpc.protocol import MEAN_GRADIENT, Order
from flwr_hpc.spool import OrderDir
from flwr_hpc.train.algorithms.base import Algorithm
from flwr_hpc.train.algorithms.fedprox import FedProx
from flwr_hpc.train.algorithms.scaffold import Scaffold
from flwr_hpc.train.optim import gradient
from flwr_hpc.train.parallel import full
from flwr_hpc.train.progress import DivergedError
from flwr_hpc.train.rendezvous import Group
from flwr_hpc.train.state.background import Background
from flwr_hpc.train.state.checkpoint import Checkpoints, DamagedCheckpointError
from flwr_hpc.train.trainer import Trainer
from flwr_hpc.train.weights import write_weights
from flwr_hpc.worker.deadline import Stop
from flwr_hpc.worker.lifeline import RankError
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
    variates, done = Scaffold(trainer, file), None
    if at:
        done = trainer.train(at, algorithms=[variates])
        checkpoints = Checkpoints(folder / "checkpoints", group)
        tensors = trainer.tensors() | variates.tensors()
        checkpoints.save("run-a-000001", at, tensors, _place(trainer))
        trainer = tiny_trainer(group, **options)
        variates = Scaffold(trainer, file)
        saved = checkpoints.newest()
        assert saved is not None
        checkpoints.load(saved, trainer.tensors() | variates.tensors())
        _go_to(trainer, saved.meta)
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


def restore_save_then_go_on(group: Group, folder: Path, **options: Any) -> Any:
    """As `restore_then_go_on`, from a checkpoint of its own of the same state."""
    trainer = tiny_trainer(group, **options)
    restore(group, folder / "checkpoints", trainer)
    if group.ranks.rank == 0:
        shutil.rmtree(folder / "checkpoints")
    group.broadcast(None)
    save(group, folder / "checkpoints", trainer)
    trainer.train(2)
    return weights_of(trainer, folder / "weights.safetensors", group)


def straight_on(group: Group, folder: Path, **options: Any) -> Any:
    trainer = tiny_trainer(group, **options)
    trainer.train(5)
    return weights_of(trainer, folder / "weights.safetensors", group)


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


def staged(group: Group, folder: Path, lora: bool = False) -> dict[str, Any]:
    """Stage an order's end, train on, write it down beside that, and restore it elsewhere."""
    trainer, checkpoints = tiny_trainer(group, lora=lora), Checkpoints(folder / "c", group)
    trainer.train(2)
    file = folder / "order" / "weights.safetensors"
    write_weights = trainer.gather_weights(file)
    write = checkpoints.stage("run-a-000001", 2, trainer.tensors(), _place(trainer), file)
    states = [{n: full(t).numpy() for n, t in trainer.tensors().items()}]
    trainer.train(1)
    background = Background(group)
    background.start(lambda: (write_weights(), write(), None)[-1])
    trainer.train(1)
    background.wait()
    again = tiny_trainer(group, lora=lora)
    saved = checkpoints.newest()
    assert saved is not None
    checkpoints.load(saved, again.tensors(), again.load_weights)
    states.append({n: full(t).numpy() for n, t in again.tensors().items()})
    names = [name for t in saved.path.glob("*.distcp") for name in [t.name]]
    inodes = {path.stat().st_ino for path in (file, saved.path / "weights.safetensors")}
    held = checkpoint.FileSystemReader(saved.path).read_metadata().state_dict_metadata
    return {"states": states, "files": names, "inodes": inodes, "held": sorted(held)}


def failing_in_the_background(group: Group, folder: Path) -> tuple[list[str], list[str]]:
    """Write a file where rank 0 cannot, and then a checkpoint; return what all ranks are told."""
    trainer, checkpoints = tiny_trainer(group), Checkpoints(folder / "c", group)
    (folder / "a file").touch()
    file = folder / "a file" / "weights.safetensors"
    write_weights = trainer.gather_weights(file)
    write = checkpoints.stage("run-a-000001", 1, trainer.tensors(), _place(trainer))
    background, words = Background(group), ""
    background.start(lambda: (background.together(write_weights), background.together(write))[1])
    try:
        background.wait()
    except RankError as exc:
        words = str(exc)
    every: list[Any] = [None] * group.ranks.world_size
    torch.distributed.all_gather_object(every, words)
    return every, sorted(path.name for path in folder.glob("c/*"))


def saved_thrice(group: Group, folder: Path) -> list[str]:
    trainer = tiny_trainer(group)
    for _ in range(3):
        trainer.train(1)
        save(group, folder, trainer)
    save(group, folder, trainer)  # the same once more changes nothing
    return sorted(p.name for p in folder.iterdir())


def damaged(group: Group, folder: Path, file: str) -> tuple[list[str], int, list[str]]:
    """Spoil the newest of two checkpoints; return what is said, the step reached and the names."""
    trainer = tiny_trainer(group)
    for _ in range(2):
        trainer.train(1)
        save(group, folder, trainer)
    if group.ranks.rank == 0:
        for path in (folder / "run-a-000001@0000000002").glob(file):
            path.write_bytes(path.read_bytes()[:9])
    words, again = [], tiny_trainer(group)
    try:
        restore(group, folder, again)
    except DamagedCheckpointError as exc:
        words.append(str(exc))
        restore(group, folder, again)
    again.train(1)
    return words, again.step, sorted(p.name for p in folder.iterdir())


def failing_save(group: Group, folder: Path) -> tuple[str, list[str]]:
    """Save where one rank cannot write; return what is said and what is left."""
    trainer = tiny_trainer(group)
    trainer.train(1)
    write = checkpoint.FileSystemWriter.write_data
    if group.ranks.rank:
        checkpoint.FileSystemWriter.write_data = _fail  # type: ignore[method-assign]
    try:
        save(group, folder, trainer)
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}", sorted(p.name for p in folder.iterdir())
    finally:
        checkpoint.FileSystemWriter.write_data = write  # type: ignore[method-assign]
    return "", []


def _fail(*_: Any) -> Any:
    raise ValueError("no")


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


def seen_on_four_then_two(group: Group, folder: Path, two: bool) -> list[int]:
    """Train two steps, or go on after them; return the first ids of all sequences seen."""
    trainer = tiny_trainer(group, micro_batch=2)
    checkpoints, seen = Checkpoints(folder, group), []
    if two:
        saved = checkpoints.newest()
        assert saved is not None
        checkpoints.load(saved, trainer.tensors())
        _go_to(trainer, saved.meta)
    batch = trainer._corpus.batch
    trainer._corpus.batch = lambda first, count: (
        seen.extend(range(first, first + count)), batch(first, count)
    )[1]  # fmt: skip
    trainer.train(2)
    save(group, folder, trainer)
    every: list[Any] = [None] * group.ranks.world_size
    torch.distributed.all_gather_object(every, seen)
    return sorted(number for numbers in every for number in numbers)


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
    tensors, place = trainer.tensors(), _place(trainer)
    Checkpoints(folder, group).save("run-a-000001", trainer.step, tensors, place)


def restore(group: Group, folder: Path, trainer: Trainer) -> None:
    checkpoints = Checkpoints(folder, group)
    saved = checkpoints.newest()
    assert saved is not None
    assert saved.order_id == "run-a-000001"
    checkpoints.load(saved, trainer.tensors())
    _go_to(trainer, saved.meta)


def _order(options: dict[str, Any]) -> Order:
    return Order("run", "a", 0, "train", options=options)


def _begun(algorithm: Algorithm) -> Algorithm:
    algorithm.begin(_order({}))
    return algorithm


def _place(trainer: Trainer) -> dict[str, int]:
    return {"step": trainer.step, "sequences": trainer.cursor.sequences}


def _go_to(trainer: Trainer, place: dict[str, int]) -> None:
    trainer.step, trainer.cursor.sequences = place["step"], place["sequences"]


def _signal_at(trainer: Trainer, step: int, group: Group) -> Any:
    """Only the last rank gets the signal; all have to end at the same step."""
    last = group.ranks.rank == group.ranks.world_size - 1
    return lambda: Stop.LEAVE if last and trainer.step == step else Stop.NO


def _size(trainer: Trainer) -> float:
    values = trainer.tensors().items()
    return sum(float(full(v).abs().sum()) for n, v in values if n.startswith("optimizer."))
