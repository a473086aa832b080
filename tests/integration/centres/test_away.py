"""Sites that are shut out, or without their server, in the middle of an order."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from worlds.jobs import command_line, until
from worlds.runs.centres import Centres
from worlds.runs.run import trained_steps

from flwr_hpc.files import read_json

pytestmark = pytest.mark.slow
SETTINGS = ("federation.wait_s=5", "rounds=2")
STEPS = 100
NO_JOB = "no job is left while the server is away: "
IDLE_S = 15  # so long that a busy machine gives the next order in time


def test_a_round_goes_on_without_a_site_that_is_revoked_at_work(tmp_path: Path) -> None:
    """Protects a synchronous run from waiting a day for who was shut out; the site ends, too."""
    day = "federation.offline_grace_s=86400"
    centres = Centres(tmp_path, *SETTINGS, day, "train.steps=300")
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


def test_a_site_spends_nothing_without_its_server_and_keeps_its_result(tmp_path: Path) -> None:
    """Protects a centre's node-hours while the server is down, and what they were spent on: the
    result is kept, its people are told, and it is taken when the server is back; trained once."""
    centres = Centres(tmp_path, *SETTINGS, f"train.steps={STEPS}")
    try:
        for site, package in (("a", "json"), ("b", "logging")):
            centres.join(site, package, f"allocation.idle_timeout_s={IDLE_S}")
        centres.until(lambda: all(_progress(centres, site) for site in "ab"))
        centres.commands.pop("server").kill()
        centres.until(lambda: all(NO_JOB in centres.commands[s].said() for s in "ab"))
        taken = {e["order_id"] for e in centres.events("order_done")}
        kept = {site: _results(centres, site) - taken for site in "ab"}
        assert _ranks(centres) == []
        centres.serve(f"resume={centres.run}")
        assert centres.codes() == {"server": 0, "a": 0, "b": 0}, centres.said()
    finally:
        centres.end()
    done = [e["order_id"] for e in centres.events("order_done")]
    assert len(done) == len({*done})
    for site in "ab":
        assert kept[site]
        assert kept[site] <= {*done}
        assert "the server is back" in centres.commands[site].said()
        assert trained_steps(centres.base / site / "here") == 2 * STEPS


def _ranks(centres: Centres) -> list[str]:
    """Return the processes of jobs."""
    lines = map(command_line, psutil.process_iter())
    return [line for line in lines if "submitit" in line and str(centres.base) in line]


def _results(centres: Centres, site: str) -> set[str]:
    """Return the orders of which a site keeps the result."""
    files = (centres.base / site).glob("here/facilities/*/orders/*/result.json")
    return {path.parent.name for path in files}


def _progress(centres: Centres, site: str) -> list[object]:
    """Return how far a site's orders are that have begun."""
    files = (centres.base / site).glob("here/facilities/*/orders/*/progress.json")
    return [found for found in map(read_json, files) if found]
