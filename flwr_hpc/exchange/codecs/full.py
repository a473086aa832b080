"""Full weights: a payload is a safetensors file."""

from __future__ import annotations

from pathlib import Path

from flwr_hpc.exchange.codec import Codec
from flwr_hpc.exchange.tensorfile import TensorFile, save
from flwr_hpc.exchange.tensors import Tensors


class FullWeights(Codec):
    """Every tensor as it is; what is a file already is linked, not written anew."""

    def encode(self, tensors: Tensors, target: Path, base: Tensors | None = None) -> str:
        return save(tensors, target)

    def decode(self, path: Path, base: Tensors | None = None) -> TensorFile:
        return TensorFile(path)
