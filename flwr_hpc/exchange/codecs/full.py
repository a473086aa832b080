"""Full weights: a payload is a safetensors file."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from flwr_hpc.exchange.codec import Codec
from flwr_hpc.exchange.tensorfile import TensorFile, file_size_range, save
from flwr_hpc.exchange.tensors import Layout, Tensors


class FullWeights(Codec):
    """Every tensor as it is; what is a file already is linked, not written anew."""

    def encode(self, tensors: Tensors, target: Path, base: Tensors | None = None) -> str:
        return save(tensors, target)

    def decode(
        self, path: Path, base: Tensors | None = None, layout: Layout | None = None
    ) -> TensorFile:
        return TensorFile(path, layout=layout)

    def is_plain(self, relative: bool) -> bool:
        return True

    def size_range(self, layout: Layout, accept: Collection[str] = ()) -> tuple[int, int]:
        return file_size_range(layout, accept)
