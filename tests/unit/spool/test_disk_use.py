"""What a run keeps on disk, by arithmetic."""

from __future__ import annotations

import pytest

from flwr_hpc.spool.disk_use import least_site_disk, server_disk, site_disk

MODEL = 4  # bytes of one parameter


@pytest.mark.parametrize(
    ("options", "models"),
    [({}, 8), ({"feedback": True}, 9), ({"checkpoints": False}, 4)],
)
def test_a_site_keeps_so_many_models(options: dict[str, bool], models: int) -> None:
    """Protects the table in docs/resilience.md: two orders' weights, and two of two moments."""
    assert site_disk(1, **options).total == models * MODEL


def test_one_order_takes_a_version_and_a_checkpoint() -> None:
    """Protects a run that fits from being refused."""
    assert least_site_disk(1) == 4 * MODEL
    assert least_site_disk(1, checkpoints=False) == MODEL


def test_the_server_keeps_replies_of_its_sites() -> None:
    """Protects the server's disk: two versions, its momentum, and three models for each site."""
    assert [server_disk(1, sites, kept=2) for sites in (1, 8)] == [7 * MODEL, 28 * MODEL]
