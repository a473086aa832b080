"""The file of a facility's waits."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.site.forecast import history
from flwr_hpc.site.forecast.history import History, Shape, merge, shape_of, waits_folder


def _note(folder: Path, process: int) -> None:
    for k in range(100):
        History("site", folder).note(f"p{process}-{k}", submitted_s=float(k), waited_s=1.0)


def test_what_is_said_of_a_job_adds_up(tmp_path: Path) -> None:
    """Protects one record per job, however many processes tell it bit by bit, and run after run."""
    History("a/b", tmp_path).note("j", submitted_s=10.0, nodes=4, partition="gpu")
    History("a/b", tmp_path).note("i", submitted_s=5.0)
    History("a/b", tmp_path).note("j", waited_s=7.0, over=True, closed=True)
    old, new = History("a/b", tmp_path).waits()
    assert (old.job, new.job, new.shape.nodes, new.waited_s) == ("i", "j", 4, 7.0)
    assert [p.name for p in tmp_path.iterdir() if p.name != "lock"] == ["a%2Fb.jsonl"]


def test_a_closed_wait_stays_as_it_is(tmp_path: Path) -> None:
    """Protects a recorded wait from the second start of a job that was put back in the queue."""
    file = History("site", tmp_path)
    file.note("j", submitted_s=1.0, waited_s=7.0, over=True, closed=True)
    file.note("j", waited_s=900.0, over=True, closed=True)
    assert file.waits()[0].waited_s == 7.0


def test_broken_lines_cost_only_themselves(tmp_path: Path) -> None:
    """Protects the history from a full disk, a kill amid a line, and other versions."""
    file = History("site", tmp_path)
    file.note("a", submitted_s=1.0)
    with open(file.path, "ab") as f:
        f.write(b'\xff\xfe\n[1]\n{"job": 3}\n{"job": "x"}\n')
        f.write(b'{"job": "y", "submitted_s": NaN}\n{"job": "b", "submitted_s": 2, "new": []}\n')
        f.write(b'{"job": "b", "waited_s": "long", "plan_s": -1, "over": 1, "nodes": 2.5}\n')
        f.write(b'{"job": "c", "submi')
    file.note("d", submitted_s=3.0)
    assert [wait.job for wait in file.waits()] == ["a", "b", "d"]
    b = file.waits()[1]
    assert (b.waited_s, b.plan_s, b.over, b.nodes) == (None, None, False, 1)


def test_processes_append_without_loss(tmp_path: Path) -> None:
    """Protects the records of several runs at one facility."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_note, args=(tmp_path, k)) for k in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(History("site", tmp_path).waits()) == 200


def test_the_file_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the home directory's quota; the youngest jobs are kept."""
    monkeypatch.setattr(history, "KEPT", 5)
    monkeypatch.setattr(history, "LONGEST_BYTES", 5000)
    file = History("site", tmp_path)
    for k in range(300):
        file.note(f"j{k}", submitted_s=float(k))
    assert file.path.stat().st_size <= 5000
    assert [wait.job for wait in file.waits()][-5:] == [f"j{k}" for k in range(295, 300)]


def test_a_folder_that_cannot_be_used_is_no_error(tmp_path: Path) -> None:
    """Protects a run from a home directory that is full or not there."""
    (tmp_path / "file").write_text("")
    file = History("site", tmp_path / "file" / "waits")
    file.note("j", submitted_s=1.0)
    assert file.waits() == []


def test_the_folder_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects where the history is looked for: outside every run directory."""
    monkeypatch.delenv("FLWR_HPC_STATE", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert waits_folder() == Path("/state/flwr-hpc/waits")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert waits_folder() == Path("/home/me/.local/state/flwr-hpc/waits")
    monkeypatch.setenv("FLWR_HPC_STATE", "/mine")
    assert waits_folder() == Path("/mine/waits")


def test_the_shape_is_what_the_scheduler_looks_at() -> None:
    """Protects what makes waits comparable."""
    facility = FacilityConfig(account=None, nodes=4, walltime="01:00:00", partition="gpu")
    assert shape_of(facility) == Shape(4, 3600.0, "gpu", "")
    assert merge([json.dumps({"job": "j", "submitted_s": 0, "nodes": 3})])[0].shape.nodes == 3
