"""What Flower starts and never looks at again: the driver looks. Real SuperLinks and SuperNodes."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest
from worlds.jobs import below, command_line, send
from worlds.runs.run import ONE_SITE, Run, kill

pytestmark = pytest.mark.slow

SUPEREXEC = "flower-superexec"


def _superexecs(run: Run, owner: str) -> list[psutil.Process]:
    """Return the SuperExecs below a process of the run, named by a word of its command line.

    The oldest one is first: what it has just forked has its command line.
    """
    family = {child for process in run.children(owner) for child in below(process)}
    found = [child for child in family if SUPEREXEC in command_line(child)]
    return sorted(found, key=psutil.Process.create_time)


def test_a_superlink_that_is_killed_as_it_starts(tmp_path: Path) -> None:
    """Protects a run on a machine where starting takes long enough to be hit: it tries again."""
    run = Run(tmp_path / "run", "rounds=1", "train.steps=20", settings=ONE_SITE)
    kill(run.until(lambda: run.children("flower-superlink"))[0].pid)
    assert run.end() == 0, run.said()
    assert "SuperLink did not start" in run.said()
    assert "starting again" in run.said()
    assert run.left_behind() == []


def test_superexecs_and_the_fork_server(tmp_path: Path) -> None:
    """Protects a site from silence when its SuperNode's SuperExec dies, a busy machine from
    importing Flower for every message, a run whose fork server dies (its ClientApps then start on
    their own), and the ServerApp, which its SuperExec's death ends."""
    run = Run(tmp_path / "run")
    found = run.until(lambda: run.children("site.start.fork_server"))
    server = min(found, key=psutil.Process.create_time)  # the others are forks of it
    run.until(lambda: [p for p in server.children() if command_line(p)])  # a zombie has none
    order = run.until_training("local_b")
    victim = run.until(lambda: _superexecs(run, "site-local_b"))[0]
    kill(victim.pid)
    run.until(lambda: [p for p in _superexecs(run, "site-local_b") if p != victim])
    server.kill()
    run.until_training(version=1)
    run.until(lambda: send(signal.SIGKILL, _superexecs(run, "flower-superlink")))
    assert run.end() == 0, run.said()
    assert f"the {SUPEREXEC} of supernode-local_b has ended" in run.said()
    assert "starting again" in run.said()
    for facility in ("local_a", "local_b"):
        assert run.summary()["facilities"][facility]["steps"] == 300
    assert len([e for e in run.events("order_done") if e["order_id"] == order]) == 1
    allocations = run.dir / "facilities" / "local_b" / "allocations"
    assert len(list(allocations.iterdir())) == 1
    assert run.left_behind() == []
