"""One command trains one model at a site of this machine and at one behind SSH."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from worlds.over_ssh import SshRun
from worlds.runs import Run, kill
from worlds.sshd import Sshd, needs_sshd, sshd
from worlds.stranger import open_to_others

pytestmark = needs_sshd


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Sshd]:
    with sshd(tmp_path / "ein Übergang") as server:
        yield server


def test_a_line_cut_while_training_changes_no_bit(
    far: Sshd, tmp_path: Path, undisturbed: Run
) -> None:
    """Protects a run of days from a line of hours: the site is met again by itself, at the port
    that it knows, its work is neither lost nor done twice, and the model is as of one machine."""
    run = SshRun(tmp_path / "ein Lauf" / "one", far)
    run.until(run.trains_there)
    before = run.line()
    assert before is not None
    kill(before.pid)
    run.until(lambda: (line := run.line()) is not None and line.pid != before.pid)
    assert run.end() == 0, run.said()
    notes = [e["note"] for e in run.events("site_note")]
    assert any("line is lost" in note for note in notes)
    assert sum("its site runs on" in note for note in notes) == 2
    assert (run.jobs_there(), run.trained_there()) == (["a0000"], ["0", "1"])
    same, other = (load_file(r.dir / "model" / "model.safetensors") for r in (undisturbed, run))
    assert same.keys() == other.keys()
    assert all((same[name] == other[name]).all() for name in same)
    assert open_to_others(run.dir, run.there) == {}
    assert (run.left_behind(), run.left_there(), run.line()) == ([], [], None)
