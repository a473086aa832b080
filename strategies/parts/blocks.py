"""Arrays that are computed when they are read, a block at a time: none need be whole in memory."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Union

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import NDArray

BLOCK = 1 << 19  # numbers at most; a few such arrays lie in a core's cache
LEAST = 1 << 14  # numbers at least: with fewer the calls take longer than the arithmetic
ARRAYS = 3, 8  # of a block's size that a rule takes: for each array it reads, and besides

Tensor = NDArray[Any]
Lazy = Union[Tensor, "Blocks"]
Tensors = Iterator[tuple[str, Lazy]]
Rule = Callable[..., Tensor]

_memory = 512 << 20  # bytes


def limit_memory(size: int) -> None:
    """Have arrays that this process computes block by block take so many bytes at most.

    With many arrays, as of many sites, or many cores the blocks are smaller; nothing else changes.
    """
    global _memory
    _memory = size


def block_size(*dtypes: np.dtype[Any], threads: int = 1) -> int:
    """Return how many numbers are computed at a time of arrays that are read together."""
    room = _memory // (_bytes_each(dtypes) * threads)
    return min(BLOCK, max(LEAST, room - room % LEAST))


class Blocks(NDArrayOperatorsMixin):
    """A rule of arrays of one shape, number by number, that is computed as it is read.

    Iterating gives its flat blocks, in order, which all cores compute. Operands that are loaded
    by ``numpy()`` are mapped as long as an iteration lasts. Arithmetic with numbers and arrays of
    the same shape makes Blocks, too; `np.asarray` the whole array.

    Parameters
    ----------
    rule : callable
        Pure, of flat arrays of the same length; returns one of that length.
    *operands : NDArray, Blocks, or object with ``shape``, ``dtype`` and ``numpy()``
        Of one shape. If it has a ``reader()``, that returns what reads ranges of it; if it has a
        ``lazy()``, that may return Blocks.
    """

    def __init__(self, rule: Rule, *operands: Any) -> None:
        self._rule, self._operands = rule, operands
        self.shape = _shape_of(operands)
        self.ndim = len(self.shape)
        nothing = [np.empty(0, np.dtype(operand.dtype)) for operand in operands]
        self.dtype: np.dtype[Any] = rule(*nothing).dtype

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the blocks: `block_size` numbers, the last one what is left."""
        read, size = self._opened(), math.prod(self.shape)
        block, threads = _schedule(self)
        parts = [slice(start, min(start + block, size)) for start in range(0, size, block)]
        if threads == 1 or len(parts) < 2:
            yield from map(read, parts)
            return
        ahead: deque[Future[Tensor]] = deque()
        with ThreadPoolExecutor(threads, "blocks") as pool:
            try:
                for part in parts:
                    ahead.append(pool.submit(read, part))
                    if len(ahead) > threads:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:  # who reads may stop early
                for future in ahead:
                    future.cancel()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Tensor:
        """Return the whole array."""
        whole, start = np.empty(math.prod(self.shape), self.dtype), 0
        for block in self:
            whole[start : start + block.size] = block
            start += block.size
        return np.asarray(whole.reshape(self.shape), dtype=dtype)

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **options: Any
    ) -> Any:
        """Calculate later, where that is number by number; ``x += y`` makes another x.

        An array in memory that the result is to go into has it at once.
        """
        given = [array for array in out or () if not isinstance(array, Blocks)]
        simple = method == "__call__" and ufunc.nout == 1 and not options and not given
        if simple and all(np.shape(x) in ((), self.shape) for x in inputs):
            return Blocks(partial(_applied, ufunc, inputs), *filter(np.ndim, inputs))
        whole = (np.asarray(x) if isinstance(x, Blocks) else x for x in inputs)
        return getattr(ufunc, method)(*whole, **options, **({"out": out} if given else {}))

    def _opened(self) -> Callable[[slice], Tensor]:
        reads = [_reader(operand) for operand in self._operands]
        return lambda part: self._rule(*(read(part) for read in reads))


def blockwise(rule: Rule, *operands: Any) -> Lazy:
    """Return `rule` of the operands, see `Blocks`: at once where they are small."""
    shape = _shape_of(operands)
    if math.prod(shape) > block_size(*_read_by(operands)):
        return Blocks(rule, *operands)
    return rule(*(_loaded(operand).reshape(-1) for operand in operands)).reshape(shape)


def as_is(array: Any) -> Lazy:
    """Return an array to be read block by block."""
    return blockwise(np.asarray, array)


def flat_blocks(array: Lazy) -> Iterator[Tensor]:
    """Yield an array's numbers in order, some at a time."""
    if isinstance(array, Blocks):
        yield from array
    else:
        flat = array.reshape(-1)
        yield from (flat[start : start + BLOCK] for start in range(0, flat.size, BLOCK))


def _shape_of(operands: Sequence[Any]) -> tuple[int, ...]:
    """Return the shape of all; their numbers are paired in order, whatever it is."""
    shape, *others = (tuple(operand.shape) for operand in operands)
    if unlike := next((other for other in others if other != shape), None):
        raise ValueError(f"tensors of the shapes {shape} and {unlike} cannot be paired")
    return shape


def _schedule(blocks: Blocks) -> tuple[int, int]:
    """Return the size of a block, and how many are computed at the same time."""
    found = _read_by([blocks])
    most = _memory // (_bytes_each(found) * LEAST)
    threads = max(1, min(len(os.sched_getaffinity(0)), most))
    return block_size(*found, threads=threads), threads


def _bytes_each(dtypes: Sequence[np.dtype[Any]]) -> int:
    """Return the bytes that computing takes for each number of a block."""
    each, others = ARRAYS
    return max(4, *(dtype.itemsize for dtype in dtypes)) * (each * len(dtypes) + others)


def _read_by(operands: Iterable[Any]) -> list[np.dtype[Any]]:
    """Return the dtypes of all that is read at the same time."""
    found: list[np.dtype[Any]] = []
    for operand in operands:
        lazy = operand.lazy() if hasattr(operand, "lazy") else operand
        inner = lazy._operands if isinstance(lazy, Blocks) else ()
        found += _read_by(inner) if inner else [np.dtype(operand.dtype)]
    return found


def _applied(ufunc: np.ufunc, inputs: Sequence[Any], *arrays: Tensor) -> Tensor:
    """Call with arrays in place of those inputs that are no single numbers."""
    given = iter(arrays)
    return np.asarray(ufunc(*(next(given) if np.ndim(x) else x for x in inputs)))


def _reader(operand: Any) -> Callable[[slice], Tensor]:
    operand = operand.lazy() if hasattr(operand, "lazy") else operand
    if isinstance(operand, Blocks):
        return operand._opened()
    if hasattr(operand, "reader"):
        read: Callable[[slice], Tensor] = operand.reader()
        return read
    flat = _loaded(operand).reshape(-1)
    return lambda part: flat[part]


def _loaded(operand: Any) -> Tensor:
    return operand.numpy() if hasattr(operand, "numpy") else np.asarray(operand)


# ---- as Flower's arrays -----------------------------------------------------------------------


class MadeArray(Array):
    """A Flower array whose values are computed anew by each `numpy`; nothing is kept.

    Parameters
    ----------
    like : Array
        Has the same shape and dtype.
    make : callable
        Returns the values, the same ones each time.
    """

    def __init__(self, like: Array, make: Callable[[], Lazy]) -> None:
        self.dtype, self.shape, self.stype = like.dtype, like.shape, "numpy.ndarray"
        self._make = make

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The array in numpy's own format, as a plain `Array` would hold it."""
        return self._plain().data

    def numpy(self) -> Tensor:
        """Return the values."""
        return np.asarray(self._make())

    def lazy(self) -> Lazy:
        """Return the values, large ones to be read block by block."""
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


def made_record(like: ArrayRecord, make: Callable[[str], Lazy]) -> ArrayRecord:
    """Return a record of the names, shapes and dtypes of another; ``make(name)`` its tensors."""
    record = ArrayRecord()  # its other constructors would read every array
    for name, array in like.items():
        record[name] = MadeArray(array, partial(make, name))
    return record
