"""What a run costs its login node while its jobs wait in the queue.

Two real clusters (`tests/lab`, as root) are filled by another user's job. One federation of
both, with the package's own settings, waits; measured in the steady state are the CPU seconds
of every process that the command keeps running (short-lived ones included), their memory, and
the scheduler's commands, counted by wrappers ahead in PATH.

    python benchmarks/clusters/footprint.py [seconds]

Writes ``benchmarks/results/footprint.json``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

sys.path.append(str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from _machine import record
from lab.cluster import Cluster
from lab.plan import Shape

ROOT = Path(__file__).parents[2]
COMMANDS = ("sbatch", "squeue", "sacct", "scancel", "scontrol")
SETTLE_S = 60.0
FACILITIES = ("a", "b")


def wrappers(folder: Path) -> Path:
    """Write commands that note each call in ``calls.log`` and then do as the real ones."""
    folder.mkdir()
    for name in COMMANDS:
        real = shutil.which(name)
        wrapper = folder / name
        note = f'echo "$(date +%s.%N) {name} $SLURM_CONF" >>"{folder / "calls.log"}"'
        wrapper.write_text(f'#!/bin/sh\n{note}\nexec {real} "$@"\n')
        wrapper.chmod(0o755)
    return folder / "calls.log"


def settings(cluster: Cluster, name: str) -> str:
    """Return a facility file."""
    return f"""# @package facilities.{name}
scheduler: slurm
account: null
ranks_per_node: 2
walltime: "01:00:00"
env: {{SLURM_CONF: {cluster.conf}}}
"""


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all of its descendants."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def cpu_s(pid: int) -> float:
    """Return the CPU seconds so far of a family, its dead included."""
    total = 0.0
    for process in family(pid):
        try:
            t = process.cpu_times()
        except psutil.Error:
            continue
        total += t.user + t.system + t.children_user + t.children_system
    return total


def memory_mb(pid: int) -> dict[str, float]:
    """Return the resident memory of a family by the kind of process, shared pages split."""
    found: dict[str, float] = {}
    for process in family(pid):
        try:
            words = [word for word in process.cmdline()[1:] if not word.startswith("-")]
            name = Path(words[0]).name
            found[name] = found.get(name, 0.0) + process.memory_full_info().pss / 1e6
        except (psutil.Error, IndexError):
            continue
    return found


def main(seconds: float) -> None:
    """Run, print and record."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="footprint-")))
        (folder / "conf" / "facility").mkdir(parents=True)
        for name in FACILITIES:
            cluster = stack.enter_context(Cluster.up(f"bench_{name}", Shape()))
            cluster.occupy(3600)
            path = folder / "conf" / "facility" / f"lab_{name}.yaml"
            path.write_text(settings(cluster, f"lab_{name}"))
        calls = wrappers(folder / "bin")
        command = [sys.executable, "-m", "flwr_hpc.run", "+facility=[lab_a,lab_b]"]
        command += [f"--config-dir={folder / 'conf'}", f"run_dir={folder / 'run'}"]
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        env = os.environ | {"PATH": path, "FLWR_HPC_STATE": str(folder / "state")}
        with open(folder / "log", "wb") as log:
            run = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
        stack.callback(run.wait, 120)
        stack.callback(run.terminate)
        time.sleep(SETTLE_S)
        before, began, wall = cpu_s(run.pid), time.monotonic(), time.time()
        peaks: Counter[str] = Counter()
        while time.monotonic() - began < seconds:
            for name, mb in memory_mb(run.pid).items():
                peaks[name] = max(peaks[name], round(mb))
            time.sleep(5)
        spent, took = cpu_s(run.pid) - before, time.monotonic() - began
        assert run.poll() is None, (folder / "log").read_text()[-3000:]
        lines = [line.split() for line in calls.read_text().splitlines()]
    queries = Counter(line[1] for line in lines if wall <= float(line[0]) <= wall + took)
    per_minute = sum(queries.values()) / (took / 60.0) / len(FACILITIES)
    figures: dict[str, Any] = {
        "cpu_s_per_hour": spent / took * 3600.0,
        "memory_mb": dict(peaks),
        "memory_mb_in_all": sum(peaks.values()),
        "queries_per_minute_and_facility": per_minute,
        "queries": dict(queries),
    }
    for name, value in figures.items():
        print(f"{name}: {value}")
    record("footprint", figures, {"seconds": seconds, "facilities": len(FACILITIES)})


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 600.0)
