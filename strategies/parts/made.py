"""Records whose tensors are made when they are asked for, out of others that may be lazy, too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord

from strategies.parts.rules import Tensor


class MadeArray(Array):
    """A Flower array whose values are computed anew by each `numpy`; nothing is kept.

    Parameters
    ----------
    like : Array
        Has the same shape and dtype.
    make : callable
        Returns the values, the same ones each time.
    """

    def __init__(self, like: Array, make: Callable[[], Tensor]) -> None:
        self.dtype, self.shape, self.stype = like.dtype, like.shape, "numpy.ndarray"
        self._make = make

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The array in numpy's own format, as a plain `Array` would hold it."""
        return self._plain().data

    def numpy(self) -> Tensor:
        """Return the values."""
        return self._make()

    def slice_array(self) -> list[tuple[str, Any]]:
        """Cut ``data`` into chunks, without Flower's cache of them."""
        return self._plain().slice_array()

    def deflate(self) -> bytes:
        """Serialize as a plain `Array`, which is what the receiver knows."""
        return self._plain().deflate()

    def __deepcopy__(self, memo: dict[int, Any]) -> MadeArray:
        return self

    def __repr__(self) -> str:
        return f"MadeArray(dtype={self.dtype}, shape={self.shape})"

    def _plain(self) -> Array:
        return Array(np.asarray(self.numpy()))


def made_record(like: ArrayRecord, make: Callable[[str], Tensor]) -> ArrayRecord:
    """Return a record of the names, shapes and dtypes of another; ``make(name)`` its tensors."""
    record = ArrayRecord()  # its other constructors would read every array
    for name, array in like.items():
        record[name] = MadeArray(array, partial(make, name))
    return record
