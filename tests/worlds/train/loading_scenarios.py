"""What the ranks of `test_loading` do; importable, so that it can be sent to processes."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from worlds.train.torch_ranks import tiny_model, tiny_trainer, weights_of

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
