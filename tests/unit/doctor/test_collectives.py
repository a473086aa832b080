"""How collectives are measured: which groups work at once."""

from __future__ import annotations

import pytest

from flwr_hpc.doctor.collectives import groups
from flwr_hpc.plan.bandwidth import placements


def test_groups_of_a_placement() -> None:
    """Protects the meaning of inner and size: which ranks a plan's groups hold."""
    assert groups(8, 1, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups(8, 2, 2) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert groups(8, 4, 2) == [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize("world", [2, 6, 8, 12])
def test_every_rank_is_at_work(world: int) -> None:
    """Protects from groups that have the network for themselves: none is idle meanwhile."""
    for inner, size in placements(world):
        ranks = [rank for group in groups(world, inner, size) for rank in group]
        assert sorted(ranks) == list(range(world))
