"""Shards as the ranks of a job write them."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

from flwr_hpc.exchange.compression.encoder import Encoder, Start
from flwr_hpc.exchange.shards.cuts import Cut, Rows, Sliced, row_count
from flwr_hpc.exchange.shards.manifest import Manifest, Shard, shard_file
from flwr_hpc.exchange.tensorfile import save
from flwr_hpc.exchange.tensors import Layout, Tensors


def even_cuts(layout: Layout, count: int) -> list[Cut]:
    """Cut as FSDP does: as many rows for each, the last ones fewer or none."""
    cuts: list[dict[str, Rows]] = [{} for _ in range(count)]
    for name, info in layout.items():
        rows = row_count(info)
        step = -(-rows // count)
        for k, cut in enumerate(cuts):
            if k * step < rows:
                cut[name] = (k * step, min(rows, (k + 1) * step))
    return [cut for cut in cuts if cut]


def random_cuts(layout: Layout, count: int, rng: random.Random) -> list[Cut]:
    """Cut anywhere, each tensor among other shards, as meshes of several dimensions do."""
    cuts: list[dict[str, Rows]] = [{} for _ in range(count)]
    for name, info in layout.items():
        rows = row_count(info)
        ends = sorted({0, rows, *(rng.randint(0, rows) for _ in range(rng.randrange(count)))})
        for k, piece in zip(rng.sample(range(count), count), pairwise(ends), strict=False):
            cuts[k][name] = piece
    return [cut for cut in cuts if cut]


def write_shards(path: Path, tensors: Tensors, cuts: list[Cut]) -> tuple[Path, str]:
    """Write shards and their manifest; return that and its sha256."""
    shards = []
    for number, cut in enumerate(cuts):
        file = shard_file(path, number, len(cuts))
        sha256 = save(Sliced(tensors, cut), file)
        shards.append(Shard(sha256, file.stat().st_size, cut, file.name))
    manifest = path.with_suffix(".json")
    return manifest, Manifest(tensors.layout, shards).write(manifest)


def encode_shards(
    encoder: Encoder, path: Path, tensors: Tensors, cuts: list[Cut], start: Start | None
) -> tuple[Path, str, dict[str, float]]:
    """Encode shards, one after the other; return their manifest, its sha256 and metrics."""
    parts = [
        encoder.encode(path, Sliced(tensors, cut), cut, start, (number, len(cuts)))
        for number, cut in enumerate(cuts)
    ]
    sha256, metrics = encoder.publish(path, tensors.layout, parts, start)
    return path.with_suffix(".json"), sha256, metrics
