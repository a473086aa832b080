"""What keeps a site from working, and replies that get lost on the way."""

from __future__ import annotations

from worlds.bench import ready_bench
from worlds.grid import FakeSite

from flwr_hpc.protocol import Status
from strategies import SiteResult


def test_a_blocked_site_is_waited_for():
    """Protects orders from a full disk: nothing is counted, and the reason is told once."""
    site = FakeSite("a", fail=Status("blocked", reason="the disk is full"))
    bench = ready_bench(site, retries=0, retry_delay_s=5)
    bench.train()
    assert bench.engine.events(timeout=500) == []
    site.fail = None
    assert isinstance(bench.run(), SiteResult)
    assert "order_failed" not in bench.names()
    told = [f["reason"] for _, event, f in bench.log if event == "site_trouble"]
    assert told == ["the disk is full", ""]
    assert len(bench.grid.pushed) < 120  # no faster than the pause
