"""What a process costs the login node, which Flower starts for every message.

Flower's program and our ClientApp imported and the program's options read, alone and as a fork of
the fork server, in turn: CPU seconds of every process of it, and seconds.

    python benchmarks/client_app_start.py [starts]

Writes ``benchmarks/results/client_app_start.json``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median

import psutil
from _machine import record

from flwr_hpc.site.start import fork_server, program

# As the fork server does it, and as Flower does: its program first, then the app.
IMPORTS = f"""
import json, sys, time, psutil
from importlib import import_module
from importlib.metadata import entry_points
def now():
    return time.process_time(), psutil.Process().memory_info().rss
marks = [now()]
(entry,) = entry_points(group="console_scripts", name="{fork_server.PROGRAM}")
run = entry.load()
marks.append(now())
import_module("{fork_server.APP}")
marks.append(now())
"""
IMPORTED = ("flower", "own")
TELL = "print(json.dumps(marks))"
RUN = "sys.argv = ['flwr-clientapp', '--help']\nsys.exit(run())"


def imports() -> dict[str, float]:
    """Return what the imports of Flower's program and of our ClientApp cost."""
    command = [sys.executable, "-c", IMPORTS + TELL]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    marks = json.loads(told.splitlines()[-1])
    found: dict[str, float] = {}
    for name, ((began, before), (ended, after)) in zip(IMPORTED, pairwise(marks), strict=True):
        found[f"{name}_cpu_s"] = ended - began
        found[f"{name}_mb"] = (after - before) / 1e6
    return found


def start(command: list[str], server: psutil.Process | None = None) -> tuple[float, float]:
    """Run a command; return CPU seconds, with those of a server and its forks, and seconds."""
    before, began = _cpu_s(server), time.monotonic()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return _cpu_s(server) - before, time.monotonic() - began


def _cpu_s(server: psutil.Process | None) -> float:
    """Return what this process's children have spent, and a server with its own."""
    own = os.times()
    spent = own.children_user + own.children_system
    return spent + (sum(server.cpu_times()[:4]) if server else 0.0)


@contextmanager
def served() -> Iterator[tuple[psutil.Process, list[str]]]:
    """Yield a fork server, and the command that asks it for a process."""
    folder = tempfile.mkdtemp()  # which the server removes
    path = Path(folder) / "socket"
    words = [sys.executable, "-m", fork_server.__name__, str(path)]
    with subprocess.Popen(words) as process:
        while not path.exists():
            assert process.poll() is None
            time.sleep(0.05)
        asks = [sys.executable, "-S", "-E", program.__file__, str(path), "/bin/false", "--help"]
        yield psutil.Process(process.pid), asks
        process.terminate()


def main(starts: int = 20) -> None:
    """Measure, print and record."""
    alone = [sys.executable, "-c", IMPORTS + RUN]
    taken: dict[str, list[tuple[float, float]]] = {"alone": [], "fork": []}
    parts = []
    with served() as (server, fork):
        for _ in range(starts):
            taken["alone"].append(start(alone))
            taken["fork"].append(start(fork, server))
            parts.append(imports())
    figures: dict[str, object] = {
        "imports": {name: round(median(p[name] for p in parts), 3) for name in parts[0]},
        "load_average": os.getloadavg()[0],
    }
    for way, results in taken.items():
        cpu, wall = (median(column) for column in zip(*results, strict=True))
        figures[way] = {"cpu_s": round(cpu, 3), "wall_s": round(wall, 3)}
    record("client_app_start", figures, {"starts": starts})
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
