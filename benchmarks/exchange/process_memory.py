"""Weights beside Flower's messages, and inside them: memory, CPU and time of one real run each way.

The command itself: two local facilities, DiLoCo, one round of two steps, 500 MB of weights, by the
exchange and with ``exchange.inline_below_mb`` so high that Flower's messages carry them. Of every
process outside jobs the kernel's own peak (VmHWM) and CPU seconds, read about five times a second;
of the orders the time in which nothing is trained or evaluated, that is on the way there and back.

    python benchmarks/exchange/process_memory.py [repetitions]

Writes ``benchmarks/results/process_memory.json``; exit code 1 if a ClientApp reaches 200 MB.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from flwr_hpc.exchange.tensorfile import TensorFile

sys.path.append(str(Path(__file__).parents[1]))
from _machine import record

CLIENT_LIMIT_MB = 200
PROGRAMS = {
    "flwr-clientapp": "ClientApp",
    "site.start.fork_server": "ClientApp",  # which ClientApps are forks of
    "flwr-serverapp": "ServerApp",
    "flower-superlink": "SuperLink",
    "flower-supernode": "SuperNode",
    "flower-superexec": "SuperExec",
    "flwr_hpc.run": "driver",
    "reaper.py": "reaper",
}
SETTINGS = [
    "model.config.hidden_size=768",
    "model.config.intermediate_size=2048",
    "model.config.num_hidden_layers=12",
    "model.config.num_attention_heads=12",
    "model.config.num_key_value_heads=12",
    "++model.config.vocab_size=32000",
    "++model.config.tie_word_embeddings=false",
    "+facility=[local_a,local_b]",
    "facilities.local_a.ranks_per_node=1",
    "facilities.local_b.ranks_per_node=1",
    "data.paths.local_a=[json]",
    "data.paths.local_b=[logging]",
    "data.seq_len=64",
    "data.held_out_sequences=2",
    "train.micro_batch=1",
    "train.steps=2",
    "train.checkpoint_every_orders=0",
    "rounds=1",
]


WAYS = {"exchange": [], "inline": ["exchange.inline_below_mb=1e6"]}


class Processes:
    """Peak memory (MB) and CPU seconds of what a run keeps outside its jobs, by program."""

    def __init__(self) -> None:
        self.peaks: dict[str, float] = {}
        self._cpu: dict[str, float] = {}  # by process

    @property
    def cpu_s(self) -> float:
        """Of all, as last seen."""
        return sum(self._cpu.values())

    def look(self, run_dir: str) -> None:
        """Take in what lives now."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                mine = run_dir in (process / "environ").read_text(errors="replace")
                line = (process / "cmdline").read_text(errors="replace")
                high = re.search(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())
                ticks = (process / "stat").read_text().rpartition(")")[2].split()[11:13]
            except OSError:
                continue  # gone, or another user's
            for word, name in PROGRAMS.items():
                if word in line and (mine or run_dir in line) and "submitit" not in line and high:
                    self.peaks[name] = max(self.peaks.get(name, 0.0), int(high[1]) * 1024 / 1e6)
                    self._cpu[process.name] = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def run(way: str) -> dict[str, Any]:
    """Run the command once; return its figures."""
    seen = Processes()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = f"{folder}/run"
        command = [sys.executable, "-m", "flwr_hpc.run", f"run_dir={run_dir}"]
        with subprocess.Popen([*command, *SETTINGS, *WAYS[way]]) as process:
            while process.poll() is None:
                seen.look(run_dir)
                time.sleep(0.2)
        if process.returncode:
            raise SystemExit(1)
        weights = TensorFile(Path(run_dir) / "model" / "model.safetensors").nbytes
        events = map(json.loads, Path(run_dir, "events.jsonl").read_text().splitlines())
        orders = [e for e in events if e["event"] == "order_done" and e["kind"] == "train"]
    learning = ("train", "evaluate")
    away = [e["round_trip_s"] - sum(e["seconds"].get(k, 0.0) for k in learning) for e in orders]
    return {
        "weights_mb": round(weights / 1e6),
        "peak_mb": {name: round(peak) for name, peak in sorted(seen.peaks.items())},
        "cpu_s": round(seen.cpu_s, 1),
        "under_way_s": round(max(away), 1),
    }


def main(repetitions: int) -> int:
    """Run, print and record; 1 if the limit is broken."""
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(repetitions):
        for way, runs in found.items():
            runs.append(run(way))
            print(way, runs[-1], flush=True)
    ratios = {
        key: round(
            median(r[key] for r in found["inline"]) / median(r[key] for r in found["exchange"]), 2
        )
        for key in ("cpu_s", "under_way_s")
    }
    print("inline over exchange", ratios)
    figures = {"runs": found, "inline_over_exchange": ratios, "client_limit_mb": CLIENT_LIMIT_MB}
    record("process_memory", figures, {"settings": SETTINGS})
    clients = [r["peak_mb"]["ClientApp"] for r in found["exchange"]]
    return 0 if max(clients) < CLIENT_LIMIT_MB else 1


if __name__ == "__main__":
    sys.exit(main(*(int(word) for word in sys.argv[1:]), *(3,)[len(sys.argv) - 1 :]))
