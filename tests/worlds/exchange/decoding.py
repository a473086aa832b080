"""What a server makes of payloads as they lie in an order's folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flwr_hpc.exchange.codec import make_codec
from flwr_hpc.exchange.shards.cuts import Joined, Sliced, slice_layout
from flwr_hpc.exchange.shards.manifest import Manifest, WeightFiles


def decoded(codec: object, path: Path, base: Path) -> dict[str, np.ndarray]:
    """Return the weights of a manifest of payloads, which are relative to those in `base`."""
    made, version, manifest = make_codec(codec), WeightFiles.open(base).whole, Manifest.read(path)
    assert manifest.base == base.stem
    parts = []
    for shard in manifest.shards:
        there, layout = Sliced(version, shard.rows), slice_layout(manifest.layout, shard.rows)
        parts.append((made.decode(path.parent / shard.file, there, layout), shard.rows))
    whole = Joined(parts, manifest.layout)
    return {name: whole.tensor(name) for name in whole.layout}
