"""A worker without torch that speaks the spool protocol: what a job runs in tests.

``spec.json`` may hold ``idle_timeout_s``, ``fail`` (error while loading) and ``fatal``; an
order's options may hold ``seconds`` (how long it takes) and ``fail``.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import submitit

from flwr_hpc.protocol import Order, Result
from flwr_hpc.spool import AllocationDir, Spool, WorkerState, publish

BEAT_S = 0.05


def run(allocation_dir: str) -> None:
    """Be one rank: rank 0 does all the work, the others wait for its end."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    alloc = AllocationDir(Path(allocation_dir))
    if submitit.JobEnvironment().global_rank == 0:
        _Worker(alloc).run()
        return
    while (state := alloc.state()) is None or state.state not in ("closed", "failed"):
        time.sleep(BEAT_S)


def dump_environment(folder: str) -> None:
    """Write this rank's environment down."""
    rank = submitit.JobEnvironment().global_rank
    publish(Path(folder) / f"env-{rank}.json", json.dumps(dict(os.environ)))


def sleep(folder: str) -> None:
    """Say that this rank is up, and do nothing for long."""
    dump_environment(folder)
    time.sleep(300)


def fail_on_rank_1(folder: str) -> None:
    """Fail on one rank while the other would go on for long."""
    if submitit.JobEnvironment().global_rank == 1:
        raise ValueError("rank 1 has had enough")
    time.sleep(300)


class _Worker:
    def __init__(self, alloc: AllocationDir) -> None:
        self.alloc, self.spec = alloc, alloc.spec()
        self.spool = Spool(alloc.path.parents[1])
        self.beat, self.began = 0, time.monotonic()

    def say(self, state: str, order_id: str = "", **fields: object) -> None:
        self.beat += 1
        left = float(os.environ["FLWR_HPC_WALLTIME_S"]) - (time.monotonic() - self.began)
        seconds = {"startup": 0.1, "load": 0.1, "idle": 0.1} if state != "starting" else {}
        self.alloc.write_state(
            WorkerState(state, order_id, self.beat, left, seconds, **fields)  # type: ignore[arg-type]
        )

    def run(self) -> None:
        self.say("starting")
        if "fail" in self.spec:
            error, fatal = str(self.spec["fail"]), bool(self.spec.get("fatal"))
            self.alloc.write_state(WorkerState("failed", error=error, fatal=fatal))
            raise RuntimeError(error)
        idle_since = time.monotonic()
        while time.monotonic() - idle_since < self.spec.get("idle_timeout_s", 60):
            todo = [i for i in self.alloc.inbox() if self.spool.order(i).result() is None]
            if todo:
                self.work(todo[0])
                idle_since = time.monotonic()
            elif self.alloc.released:
                break
            else:
                self.say("ready")
                time.sleep(BEAT_S)
        self.say("closed")

    def work(self, order_id: str) -> None:
        folder = self.spool.order(order_id)
        order, _ = folder.order()
        until = time.monotonic() + float(order.options.get("seconds", 0))
        step = 0
        while time.monotonic() < until:
            step += 1
            folder.write_progress({"step": step, "steps": order.steps, "loss": 1.0})
            self.say("running", order_id)
            time.sleep(BEAT_S)
        with open(self.spool.root / "trained.log", "a") as log:  # each line: one order trained
            log.write(f"{order_id} {self.alloc.name}\n")
        folder.write_result(_result(order))


def _result(order: Order) -> Result:
    if "fail" in order.options:
        return Result(order.id, "failed", error=str(order.options["fail"]))
    return Result(order.id, "done", steps=order.steps, metrics={"train_loss": 1.0})
