"""Centres that allow less than the run orders say no; the others go on, and train adapters."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from worlds.runs.base import save_base
from worlds.runs.centres import OWN, Centres, environment

pytestmark = pytest.mark.slow
STEPS = 40
RUN = ("serve.sites=[a,b,c,d]", "rounds=2", f"train.steps={STEPS}", "strategy.outer_lr=0.6")
REFUSED = {"a": "site.limits.node_hours=0.5", "b": f"site.limits.steps={STEPS - 1}"}


def test_sites_that_refuse_are_left_out_and_adapters_trained_by_the_others(tmp_path: Path) -> None:
    """Protects a centre from more than its people agreed to, and the run from ending for it: they
    see before the first job what it is, at the end what was spent, and the server's people why."""
    base = f"model.path={save_base(tmp_path / 'base')}"
    centres = Centres(tmp_path, *RUN, base, "model.lora.r=4", "data.tokenizer=byte")
    try:
        assert "walltime=01:00:00 is above site.limits.walltime=00:30:00" in _refused(centres, base)
        for site, limit in REFUSED.items():
            centres.join(site, "json", limit, base)
        centres.join("c", "logging", "site.limits.node_hours=3", base)
        centres.join("d", "unittest", base)
        assert set(centres.codes().values()) == {0}, centres.said()
    finally:
        centres.end()
    assert {e["facility"] for e in centres.events("site_excluded")} == {*REFUSED}
    summary = json.loads((centres.run / "summary.json").read_text())
    for site, limit in REFUSED.items():
        assert limit in summary["facilities"][site]["excluded"]
        assert f"without {site}: " in centres.commands["server"].output.read_text()
        (words,) = _words_after(
            centres.commands[site].said(), "the run goes on without this site: "
        )
        assert limit in words
    for site in "abcd":
        told = centres.commands[site].output.read_text()
        shown = told[: told.index(f"of this centre, as {site}")]
        for words in ("strategies.diloco.DiLoCo", "outer_lr: 0.6", f"steps: {STEPS}", "r: 4"):
            assert words in shown
    jobs = {site: _job_count(centres, site) for site in "abcd"}
    assert jobs == {"a": 0, "b": 1, "c": 1, "d": 1}
    assert re.search(r"1 jobs, 0\.0\d of 3 node-hours", centres.commands["c"].said())
    aggregated = centres.events("aggregated")
    assert [sorted(e["facilities"]) for e in aggregated] == [["c", "d"]] * 2
    assert all(e["lora_inexactness"] > 1e-8 for e in aggregated)  # the plain average is not exact
    assert (centres.run / "model" / "adapter_config.json").exists()


def _refused(centres: Centres, *own: str) -> str:
    """Join with jobs that the centre itself does not allow; return the answer."""
    path = centres.invitation("a")
    words = (path.name, *OWN, *own, "data.paths=[json]", "site.limits.walltime=00:30:00")
    command = [sys.executable, "-m", "flwr_hpc.join", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=path.parent, env=environment()
    )
    assert done.returncode == 2
    assert not (path.parent / "here").exists()
    return done.stderr


def _words_after(said: str, words: str) -> list[str]:
    return [line.partition(words)[2] for line in said.splitlines() if words in line]


def _job_count(centres: Centres, site: str) -> int:
    return len([*(centres.base / site).glob("here/facilities/*/allocations/*/job")])
