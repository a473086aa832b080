"""AxoNN's formulas: by hand, and against what its authors' program computes.

Their program is examples/comm_model.py of github.com/axonn-ai/Megatron-AxoNN (commit 8a4ae24).
"""

from __future__ import annotations

import pytest

from flwr_hpc.plan.axonn import Grid, layer_seconds, layer_volumes
from flwr_hpc.plan.bandwidth import Bandwidths

GIB = 2**30 / 1e9  # their bandwidths are GiB/s
PERLMUTTER = {(1, 2): 76, (1, 4): 225, (1, 8): 80, (2, 2): 76, (2, 4): 40, (4, 2): 20}
FRONTIER = {
    (1, 2): 129, (1, 4): 52, (1, 8): 135, (1, 16): 40, (2, 2): 50, (2, 4): 72, (2, 8): 20,
    (4, 2): 36, (4, 4): 10, (8, 2): 5,
}  # fmt: skip


def _table(rows: dict[tuple[int, int], int], per_node: int) -> Bandwidths:
    return Bandwidths(per_node, 0.0, 0.0, measured={k: v * GIB for k, v in rows.items()})


TABLES = {"perlmutter": _table(PERLMUTTER, 4), "frontier": _table(FRONTIER, 8)}
# The fastest eight, as (rows, columns, depth, data) and seconds, of 512 sequences of 2048 tokens.
RANKED = {
    ("perlmutter", 32, 16, 32, 7168): [
        ((1, 1, 32, 1), 1.33505859375), ((1, 1, 16, 2), 1.5216796875),
        ((4, 1, 8, 1), 5.685859375), ((2, 1, 16, 1), 5.713044819078947),
        ((4, 1, 4, 2), 5.74328125), ((2, 1, 8, 2), 5.856599506578947),
        ((1, 4, 8, 1), 7.179192708333334), ((1, 2, 16, 1), 7.186729029605263),
    ],
    ("perlmutter", 64, 32, 38, 9216): [
        ((1, 1, 64, 1), 2.663003540039063), ((1, 1, 32, 2), 2.846173095703125),
        ((4, 1, 16, 1), 5.95619384765625), ((2, 1, 32, 1), 5.9957336425781245),
        ((4, 1, 8, 2), 6.0125537109375), ((2, 1, 16, 2), 6.1366333007812495),
        ((1, 4, 16, 1), 7.09619384765625), ((1, 2, 32, 1), 7.1207336425781245),
    ],
    ("frontier", 128, 16, 32, 7168): [
        ((1, 1, 128, 1), 2.7347167968750004), ((1, 1, 64, 2), 2.94287109375),
        ((1, 1, 32, 4), 3.3591796874999997), ((2, 1, 64, 1), 3.364346384447675),
        ((2, 1, 32, 2), 3.5509674781976743), ((1, 2, 64, 1), 3.581400648013566),
        ((1, 2, 32, 2), 3.768021741763566), ((2, 1, 16, 4), 3.924209665697674),
    ],
}  # fmt: skip


def test_a_worked_example() -> None:
    """Protects the formulas: a layer of 4 x 6 over 2 columns, 3 rows, 2 deep, 2 replicas.

    12 tokens in all, so 3 per copy. Forward, each of 3 rows x 2 columns holds 3 tokens x 2
    outputs as partial sums over the columns: 2 * 1/2 * 6 * 2 bytes = 12, twice as recomputed: 24.
    Backward, 3 tokens x 2 inputs over the rows: 2 * 2/3 * 6 * 2 bytes = 16. A rank's weights are
    24 / 6 = 4, half of them its own: 1/2 * 4 * (2 + 2 + 2) bytes = 12 per micro batch, 4 micro
    batches: 48. Replicas reduce 2 weights in float32: 2 * 1/2 * 2 * 4 bytes = 8.
    """
    grid = Grid(columns=2, rows=3, depth=2, data=2)
    volumes = layer_volumes(4, 6, 12, grid, accumulation=4)
    assert (volumes.columns, volumes.rows) == pytest.approx((24, 16))
    assert (volumes.depth, volumes.data) == pytest.approx((48, 8))
    swapped = Grid(columns=3, rows=2, depth=2, data=2)
    turned = layer_volumes(4, 6, 12, swapped, transposed=True, accumulation=4)
    assert (turned.rows, turned.columns) == pytest.approx((24, 16))


def _seconds(grid: Grid, hidden: int, machine: str) -> float:
    """Return the communication of a layer as the authors count it: all are hidden x K hidden."""
    layers = ((3, False), (1, True), (4, False), (4, True))
    return sum(
        layer_seconds(
            layer_volumes(hidden, k * hidden, 512 * 2048, grid, transposed=transposed),
            grid, TABLES[machine],
        )
        for k, transposed in layers
    )  # fmt: skip


@pytest.mark.parametrize("case", RANKED, ids=lambda c: f"{c[0]}-{c[1]}")
def test_the_authors_ranking(case: tuple[str, int, int, int, int]) -> None:
    """Protects the claim that this is AxoNN's model: its program's ranking and seconds."""
    machine, ranks, least, layers, hidden = case
    powers = [2**i for i in range(ranks.bit_length())]
    found = {}
    for rows in powers:
        for columns in powers:
            for depth in powers:
                data, rest = divmod(ranks, rows * columns * depth)
                if data >= 1 and not rest and rows * columns * depth >= least:
                    grid = Grid(columns, rows, depth, data)
                    seconds = layers * _seconds(grid, hidden, machine)
                    found[rows, columns, depth, data] = seconds
    best = sorted(found.items(), key=lambda item: item[1])[:8]
    assert [name for name, _ in best] == [name for name, _ in RANKED[case]]
    assert [s for _, s in best] == pytest.approx([s for _, s in RANKED[case]])


def test_bandwidth_without_a_table_is_near_the_measured_one() -> None:
    """Protects facilities without measurements: NVLink pairs and a shared network (Perlmutter)."""
    rule = Bandwidths(per_node=4, link_gb_s=300, network_gb_s=100)
    for (inner, size), gib_s in PERLMUTTER.items():
        assert rule.gb_s(inner, size) == pytest.approx(gib_s * GIB, rel=0.1)


def test_larger_groups_go_by_the_largest_measured() -> None:
    """Protects large allocations: more nodes do not make the network faster."""
    table = TABLES["perlmutter"]
    assert table.gb_s(1, 64) == table.gb_s(1, 8)
    assert table.gb_s(32, 4) == table.gb_s(4, 2)
