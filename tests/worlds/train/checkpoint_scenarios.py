"""What ranks do that save, stop and go on; importable, so that it can be sent to processes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as checkpoint
from worlds.train.torch_ranks import tiny_trainer, weights_of

from flwr_hpc.train.parallel.tensors import full
from flwr_hpc.train.rendezvous import Group
from flwr_hpc.train.state.background import Background
from flwr_hpc.train.state.checkpoint import Checkpoints, DamagedCheckpointError
from flwr_hpc.train.trainer import Trainer
from flwr_hpc.worker.deadline import Stop
from flwr_hpc.worker.lifeline import RankError


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
    return _go_on(group, folder, trainer)


def restore_then_go_on(group: Group, folder: Path, **options: Any) -> Any:
    trainer = tiny_trainer(group, **options)
    restore(group, folder / "checkpoints", trainer)
    return _go_on(group, folder, trainer)


def restore_save_then_go_on(group: Group, folder: Path, **options: Any) -> Any:
    """As `restore_then_go_on`, from a checkpoint of its own of the same state."""
    trainer = tiny_trainer(group, **options)
    restore(group, folder / "checkpoints", trainer)
    if group.ranks.rank == 0:
        shutil.rmtree(folder / "checkpoints")
    group.broadcast(None)
    save(group, folder / "checkpoints", trainer)
    return _go_on(group, folder, trainer)


def straight_on(group: Group, folder: Path, **options: Any) -> Any:
    trainer = tiny_trainer(group, **options)
    trainer.train(3)
    return _go_on(group, folder, trainer)


def _go_on(group: Group, folder: Path, trainer: Trainer) -> dict[str, Any]:
    """Train two steps; return their losses, the last one's gradient norm, and the weights."""
    losses: list[float] = []
    done = trainer.train(2, report=lambda _, loss: losses.append(loss()))
    weights = weights_of(trainer, folder / "weights.safetensors", group)
    return {"losses": losses, "grad_norm": done.last_grad_norm, "weights": weights}


def staged(group: Group, folder: Path, with_weights: bool, **options: Any) -> dict[str, Any]:
    """Stage an order's end, train on, write it down beside that, and restore it elsewhere."""
    trainer, checkpoints = tiny_trainer(group, **options), Checkpoints(folder / "c", group)
    trainer.train(2)
    tensors = trainer.tensors(with_weights)
    write = checkpoints.stage("run-a-000001", 2, tensors, place(trainer))
    states = [{n: full(t).numpy() for n, t in tensors.items()}]
    trainer.train(1)
    background = Background(group)
    background.start(write)
    trainer.train(1)
    background.wait()
    again = tiny_trainer(group, **options)
    saved = checkpoints.newest()
    assert saved is not None
    checkpoints.load(saved, again.tensors(with_weights))
    states.append({n: full(t).numpy() for n, t in again.tensors(with_weights).items()})
    return {"states": states, "files": [path.name for path in saved.path.glob("*.distcp")]}


def failing_in_the_background(
    group: Group, folder: Path, taken: str, **options: Any
) -> tuple[list[str], list[str]]:
    """Write a file where one rank cannot, and then a checkpoint; return what all ranks are told."""
    trainer, checkpoints = tiny_trainer(group, **options), Checkpoints(folder / "c", group)
    (folder / taken).mkdir(exist_ok=True)  # where a file is to be
    file = folder / "weights.safetensors"
    staged = trainer.stage_weights(file)
    write = checkpoints.stage("run-a-000001", 1, trainer.tensors(), place(trainer))
    background, words = Background(group), ""
    background.start(lambda: (background.together(staged.publish), background.together(write))[1])
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


def seen_on_four_then_two(group: Group, folder: Path, two: bool) -> list[int]:
    """Train two steps, or go on after them; return the first ids of all sequences seen."""
    trainer = tiny_trainer(group, micro_batch=2)
    checkpoints, seen = Checkpoints(folder, group), []
    if two:
        saved = checkpoints.newest()
        assert saved is not None
        checkpoints.load(saved, trainer.tensors())
        go_to(trainer, saved.meta)
    get = trainer._batches.get  # of these, not of the one that is made ahead
    trainer._batches.get = lambda first, then: (  # type: ignore[method-assign]
        seen.extend(range(first, first + trainer._per_step)), get(first, then)
    )[1]  # fmt: skip
    trainer.train(2)
    save(group, folder, trainer)
    every: list[Any] = [None] * group.ranks.world_size
    torch.distributed.all_gather_object(every, seen)
    return sorted(number for numbers in every for number in numbers)


def save(group: Group, folder: Path, trainer: Trainer) -> None:
    checkpoints = Checkpoints(folder, group)
    checkpoints.save("run-a-000001", trainer.step, trainer.tensors(), place(trainer))


def restore(group: Group, folder: Path, trainer: Trainer) -> None:
    checkpoints = Checkpoints(folder, group)
    saved = checkpoints.newest()
    assert saved is not None
    assert saved.order_id == "run-a-000001"
    checkpoints.load(saved, trainer.tensors())
    go_to(trainer, saved.meta)


def place(trainer: Trainer) -> dict[str, int]:
    return {"step": trainer.step, "sequences": trainer.cursor.sequences}


def go_to(trainer: Trainer, place: dict[str, int]) -> None:
    trainer.step, trainer.cursor.sequences = place["step"], place["sequences"]


def _signal_at(trainer: Trainer, step: int, group: Group) -> Any:
    """Only the last rank gets the signal; all have to end at the same step."""
    last = group.ranks.rank == group.ranks.world_size - 1
    return lambda: Stop.LEAVE if last and trainer.step == step else Stop.NO
