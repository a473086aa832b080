"""Error feedback: what a lossy codec left out of an update goes with the next one.

e <- gamma e + delta; send Q(e); e <- e - Q(e). Seide et al. 2014 (1-bit SGD); gamma below 1 as in
SparseLoCo (arXiv:2603.08163).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flwr_hpc.exchange.compression.update import Values, is_packed
from flwr_hpc.exchange.shards.cuts import Cut, Sliced
from flwr_hpc.exchange.shards.manifest import (
    SUFFIX,
    Manifest,
    Shard,
    WeightFiles,
    shard_file,
)
from flwr_hpc.exchange.tensorfile import write_safetensors
from flwr_hpc.exchange.tensors import FLOATS, HALVES, BadPayload, Layout, TensorInfo, Tensors, widen
from flwr_hpc.files import publish, read_json

STATE = "feedback.json"
PIECE = 1 << 18  # numbers that are in memory at a time


@dataclass(frozen=True)
class KeptError:
    """The error of some rows, written."""

    shard: Shard
    squares: tuple[float, float]  # Sums over the error and over the update


class Feedback:
    """A site's error, kept in a folder in shards until its next update.

    Any number of ranks may keep it, each its rows, and any other number go on with it. An order
    that is encoded again, as after a crash, is given the error that it was given before, and no
    error is given twice: where an allocation still writes one order while its successor ends the
    next, one of them goes without. What the server refuses or never gets is lost, as without
    feedback.

    Parameters
    ----------
    folder : Path
        On a disk that outlives jobs.
    decay : float
        gamma, in (0, 1].
    """

    def __init__(self, folder: Path, decay: float = 1.0) -> None:
        self._folder = folder
        self._decay = decay

    def begin(self, order_id: str) -> str:
        """Return the order whose error an order is given, or an empty name; delete old ones."""
        state = read_json(self._folder / STATE) or {}
        last, taker = str(state.get("order") or ""), str(state.get("taken_by") or order_id)
        if last == order_id:
            former = str(state["before"])
        else:
            former = last if taker == order_id else ""
            publish(self._folder / STATE, json.dumps({**state, "taken_by": taker}))
        kept = {former, last, taker} - {order_id}
        for error in self._folder.glob("*/"):  # also what a killed job has left of this one
            if error.name not in kept:
                shutil.rmtree(error, ignore_errors=True)
        return former

    def corrected(self, former: str, tensors: Tensors, cut: Cut) -> Tensors:
        """Return rows of trained weights with the error that a former order has left of them."""
        if not former:
            return tensors
        try:
            error = WeightFiles.open(self._error(former).with_suffix(SUFFIX)).whole
        except (OSError, BadPayload):  # damaged on disk: begin anew rather than stop the site
            return tensors
        return Corrected(tensors, Sliced(error, cut), self._decay)

    def keep(
        self,
        order_id: str,
        part: tuple[int, int],
        meant: Tensors,
        sent: Tensors,
        base: Tensors,
        cut: Cut,
    ) -> KeptError | None:
        """Write what lacks in what was sent of some rows; None where all of it was.

        Parameters
        ----------
        order_id : str
        part : tuple of int
            Number of the shard, and how many there are.
        meant : Tensors
            The rows, corrected.
        sent : Tensors
            What the server makes of them.
        base : Tensors
            What both are updates of.
        cut : mapping
            Which rows these are.
        """
        layout = {
            name: TensorInfo("F32", info.shape)
            for name, info in meant.layout.items()
            if is_packed(name, info, base.layout)
        }
        if not layout:
            return None
        squares = np.zeros(2)
        errors = ((name, _Errors(name, meant, sent, base, squares)) for name in layout)
        path = shard_file(self._error(order_id), *part)
        sha256 = write_safetensors(path, errors, layout)
        rows = {name: cut[name] for name in layout}
        shard = Shard(sha256, path.stat().st_size, rows, path.name)
        return KeptError(shard, (float(squares[0]), float(squares[1])))

    def publish(
        self, order_id: str, former: str, layout: Layout, parts: Sequence[KeptError]
    ) -> float:
        """Give the next order the error that all ranks have kept; return its share of the update.

        Parameters
        ----------
        order_id : str
        former : str
            Order whose error it was given, which stays: it may have to be encoded again.
        layout : Layout
            Of all that was sent.
        parts : sequence of KeptError
        """
        kept = {name for part in parts for name in part.shard.rows}
        errors = {n: TensorInfo("F32", info.shape) for n, info in layout.items() if n in kept}
        manifest = Manifest(errors, [part.shard for part in parts])
        manifest.write(self._error(order_id).with_suffix(SUFFIX))
        publish(self._folder / STATE, json.dumps({"order": order_id, "before": former}))
        error, update = (sum(part.squares[k] for part in parts) for k in (0, 1))
        return float(np.sqrt(error / update)) if update > 0 else 0.0

    def _error(self, order_id: str) -> Path:
        """Name what would be an order's error in one file."""
        return self._folder / order_id / "error.safetensors"


class _Errors:
    """What lacks of a tensor in what was sent, some at a time; `squares` are added to."""

    dtype = np.dtype(np.float32)

    def __init__(
        self,
        name: str,
        meant: Tensors,
        sent: Tensors,
        base: Tensors,
        squares: NDArray[np.float64],
    ) -> None:
        info, self._squares = meant.layout[name], squares
        self.shape, self._size = info.shape, info.size
        self._readers = [tensors.reader(name) for tensors in (meant, sent, base)]

    def __iter__(self) -> Iterator[Values]:
        for start in range(0, self._size, PIECE):
            whole, sent, base = (read(slice(start, start + PIECE)) for read in self._readers)
            error, update = (whole - sent).astype(np.float32, copy=False), whole - base
            self._squares += np.vdot(error, error), np.vdot(update, update)
            yield error


class Corrected(Tensors):
    """Tensors and an error, added where that has one of the same shape."""

    def __init__(self, tensors: Tensors, error: Tensors, decay: float) -> None:
        self._tensors, self._error, self._decay = tensors, error, np.float32(decay)
        self.layout = {
            name: TensorInfo("F32" if info.dtype in HALVES else info.dtype, info.shape)
            if self._is_corrected(name)
            else info
            for name, info in tensors.layout.items()
        }

    def raw(self, name: str) -> NDArray[Any]:
        """Return the sum."""
        if not self._is_corrected(name):
            return self._tensors.raw(name)
        return self._sum(name, self._tensors.raw(name), self._error.raw(name))

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Return some rows of the sum, of which alone it is taken."""
        rows = self._tensors.rows(name, start, stop)
        if not self._is_corrected(name):
            return rows
        return self._sum(name, rows, self._error.rows(name, start, stop))

    def reader(self, name: str) -> Callable[[slice], NDArray[Any]]:
        """Return what reads ranges of the sum."""
        read = self._tensors.reader(name)
        if not self._is_corrected(name):
            return read
        stored, error = self.layout[name].stored, self._error.reader(name)
        return lambda part: (read(part) + self._decay * error(part)).astype(stored, copy=False)

    def _sum(self, name: str, bits: NDArray[Any], error: NDArray[Any]) -> NDArray[Any]:
        total = widen(bits, self._tensors.layout[name].dtype) + self._decay * error
        return np.asarray(total, self.layout[name].stored)

    def _is_corrected(self, name: str) -> bool:
        info, known = self._tensors.layout[name], self._error.layout.get(name)
        return known is not None and known.shape == info.shape and info.dtype in FLOATS
