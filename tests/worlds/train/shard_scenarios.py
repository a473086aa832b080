"""What the ranks of `test_shards` do; importable, so that it can be sent to processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from worlds.exchange.decoding import decoded
from worlds.train.torch_ranks import read_back, tiny_trainer

from flwr_hpc.exchange.compression.encoder import make_encoder
from flwr_hpc.exchange.shards.manifest import Manifest
from flwr_hpc.train.parallel import tensors
from flwr_hpc.train.parallel.tensors import full
from flwr_hpc.train.rendezvous import Group
from flwr_hpc.train.trainer import Trainer


def _trainer(group: Group, **options: Any) -> Trainer:
    trainer = tiny_trainer(group, shards_above_mb=0.0, **options)
    trainer.train(1)  # adapters begin with zeros
    return trainer


def written(group: Group, folder: Path, **options: Any) -> dict[str, Any]:
    """Write shards, with nothing gathered; return what they make up, and what it should be."""
    trainer = _trainer(group, **options)
    gather, tensors.DTensor.full_tensor = tensors.DTensor.full_tensor, None  # type: ignore[assignment, method-assign]
    try:
        staged = trainer.stage_weights(folder / "weights.safetensors")
        trainer.train(1)
        sha256 = staged.publish()
    finally:
        tensors.DTensor.full_tensor = gather  # type: ignore[method-assign]
    expected = _trainer(group, **options)
    whole = {name: full(t).numpy() for name, t in expected.exchanged.items()}
    if group.ranks.rank:
        return {}
    manifest = Manifest.read(staged.path)
    return {
        "found": read_back(staged.path), "expected": whole, "sha256": sha256,
        "bytes": [shard.bytes for shard in manifest.shards],
        "names": sorted(path.name for path in folder.iterdir()),
    }  # fmt: skip


def taken_over(group: Group, folder: Path, **options: Any) -> dict[str, Any]:
    """Load what other ranks have written, train, and write it in the same place."""
    trainer = tiny_trainer(group, **options)
    found = {}
    for name in ("weights.json", "weights.safetensors"):
        if (folder / name).exists():
            trainer.load_weights(folder / name)
            found = {n: full(t).numpy() for n, t in trainer.exchanged.items()}
    group.broadcast(None)
    path = trainer.stage_weights(folder / "weights.safetensors")
    path.publish()
    group.broadcast(None)
    return {"loaded": found, "names": sorted(p.name for p in folder.iterdir())}


def spoiled(group: Group, folder: Path) -> list[str]:
    """Cut one shard off; return what all ranks say of it."""
    trainer = _trainer(group)
    trainer.save_weights(folder / "weights.safetensors")
    if group.ranks.rank == 0:
        shard = folder / "weights-00001-of-00002.safetensors"
        shard.write_bytes(shard.read_bytes()[:-4])
    group.broadcast(None)
    words = "taken"
    try:
        trainer.load_weights(folder / "weights.json")
    except Exception as exc:
        words = f"{type(exc).__name__}: {exc}"
    every = [""] * group.ranks.world_size
    torch.distributed.all_gather_object(every, words)
    return every


def shapes(group: Group) -> dict[str, tuple[int, ...]]:
    """Return those of the weights that travel."""
    return {name: info.shape for name, info in tiny_trainer(group).layout().items()}


def encoded(
    group: Group, folder: Path, order: str, base: Path, codec: list[str], **options: Any
) -> dict[str, Any]:
    """Send the weights of ``order.safetensors`` as an update of `base`; return what arrives."""
    encoder = make_encoder(codec, 1.0, folder / "feedback")
    trainer = tiny_trainer(group, encoder=encoder, **options)
    trainer.load_weights(folder / f"{order}.safetensors")
    start = trainer.start(order, base)
    staged = trainer.stage_weights(folder / order / "weights.safetensors", start=start)
    trainer.load_weights(base)  # training goes on
    sha256 = staged.publish()
    if group.ranks.rank:
        return {}
    error = read_back(folder / "feedback" / order / "error.json")
    payloads = [shard.file for shard in Manifest.read(staged.path, sha256).shards]
    return {
        "sent": decoded(codec, staged.path, base), "error": error, "payloads": payloads,
        "names": sorted(path.name for path in staged.path.parent.iterdir()),
        **staged.metrics,
    }  # fmt: skip
