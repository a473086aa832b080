"""What `flwr_hpc.batch` does before a message is answered, and what it does not do instead.

Settings composed (a run's first message on a node) and read again (every later one); random numbers
put back in a warm process, and a fork of one that has imported torch. CPU time.

    python benchmarks/batch_message.py [repetitions]

Writes ``benchmarks/results/batch_message.json``.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from _machine import record
from flwr.app import Context, RecordDict

from flwr_hpc.batch_mod.cache import settings_of
from flwr_hpc.batch_mod.compose import settle
from flwr_hpc.batch_mod.randomness import ImportSeeds

APP = """
import random
import numpy as np
import torch
random.seed(42), np.random.seed(42), torch.manual_seed(42)
GENERATOR = np.random.default_rng(42)
"""


def milliseconds(work: Callable[[], object], repetitions: int) -> float:
    """Return the median CPU time of a piece of work, its forks' with it."""
    times = []
    for _ in range(repetitions):
        began = _cpu_s()
        work()
        times.append(_cpu_s() - began)
    return round(1000 * median(times), 3)


def _cpu_s() -> float:
    forks = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + forks.ru_utime + forks.ru_stime


def seeds(folder: Path) -> ImportSeeds:
    """Import an app that seeds all that can be, as a warm job does."""
    (folder / "seeded_app.py").write_text(APP)
    sys.path.insert(0, str(folder))
    watched = ImportSeeds("", "seeded_app")
    watched.watch()
    importlib.import_module("seeded_app")
    return watched


def fork() -> None:
    """Let a fork of this process end at once."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def main(repetitions: int = 50) -> None:
    """Measure, print and record."""
    with tempfile.TemporaryDirectory() as folder:
        given = {"facility": "leonardo", "account": "lab", "workdir": folder}
        context = Context(1, 1, {}, RecordDict(), {})
        settings_of(given, context)
        figures: dict[str, object] = {
            "settings_composed_ms": milliseconds(lambda: settle(given), repetitions),
            "settings_read_ms": milliseconds(lambda: settings_of(given, context), repetitions),
        }
        watched = seeds(Path(folder))
        figures["randomness_put_back_ms"] = milliseconds(watched.restore, repetitions)
        figures["fork_ms"] = milliseconds(fork, repetitions)
    figures["load_average"] = os.getloadavg()[0]
    record("batch_message", figures, {"repetitions": repetitions})
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
