"""Two facilities against one: what a second centre's compute brings, and what it costs.

Two real Slurm clusters of one core each (`tests/lab`, as root). A model is trained by the whole
command at one of them, which has all of the data, and by both, which have half of it each: for
about equal time, and for equal tokens. Each of both takes the steps of the one with the same batch
(twice the tokens in as many rounds), or with half of it (the federation's batch is the one's). With
`--continued` all start from a checkpoint that one of them trained before, on other sequences, for
as many rounds. All runs are evaluated on the same held-out files. The clusters share this machine
with the server, so keep it quiet: a run of two needs three cores, and of one, two.

    python benchmarks/clusters/two_facilities.py [--rounds N] [--batch N] [--repetitions N]
        [--share-batch] [--continued] [--skip-equal-time]

Writes ``benchmarks/results/two_facilities.json``; ``_share_batch`` and ``_continued`` are in the
name where they are asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any
from zlib import crc32

import yaml

sys.path.append(str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from _machine import record
from lab.cluster import Cluster
from lab.plan import Shape

ROOT = Path(__file__).parents[2]
NAMES = ("cross_a", "cross_b")
HELD_OUT = 20  # One file in so many
SETTINGS = (
    "strategy=diloco", "data=text", "train.steps=200", "train.micro_batch=8",
    "train.warmup_steps=20", "data.seq_len=128",
)  # fmt: skip


def files() -> dict[str, list[str]]:
    """Return the standard library's modules, dealt out to the facilities and held out."""
    parts: dict[str, list[str]] = {name: [] for name in (*NAMES, "held out")}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        lot = crc32(path.name.encode())
        parts["held out" if lot % HELD_OUT == 0 else NAMES[lot % 2]].append(str(path))
    return parts


def write_conf(folder: Path, clusters: Mapping[str, Cluster]) -> Path:
    """Write a file per facility."""
    (folder / "facility").mkdir(parents=True)
    for name, cluster in clusters.items():
        facility = {
            "scheduler": "slurm", "account": None, "partition": "main", "nodes": 1,
            "ranks_per_node": 1, "gpus_per_node": 0, "cpus_per_rank": 1, "walltime": "00:30:00",
            "poll_s": 1, "env": {"SLURM_CONF": str(cluster.conf)},
        }  # fmt: skip
        text = f"# @package facilities.{name}\n{yaml.safe_dump(facility)}"
        (folder / "facility" / f"{name}.yaml").write_text(text)
    return folder


def train(
    conf: Path, folder: Path, names: tuple[str, ...], rounds: int, batch: int, *more: str
) -> dict[str, float]:
    """Run a federation to its end and return its figures."""
    parts = files()
    everything = [path for name in NAMES for path in parts[name]]
    own = {name: parts[name] if len(names) > 1 else everything for name in names}
    settings = [
        f"--config-dir={conf}", f"+facility=[{','.join(names)}]", f"rounds={rounds}",
        f"run_dir={folder}", f"train.batch_size={batch}", *SETTINGS, *more,
        *(f"+data.paths.{name}={json.dumps(paths)}" for name, paths in own.items()),
        *(f"+data.held_out_paths.{name}={json.dumps(parts['held out'])}" for name in names),
    ]  # fmt: skip
    env = os.environ | {"FLWR_HPC_STATE": f"{folder}-state", "OMP_NUM_THREADS": "1"}
    with open(folder.with_suffix(".log"), "wb") as log:
        command = [sys.executable, "-m", "flwr_hpc.run", *settings]
        subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=log, timeout=1800)
    return figures(folder)


def figures(folder: Path) -> dict[str, float]:
    """Return tokens, seconds and loss; the time begins with the first order that trains."""
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished", folder.with_suffix(".log").read_text()[-3000:]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    done = [e for e in events if e["event"] == "order_done" and e["kind"] == "train"]
    began = min(e["t"] for e in events if e["event"] == "order_sent" and e["kind"] == "train")
    ended = max(e["t"] for e in events if e["event"] == "aggregated")
    tokens = sum(e["tokens"] for e in done)
    losses = [f["held_out_loss_last"] for f in summary["facilities"].values()]
    return {
        "tokens": tokens, "seconds": ended - began, "wall_s": summary["wall_s"],
        "tokens_per_s": tokens / (ended - began), "held_out_loss": max(losses),
        "trained_share": sum(e["seconds"]["train"] for e in done)
        / (ended - began) / len(summary["facilities"]),
    }  # fmt: skip


def compare(conf: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train in all ways."""
    batch, rounds, start = options.batch, options.rounds, []
    if options.continued:
        before = train(conf, folder / "before", NAMES[:1], rounds, batch, "seed=1")
        start = [f"model.path={folder / 'before' / 'model'}", "data.tokenizer=byte"]
    alone, longer = (2 * batch, 2 * rounds) if options.share_batch else (batch, rounds)
    one = train(conf, folder / "one", NAMES[:1], rounds, alone, *start)
    half = train(conf, folder / "two-half", NAMES, longer // 2, batch, *start)
    found = {
        "one": one, "two, equal tokens": half,
        "tokens_per_s_ratio": half["tokens_per_s"] / one["tokens_per_s"],
        "loss_ratio_at_equal_tokens": half["held_out_loss"] / one["held_out_loss"],
    }  # fmt: skip
    if options.continued:
        found["before"] = before
    if not options.skip_equal_time:
        two = found["two, equal time"] = train(conf, folder / "two", NAMES, longer, batch, *start)
        found["tokens_per_s_ratio"] = two["tokens_per_s"] / one["tokens_per_s"]
        found["loss_ratio_at_equal_time"] = two["held_out_loss"] / one["held_out_loss"]
    return found


def main() -> None:
    """Run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="of the one facility")
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step, at each of two")
    for name in ("--share-batch", "--continued", "--skip-equal-time"):
        parser.add_argument(name, action="store_true")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="two-")))
        shape = Shape(nodes=1, cpus=1, accounting=False)
        clusters = {name: stack.enter_context(Cluster.up(name, shape)) for name in NAMES}
        conf = write_conf(folder / "conf", clusters)
        found = []
        for k in range(options.repetitions):
            (folder / str(k)).mkdir()
            found.append(compare(conf, folder / str(k), options))
            print(json.dumps(found[-1], indent=1), flush=True)
    names = [key for key in found[0] if "ratio" in key]
    ratios = {name: median(one[name] for one in found) for name in names}
    print(ratios)
    record(
        "two_facilities" + "_share_batch" * options.share_batch + "_continued" * options.continued,
        {"ratios": ratios, "runs": found},
        {"rounds": options.rounds, "batch": options.batch, "settings": SETTINGS},
    )


if __name__ == "__main__":
    main()
