"""AxoNN's communication volumes (SC24, arXiv 2502.08145), layer by layer.

A layer's matrix is split over a grid of ranks: rows x columns (tensor parallelism), depth
(sharding) and data (replicas). Volumes are what passes through each member of a ring.
"""

from __future__ import annotations

from dataclasses import dataclass

from flwr_hpc.plan.bandwidth import Bandwidths


@dataclass(frozen=True)
class Grid:
    """Ranks by dimension; columns lie next to each other, data furthest apart."""

    columns: int = 1
    rows: int = 1
    depth: int = 1
    data: int = 1


@dataclass(frozen=True)
class Volumes:
    """Bytes of a step by dimension of the grid."""

    columns: float
    rows: float
    depth: float
    data: float


def layer_volumes(
    inputs: int,
    outputs: int,
    tokens: float,
    grid: Grid,
    *,
    transposed: bool = False,
    recomputed: bool = True,
    accumulation: int = 1,
    activation_bytes: float = 2,
    gather_bytes: float = 2,
    scatter_bytes: float = 2,
    gradient_bytes: float = 4,
) -> Volumes:
    """Return what one step sends for a matrix of `inputs` x `outputs`.

    Columns split the inputs, so the outputs are partial sums that an all-reduce over the columns
    adds up, forward (and again if it is recomputed); rows split the outputs, so the gradient of
    the inputs is reduced over the rows, backward. `transposed` exchanges the two, which every
    second layer does so that its input need not be laid out anew. Depth shards the rest: two
    all-gathers and a reduce-scatter per micro batch. Data replicates: one all-reduce.

    Parameters
    ----------
    inputs, outputs : int
    tokens : float
        Of the global batch.
    grid : Grid
    transposed : bool
    recomputed : bool
        Activations are recomputed in the backward pass.
    accumulation : int
        Micro batches per step.
    activation_bytes, gather_bytes, scatter_bytes, gradient_bytes : float
        Per element of activations, of gathered weights, of scattered and of replicated gradients.
    """
    local = tokens / (grid.data * grid.depth)
    weights = inputs * outputs
    columns, rows = (grid.rows, grid.columns) if transposed else (grid.columns, grid.rows)
    forward = _reduce(columns) * local * outputs / rows * activation_bytes
    backward = _reduce(rows) * local * inputs / columns * activation_bytes
    if recomputed:
        forward *= 2
    gathered = weights / (grid.rows * grid.columns)
    depth = (grid.depth - 1) / grid.depth * gathered * (2 * gather_bytes + scatter_bytes)
    return Volumes(
        columns=backward if transposed else forward,
        rows=forward if transposed else backward,
        depth=accumulation * depth,
        data=_reduce(grid.data) * gathered / grid.depth * gradient_bytes,
    )


def layer_seconds(volumes: Volumes, grid: Grid, table: Bandwidths) -> float:
    """Return how long a layer's volumes take, nothing overlapped."""
    inner, total = 1, 0.0
    for size, volume in (
        (grid.columns, volumes.columns),
        (grid.rows, volumes.rows),
        (grid.depth, volumes.depth),
        (grid.data, volumes.data),
    ):
        total += table.seconds(inner, size, volume / 1e9, collectives=0)
        inner *= size
    return total


def _reduce(size: int) -> float:
    """Share of an array that passes through each member of a ring's all-reduce."""
    return 2 * (size - 1) / size
