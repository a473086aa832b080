"""What the tests of jobs share: waiting, looking at processes, finding a scheduler."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
from worlds.files import paths_under

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.files import read_json

T = TypeVar("T")
STALLED_S, LOOK_S = 300.0, 5.0
# Written again and again by whoever lives, whether the work goes on or not; and a worker's state,
# of which only the word counts.
SIGNS_OF_LIFE, STATE = {"heartbeat.json", "job_states.json", "times.json", "lock"}, "state.json"
TESTS = Path(__file__).parents[1]
FAKES = TESTS / "contract" / "fake_slurm" / "slurm.py"
FAKE_PBS = {
    "pbs": ("qsub", "qstat", "qdel"),
    "mom": ("pbs_mom",),
    "mpiexec": ("mpiexec", "pbs_tmrsh"),
}


def until(
    what: Callable[[], T], *folders: Path, explain: Callable[[], str] = str, pause_s: float = 0.05
) -> T:
    """Poll until `what` returns something true, however slow the machine is.

    It fails when nothing has moved in the folders for `STALLED_S` seconds: no file of the work is
    new, gone, or changed. `explain` is asked for the reason then.
    """
    moved_s, before, looked_s = time.monotonic(), progress(*folders), time.monotonic()
    while not (value := what()):
        time.sleep(pause_s)
        if time.monotonic() - looked_s < LOOK_S:
            continue
        now, looked_s = progress(*folders), time.monotonic()
        if now != before:
            moved_s, before = looked_s, now
        assert looked_s - moved_s < STALLED_S, f"nothing moved for {STALLED_S} s\n{explain()}"
    return value


def progress(*folders: Path) -> dict[str, Any]:
    """Return what the files of the work look like, without mere signs of life."""
    found: dict[str, Any] = {}
    for path in paths_under(*folders):
        if path.name in SIGNS_OF_LIFE or path.suffix in (".log", ".tmp"):
            continue
        with contextlib.suppress(OSError):  # gone meanwhile
            if path.name == STATE:
                found[str(path)] = (read_json(path) or {}).get("state")
            elif path.is_file():
                stat = path.stat()
                found[str(path)] = (stat.st_size, stat.st_mtime_ns)
    return found


def processes_of(name: str) -> list[psutil.Process]:
    """Return the living processes with a job's name in their environment."""
    found = psutil.process_iter(["environ", "status"])
    return [
        p
        for p in found
        if (p.info["environ"] or {}).get("FLWR_HPC_JOB") == name
        and p.info["status"] != psutil.STATUS_ZOMBIE
    ]


def command_line(process: psutil.Process) -> str:
    """Return a process's command line, empty when it has ended meanwhile."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # gone, or a zombie
        return ""


def send(number: signal.Signals, processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Send a signal to processes; return those that had not ended meanwhile."""
    sent = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
            sent.append(process)
    return sent


def below(process: psutil.Process) -> list[psutil.Process]:
    """Return a process's descendants, none when it has ended meanwhile."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return list(process.children(recursive=True))
    return []


def connections(process: psutil.Process) -> list[Any]:
    """Return a process's connections, none when it has ended meanwhile."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return list(process.net_connections("inet"))
    return []


def facility(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FacilityConfig:
    """Return a facility of two ranks.

    ``local``, ``fake_slurm``, ``fake_pbs``, ``slurm``, or ``dummy`` from outside of the package.
    """
    env = {"PYTHONPATH": str(TESTS)}
    if kind == "local":
        return FacilityConfig(scheduler="local", ranks_per_node=2, env=env)
    if kind == "dummy":
        register_dummy(tmp_path / "installed", monkeypatch)
        env["DUMMY_HOME"] = str(tmp_path / "dummy")
        return FacilityConfig("dummy", None, ranks_per_node=2, walltime="00:10:00", env=env)
    if kind == "fake_pbs":
        install_fake_pbs(tmp_path / "fake", monkeypatch)
        return FacilityConfig("pbs", None, ranks_per_node=2, walltime="00:10:00", env=env)
    if kind == "fake_slurm":
        _install_fakes(tmp_path / "fake", monkeypatch)
    else:
        env["SLURM_CONF"] = os.environ["SLURM_CONF"]  # see the fixture slurm_conf
    return FacilityConfig(account=None, ranks_per_node=2, walltime="00:10:00", env=env)


def register_dummy(site_packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `worlds.schedulers.dummy_scheduler` known, as installing a package with it would."""
    info = site_packages / "dummy_scheduler-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dummy-scheduler\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[flwr_hpc.schedulers]\ndummy=worlds.schedulers.dummy_scheduler\n"
    )
    monkeypatch.syspath_prepend(str(site_packages))


def _install_fakes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ("sbatch", "srun", "squeue", "sacct", "scancel"):
        _write(_program(home, command, FAKES.read_text()))
    monkeypatch.setenv("PATH", f"{home / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(home))


def _program(home: Path, command: str, code: str) -> dict[Path, str]:
    """Return a command in Python; a path with a space is no interpreter for a first line."""
    script = home / "python" / command
    run = shlex.join([sys.executable, str(script)])
    return {script: code, home / "bin" / command: f'#!/bin/sh\nexec {run} "$@"\n'}


def _write(programs: dict[Path, str]) -> None:
    for path, text in programs.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)


def fake_pbs(home: Path) -> dict[Path, str]:
    """Return PBS's commands, for a `PATH` of ``home/bin``; what they keep lies in `home`."""
    programs: dict[Path, str] = {}
    for module, commands in FAKE_PBS.items():
        for command in commands:
            code = (
                f"import sys\nsys.argv[0] = {str(home / 'bin' / command)!r}\n"
                f"sys.path.insert(0, {str(TESTS / 'contract' / 'fake_pbs')!r})\n"
                f"import {module}\n{module}.{command}(sys.argv[1:])\n"
            )
            programs |= _program(home, command, code)
    return programs


def install_fake_pbs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put PBS's commands in PATH."""
    _write(fake_pbs(home))
    monkeypatch.setenv("PATH", f"{home / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_PBS", str(home))
