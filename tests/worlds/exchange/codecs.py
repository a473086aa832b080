"""Codecs and a store of a newcomer: selected by the import path of their class, nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import IO

import numpy as np

from flwr_hpc.exchange.codec import Codec
from flwr_hpc.exchange.store import Reference, Store
from flwr_hpc.exchange.tensorfile import TensorFile, aligned, sha256_of, write_safetensors
from flwr_hpc.exchange.tensors import FLOATS, Layout, TensorInfo, Tensors
from flwr_hpc.files import draft


class Half(Codec):
    """Every float in float16."""

    tolerance = 1e-3
    dtypes = ("F16",)

    def encode(self, tensors: Tensors, target: Path, base: Tensors | None = None) -> str:
        layout = aligned(
            {
                name: TensorInfo("F16", info.shape) if info.dtype in FLOATS else info
                for name, info in tensors.layout.items()
            }
        )
        return write_safetensors(
            target, ((n, tensors.tensor(n).astype(i.stored)) for n, i in layout.items()), layout
        )

    def decode(
        self, path: Path, base: Tensors | None = None, layout: Layout | None = None
    ) -> Tensors:
        return TensorFile(path, layout=layout)


class Xor(Codec):
    """The bits that differ from the base's, or all of them where there is none."""

    relative = True

    def encode(self, tensors: Tensors, target: Path, base: Tensors | None = None) -> str:
        layout = aligned(tensors.layout)
        return write_safetensors(target, ((n, _xor(tensors, base, n)) for n in layout), layout)

    def decode(
        self, path: Path, base: Tensors | None = None, layout: Layout | None = None
    ) -> Tensors:
        return _Xored(TensorFile(path, layout=layout), base)


class _Xored(Tensors):
    def __init__(self, payload: TensorFile, base: Tensors | None) -> None:
        self.payload, self.base, self.layout = payload, base, payload.layout

    def raw(self, name: str) -> np.ndarray:
        return _xor(self.payload, self.base, name)


def _xor(tensors: Tensors, base: Tensors | None, name: str) -> np.ndarray:
    bits = tensors.raw(name)
    if base is None or not bits.size:
        return bits
    both = [np.ascontiguousarray(b).reshape(-1).view(np.uint8) for b in (bits, base.raw(name))]
    return np.bitwise_xor(*both).view(bits.dtype).reshape(bits.shape)


class Drawer(Store):
    """A plain folder, ``worlds.exchange.codecs.Drawer://FOLDER``."""

    def _path(self, ref: Reference) -> Path:
        return Path(self.url.partition("://")[2]) / ref.key

    def put(self, path: Path, folder: str = "shared", sha256: str | None = None) -> Reference:
        ref = Reference.of(folder, sha256 or sha256_of(path), path.stat().st_size)
        with draft(self._path(ref)) as temporary:
            shutil.copy(path, temporary)
        return ref

    def size(self, ref: Reference) -> int | None:
        path = self._path(ref)
        return path.stat().st_size if path.exists() else None

    def open(self, ref: Reference) -> IO[bytes]:
        return self._path(ref).open("rb")

    def delete(self, ref: Reference) -> None:
        self._path(ref).unlink(missing_ok=True)

    def sweep(self) -> None:
        raise NotImplementedError
