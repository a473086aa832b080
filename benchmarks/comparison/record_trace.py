"""Record a trace of real queue waits, in the Standard Workload Format.

Brings up a real Slurm cluster (`tests/lab`, as root) and keeps it contended by a seeded schedule of
jobs, in spells of much and of little work. What Slurm says of every job in the end becomes a line
of the trace that the simulator's scenario `trace` replays. Hours of a centre are seconds here.

    python benchmarks/comparison/record_trace.py [seconds]

Writes ``conf/traces/lab.swf``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from lab.cluster import Cluster
from lab.host import missing
from lab.plan import Shape

TRACE = Path(__file__).parents[2] / "conf" / "traces" / "lab.swf"
SEED = 7
NODES = 8
LOADS = (1.15, 0.85, 1.1, 0.6)  # offered work as a share of the cluster, spell by spell
SPELL_S = 120.0
MEAN_RUN_S, LONGEST_RUN_S = 9.0, 55.0
SIZES, SHARES = (1, 2, 4), (0.6, 0.3, 0.1)  # nodes of a job
FIELDS = 18  # of a line
STATUS = {"COMPLETED": 1, "FAILED": 0, "TIMEOUT": 0, "CANCELLED": 5}


@dataclass(frozen=True)
class Load:
    """A job to be submitted; times in seconds."""

    at: float
    nodes: int
    run_s: float
    limit_min: int


def schedule(seconds: float) -> Iterator[Load]:
    """Yield the jobs in the order of their submission."""
    rng, at = np.random.default_rng(SEED), 0.0
    mean_nodes = float(np.dot(SIZES, SHARES))
    while at < seconds:
        load = LOADS[int(at / SPELL_S) % len(LOADS)]
        at += float(rng.exponential(MEAN_RUN_S * mean_nodes / (load * NODES)))
        run_s = float(np.clip(rng.lognormal(np.log(MEAN_RUN_S) - 0.32, 0.8), 1, LONGEST_RUN_S))
        yield Load(at, int(rng.choice(SIZES, p=SHARES)), run_s, int(rng.choice([1, 1, 1, 2])))


def play(cluster: Cluster, jobs: Sequence[Load]) -> None:
    """Submit every job at its time, and return when all have ended."""
    began = time.monotonic()
    for job in jobs:
        time.sleep(max(0.0, began + job.at - time.monotonic()))
        shape = [f"--nodes={job.nodes}", f"--time={job.limit_min}", "--exclusive"]
        output = ["--output=/dev/null", "--chdir=/", "--partition=main"]
        command = ["sbatch", *shape, *output, f"--wrap=sleep {job.run_s:.1f}"]
        cluster.slurm(*command, user="nobody")
    while cluster.slurm("squeue", "--noheader").strip():
        time.sleep(2.0)


def lines(listing: str) -> Iterator[str]:
    """Yield the trace's lines, by submission, from squeue's."""
    jobs = [line.split("|") for line in listing.splitlines()]
    rows = sorted((_time(job[1]), int(job[0]), job) for job in jobs)
    for number, (submit, _, job) in enumerate(rows, 1):
        _, _, start, end, nodes, limit, state = job
        fields = [-1] * FIELDS
        fields[:5] = [
            number,
            submit - rows[0][0],
            _time(start) - submit,
            _time(end) - _time(start),
            int(nodes),
        ]
        fields[7], fields[8], fields[10] = int(nodes), 60 * _minutes(limit), STATUS.get(state, -1)
        yield " ".join(str(field) for field in fields)


def _time(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp())


def _minutes(limit: str) -> int:
    """Return the minutes of a time limit MM:SS."""
    return int(limit.split(":")[0])


def main(seconds: float) -> None:
    """Record and write the trace."""
    if reason := missing():
        sys.exit(f"cannot record: {reason}")
    jobs = list(schedule(seconds))
    shape = Shape(nodes=NODES, cpus=1, accounting=False, min_job_age_s=36000)
    with Cluster.up("trace", shape) as cluster:
        play(cluster, jobs)
        listing = cluster.slurm(
            "squeue", "--states=all", "--noheader", "--format=%i|%V|%S|%e|%D|%l|%T"
        )
        slurm = cluster.slurm("sinfo", "--version").strip()
    header = [
        "Version: 2.2",
        f"Computer: {slurm} of tests/lab, {NODES} nodes of 1 processor",
        f"MaxJobs: {len(jobs)}",
        f"MaxNodes: {NODES}",
        f"Note: made by benchmarks/comparison/record_trace.py, seed {SEED}: sleeping jobs,",
        f"Note: offered load {LOADS} of the cluster,",
        f"Note: in turns of {SPELL_S:g} s, mean runtime {MEAN_RUN_S:g} s",
        "Note: submit, wait and run are Slurm's own, whole seconds; not known: -1",
    ]
    text = "".join(f"; {line}\n" for line in header) + "\n".join(lines(listing)) + "\n"
    TRACE.parent.mkdir(exist_ok=True)
    TRACE.write_text(text)
    waits = sorted(int(line.split()[2]) for line in text.splitlines() if line[0] != ";")
    quantiles = [waits[int(q * (len(waits) - 1))] for q in (0.1, 0.5, 0.9, 1.0)]
    print(f"{TRACE}: {len(waits)} jobs, waits at 0.1, 0.5, 0.9, 1.0: {quantiles} s")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 1500.0)
