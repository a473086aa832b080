"""A site that is shut out in the middle of an order."""

from __future__ import annotations

from pathlib import Path

import pytest
from worlds.jobs import until
from worlds.runs.centres import Centres

from flwr_hpc.files import read_json

pytestmark = pytest.mark.slow
SETTINGS = ("federation.wait_s=5", "rounds=2", "train.steps=300")
DAY = "federation.offline_grace_s=86400"


def test_a_round_goes_on_without_a_site_that_is_revoked_at_work(tmp_path: Path) -> None:
    """Protects a synchronous run from waiting a day for who was shut out; the site ends, too."""
    centres = Centres(tmp_path, *SETTINGS, DAY)
    try:
        centres.join("a", "json")
        centres.join("b", "logging")
        centres.until(lambda: all(_progress(centres, site) for site in "ab"))
        done = [e for e in centres.events("order_done") if e["kind"] == "train"]
        centres.change("revoke", "b")
        b = centres.commands["b"]
        until(lambda: b.process.poll() is not None, tmp_path, explain=centres.said)
        del centres.commands["b"]  # its code is not 0
        assert centres.codes() == {"server": 0, "a": 0}, centres.said()
    finally:
        centres.end()
    assert b.process.wait() == 1
    assert "does not accept this invitation" in b.said()
    assert done == []  # b was revoked in the middle of the first round
    (failed,) = centres.events("order_failed")
    assert (failed["facility"], failed["fatal"]) == ("b", True)
    assert "serve invite b" in failed["reason"]
    assert [e["facilities"] for e in centres.events("aggregated")] == [["a"], ["a"]]


def _progress(centres: Centres, site: str) -> list[object]:
    """Return how far a site's orders are that have begun."""
    files = (centres.base / site).glob("here/facilities/*/orders/*/progress.json")
    return [found for found in map(read_json, files) if found]
