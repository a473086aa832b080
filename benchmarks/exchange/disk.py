"""What a run has on disk at its peak, in sizes of its model: at a site and at the server.

The command itself: two local facilities, seven orders each, 55 MB of weights, by strategy and
codec. Looked at up to fifty times a second: the blocks of every file, those with several names
once, and of those that are deleted and still mapped. Beside it what `dry_run=true` says.

    python benchmarks/exchange/disk.py [STRATEGY[+CODEC] ...]        e.g. diloco fedbuff+int8

Writes ``benchmarks/results/disk.json``; exit code 1 if a run has more than it is said to have.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from flwr_hpc.config.compose import compose_config
from flwr_hpc.exchange.tensorfile import TensorFile
from flwr_hpc.server.preflight import server_disk_of, site_disk_of, trained_parameters

sys.path.append(str(Path(__file__).parents[1]))
from _machine import record

RUNS = ("diloco", "fedbuff", "fedbackfill", "streaming_diloco", "diloco+int8")
SETTINGS = [
    "model.config.hidden_size=512",
    "model.config.intermediate_size=1536",
    "model.config.num_attention_heads=8",
    "model.config.num_key_value_heads=8",
    "+facility=[local_a,local_b]",
    "facilities.local_a.ranks_per_node=1",
    "facilities.local_b.ranks_per_node=1",
    "data.paths.local_a=[json]",
    "data.paths.local_b=[logging]",
    "data.seq_len=64",
    "data.held_out_sequences=2",
    "train.micro_batch=1",
    "train.steps=2",
]
ROUNDS = {"fedbuff": 14, "fedbackfill": 14}
SMALL = 1 << 20  # Files below are no weights


class Usage:
    """The largest sums of bytes seen, and what they were made of."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.peaks: dict[str, dict[str, float]] = {}

    def look(self) -> None:
        """Take in what is there now."""
        sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        seen = set()
        for path, inode, size in [*self._files(), *self._deleted()]:
            if inode not in seen:
                seen.add(inode)
                place, kind = self._kind(path)
                sums[place][kind] += size
        for place, kinds in sums.items():
            if sum(kinds.values()) > sum(self.peaks.get(place, {}).values()):
                self.peaks[place] = dict(kinds)

    def _files(self) -> list[tuple[Path, int, int]]:
        found = []
        for folder, _, names in os.walk(self.run_dir):
            for name in names:
                try:
                    status = os.lstat(os.path.join(folder, name))
                except FileNotFoundError:
                    continue
                if status.st_size > SMALL:
                    found.append((Path(folder, name), status.st_ino, 512 * status.st_blocks))
        return found

    def _deleted(self) -> list[tuple[Path, int, int]]:
        """Return files without a name that a process maps."""
        found = []
        for maps in Path("/proc").glob("[0-9]*/maps"):
            try:
                text = maps.read_text()
            except OSError:
                continue
            if str(self.run_dir) not in text:
                continue
            for line in text.splitlines():
                if line.endswith(" (deleted)") and str(self.run_dir) in line:
                    extent, _, offset, _, inode, name = line.split(maxsplit=5)
                    start, stop = (int(x, 16) for x in extent.split("-"))
                    path = Path(name.removesuffix(" (deleted)"))
                    found.append((path, int(inode), int(offset, 16) + stop - start))
        return [f for f in found if f[2] > SMALL]

    def _kind(self, path: Path) -> tuple[str, str]:
        parts = path.relative_to(self.run_dir).parts
        if parts[0] == "facilities":
            return parts[1], re.sub(r"^\.", "", parts[2])
        return "server", parts[0] if len(parts) < 3 else "/".join(parts[:2])


def measure(name: str) -> dict[str, Any]:
    """Run the command once; return its peaks beside what they may be."""
    strategy, *codec = name.split("+")
    settings = [*SETTINGS, f"strategy={strategy}", f"rounds={ROUNDS.get(strategy, 7)}"]
    settings += [f"exchange.codec={codec[0]}"] if codec else []
    with tempfile.TemporaryDirectory() as folder:
        usage = Usage(Path(folder, "run"))
        command = [sys.executable, "-m", "flwr_hpc.run", f"run_dir={usage.run_dir}", *settings]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                usage.look()
                time.sleep(0.02)
        if process.returncode:
            raise SystemExit(1)
        model = TensorFile(usage.run_dir / "model" / "model.safetensors").nbytes
    config = compose_config(settings)
    parameters = trained_parameters(config)
    assert parameters is not None
    site, server = site_disk_of(config, parameters).total, server_disk_of(config, parameters)
    said = {"site": site, "server": server}
    peaks = {
        place: {kind: round(size / model, 2) for kind, size in kinds.items()}
        for place, kinds in usage.peaks.items()
    }
    return {
        "run": name, "model_mb": round(model / 1e6), "peaks": peaks,
        "models": {place: round(sum(kinds.values()), 2) for place, kinds in peaks.items()},
        "at_most": {place: round(size / model, 2) for place, size in said.items()},
    }  # fmt: skip


def main(names: list[str]) -> int:
    """Run, print and record; 1 if a bound is broken."""
    rows = []
    for name in names or RUNS:
        rows.append(measure(name))
        print(json.dumps(rows[-1]), flush=True)
    if not names:
        record("disk", {"rows": rows}, {"settings": SETTINGS, "rounds": ROUNDS})
    broken = [
        row["run"] for row in rows for place, models in row["models"].items()
        if models > row["at_most"]["server" if place == "server" else "site"] + 0.05
    ]  # fmt: skip
    print("more than said:", broken or "none")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
