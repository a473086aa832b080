"""Peak memory of every process that a run keeps outside its jobs, with 500 MB of weights.

A real run of the command: two local facilities, DiLoCo, one round of two steps, weights out of
band. The peak is the kernel's own (VmHWM), read about five times a second until the process ends.

    python benchmarks/exchange/process_memory.py

Writes ``benchmarks/results/process_memory.json``; exit code 1 if a ClientApp reaches 200 MB.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def look(run_dir: str, peaks: dict[str, float]) -> None:
    """Raise the peaks by what lives now."""
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            mine = run_dir in (status.parent / "environ").read_text(errors="replace")
            line = (status.parent / "cmdline").read_text(errors="replace")
            high = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        except OSError:
            continue  # gone, or another user's
        for word, name in PROGRAMS.items():
            if word in line and (mine or run_dir in line) and "submitit" not in line and high:
                peaks[name] = max(peaks.get(name, 0.0), int(high[1]) * 1024 / 1e6)


def main() -> int:
    """Run, print and record; 1 if the limit is broken."""
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        run_dir = f"{folder}/run"
        command = [sys.executable, "-m", "flwr_hpc.run", f"run_dir={run_dir}", *SETTINGS]
        with subprocess.Popen(command) as process:
            while process.poll() is None:
                look(run_dir, peaks)
                time.sleep(0.2)
        if process.returncode:
            return 1
        weights_mb = TensorFile(Path(run_dir) / "model" / "model.safetensors").nbytes / 1e6
    print(f"\npeak RSS with {weights_mb:.0f} MB of weights")
    for name, peak in sorted(peaks.items()):
        print(f"{name:<12}{peak:8.0f} MB")
    figures = {
        "weights_mb": round(weights_mb),
        "peak_mb": {name: round(peak) for name, peak in sorted(peaks.items())},
        "client_limit_mb": CLIENT_LIMIT_MB,
    }
    record("process_memory", figures, {"settings": SETTINGS})
    return 0 if peaks["ClientApp"] < CLIENT_LIMIT_MB else 1


if __name__ == "__main__":
    sys.exit(main())
