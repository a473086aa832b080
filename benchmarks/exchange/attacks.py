"""Attacks of one site on the exchange: none succeeds; memory and time stay bounded.

Every attack (`tests/worlds/exchange/attacks.py`) is drawn from its number: bytes, tables of
contents, values, references, what lies in the store, inline arrays, unasked records. Each is
refused, or accepted and then what the official library reads in the same bytes; after every
thousand the honest site is served.

    python benchmarks/exchange/attacks.py [COUNT]

Writes ``benchmarks/results/attacks.json``; exit code 1 if an attack succeeds, memory grows by
50 MB, or one attack takes 5 CPU seconds.
"""

from __future__ import annotations

import logging
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from _machine import record
from worlds.exchange.attacks import Attacks

COUNT = 10_000
GROWTH_LIMIT_MB, CASE_LIMIT_S = 50, 5.0


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else COUNT
    logging.disable(logging.WARNING)  # Flower's, of every record that is replaced
    failed: list[str] = []
    slowest = (0.0, 0)
    with tempfile.TemporaryDirectory() as folder:
        attacks = Attacks(Path(folder))
        for seed in range(500):  # what is imported and allocated once
            attacks.run(seed)
        attacks.outcomes.clear()
        before, began = peak_mb(), time.process_time()
        for seed in range(count):
            start = time.process_time()
            try:
                attacks.run(seed)
            except Exception as exc:
                failed.append(f"{seed}: {type(exc).__name__}: {exc}")
            slowest = max(slowest, (time.process_time() - start, seed))
            if seed % 1000 == 999:
                attacks.check_honest()
        took = time.process_time() - began
    figures = {
        "attacks": count,
        "succeeded": failed,
        "outcomes": dict(sorted(attacks.outcomes.items())),
        "peak_rss_mb": round(peak_mb(), 1),
        "peak_rss_growth_mb": round(peak_mb() - before, 1),
        "cpu_s": round(took, 1),
        "slowest_cpu_s": round(slowest[0], 3),
        "slowest_attack": slowest[1],
    }
    for name, value in figures.items():
        print(f"{name}: {value}")
    record("attacks", figures, {"count": count, "growth_limit_mb": GROWTH_LIMIT_MB})
    grown = figures["peak_rss_growth_mb"]
    return int(bool(failed) or grown > GROWTH_LIMIT_MB or slowest[0] > CASE_LIMIT_S)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    raise SystemExit(main())
