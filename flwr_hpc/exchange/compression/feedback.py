"""Error feedback: what a lossy codec left out of an update goes with the next one.

e <- gamma e + delta; send Q(e); e <- e - Q(e). Seide et al. 2014 (1-bit SGD); gamma below 1 as in
SparseLoCo (arXiv:2603.08163).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flwr_hpc.exchange.compression.update import Values
from flwr_hpc.exchange.tensorfile import TensorFile, aligned, write_safetensors
from flwr_hpc.exchange.tensors import FLOATS, HALVES, BadPayload, TensorInfo, Tensors, widen
from flwr_hpc.files import publish, read_json

STATE = "feedback.json"
PIECE = 1 << 18  # numbers that are in memory at a time


class Feedback:
    """A site's error, kept in a folder until its next update.

    An order that is encoded again, as after a crash, is given the error that it was given before.
    What the server refuses or never gets is lost, as without feedback.

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

    def corrected(self, order_id: str, tensors: Tensors) -> Tensors:
        """Return trained weights and the error before that order."""
        name = self._before(order_id)
        path = self._folder / f"{name}.safetensors"
        if not name or not path.is_file():
            return tensors
        try:
            return Corrected(tensors, TensorFile(path), self._decay)
        except BadPayload:  # damaged on disk: begin anew rather than stop the site
            return tensors

    def keep(self, order_id: str, meant: Tensors, sent: Tensors, base: Tensors) -> float:
        """Keep what lacks in what was sent for an order; return it as a share of the update."""
        before, squares = self._before(order_id), np.zeros(2)
        floats = [name for name, info in meant.layout.items() if info.dtype in FLOATS]
        layout = aligned({n: TensorInfo("F32", meant.layout[n].shape) for n in floats})
        errors = ((n, _Errors(n, meant, sent, base, squares)) for n in layout)
        write_safetensors(self._folder / f"{order_id}.safetensors", errors, layout)
        publish(self._folder / STATE, json.dumps({"order": order_id, "before": before}))
        for path in self._folder.glob("*.safetensors"):
            if path.stem not in (order_id, before):
                path.unlink(missing_ok=True)
        return float(np.sqrt(squares[0] / squares[1])) if squares[1] > 0 else 0.0

    def _before(self, order_id: str) -> str:
        state = read_json(self._folder / STATE) or {}
        return str(state.get("before" if state.get("order") == order_id else "order") or "")


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
        there = [base] if name in base.layout and base.layout[name].shape == info.shape else []
        self._readers = [tensors.reader(name) for tensors in (meant, sent, *there)]

    def __iter__(self) -> Iterator[Values]:
        for start in range(0, self._size, PIECE):
            whole, sent, *base = (read(slice(start, start + PIECE)) for read in self._readers)
            error = (whole - sent).astype(np.float32)
            self._squares[0] += np.vdot(error, error)
            for values in base:
                update = whole - values
                self._squares[1] += np.vdot(update, update)
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
