"""What the ranks of `test_loading` do; importable, so that it can be sent to processes."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from worlds.train.torch_ranks import tiny_model, tiny_trainer, weights_of

from flwr_hpc.errors import UserError
from flwr_hpc.train import weights
from flwr_hpc.train.parallel.sharding import meshes, shard
from flwr_hpc.train.rendezvous import Group


def growth(group: Group, path: Path, small: Path) -> dict[str, float]:
    """Return how many bytes this rank's own memory has grown, as shares of the float32 model."""
    _loaded(group, small)  # what is imported and allocated once
    return _loaded(group, path)


def _loaded(group: Group, path: Path) -> dict[str, float]:
    gc.collect()
    before = _own_bytes()
    model = tiny_model(path=str(path)).model
    whole = 4.0 * sum(p.numel() for p in model.parameters())
    built = _own_bytes()
    over = meshes(group.ranks.world_size, group.device)
    shard(model, over, group.device, "fp32", one_unit_below=0)
    kinds = {p.dtype for p in model.parameters()}
    assert kinds == {torch.float32}, kinds
    return {"built": (built - before) / whole, "sharded": (_own_bytes() - before) / whole}


def _own_bytes() -> int:
    """Return the memory that is of no file."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["RssAnon"].split()[0])


def trained(group: Group, folder: Path, path: Path, **options: Any) -> dict[str, Any]:
    """Train a checkpoint; return losses and weights."""
    trainer = tiny_trainer(group, path=str(path), **options)
    losses: list[float] = []
    trainer.train(4, report=lambda _, loss: losses.append(loss()))
    return {
        "losses": losses, "weights": weights_of(trainer, folder / "weights.safetensors", group),
    }  # fmt: skip


def bytes_read(group: Group, folder: Path, **options: Any) -> list[list[int]]:
    """Return of each rank how many bytes it read and checked of a file, and how many it holds."""
    trainer, path = tiny_trainer(group, **options), folder / "weights.safetensors"
    trainer.save_weights(path)
    group.broadcast(None)
    check, read = weights.check_values, [0]

    def counted(name: str, bits: Any, *args: Any) -> None:
        read[0] += bits.nbytes
        check(name, bits, *args)

    weights.check_values = counted
    try:
        trainer.load_weights(path)
    finally:
        weights.check_values = check
    held = sum(4 * shard.numel() for shard in trainer.shards())
    every: list[list[int]] = [[]] * group.ranks.world_size
    torch.distributed.all_gather_object(every, [read[0], held])
    return every


def refusals(group: Group, folder: Path, row: int, value: float, **options: Any) -> list[str]:
    """Spoil one number of a file; return what the loading of it says on every rank."""
    trainer, path = tiny_trainer(group, **options), folder / "weights.safetensors"
    trainer.save_weights(path)
    if group.ranks.rank == 0:
        tensors = load_file(path)
        tensors["model.embed_tokens.weight"][row, 3] = value
        save_file(tensors, path)
    group.broadcast(None)
    words = "taken"
    try:
        trainer.load_weights(path)
    except UserError as exc:
        words = str(exc)
    every = [""] * group.ranks.world_size
    torch.distributed.all_gather_object(every, words)
    return every
