"""A worker without torch that speaks the spool protocol: what a job runs in tests.

``settings.json`` may hold ``idle_timeout_s``, ``fail`` (error while loading) and ``fatal``; an
order's options may hold ``seconds`` (how long it takes, in steps of `BEAT_S`), ``gate`` (a step
that it does not go beyond until the test puts the file `GATE` into the spool) and ``fail``.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import submitit

from flwr_hpc.files import publish
from flwr_hpc.protocol import Order, Result
from flwr_hpc.spool import CHECKPOINT_META, AllocationDir, WorkerState, checkpoint_name
from flwr_hpc.worker.deadline import Deadline

BEAT_S = 0.05
GATE = "gate-is-open"
LEFT = ("closed", "failed", "interrupted")


def run(allocation_dir: str) -> None:
    """Be one rank: rank 0 does all the work, the others wait for its end."""
    alloc = AllocationDir(Path(allocation_dir))
    if submitit.JobEnvironment().global_rank == 0:
        _Worker(alloc).run()
        return
    Deadline()  # rank 0 decides what a signal means
    former = alloc.state()  # of this job before it was requeued
    while (state := alloc.state()) is None or state.state not in LEFT or _same(state, former):
        time.sleep(BEAT_S)


def _same(state: WorkerState, former: WorkerState | None) -> bool:
    return state.state == "interrupted" and former is not None and state.beat == former.beat


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
        self.alloc, self.settings = alloc, alloc.settings()
        self.spool = alloc.spool
        self.deadline = Deadline.detect(None)
        former = alloc.state()
        self.beat = former.beat if former else 0

    def say(self, state: str, order_id: str = "", **fields: object) -> None:
        self.beat += 1
        left = self.deadline.walltime_left()
        seconds = {"startup": 0.1, "load": 0.1, "idle": 0.1} if state != "starting" else {}
        self.alloc.write_state(
            WorkerState(state, order_id, self.beat, left, seconds, **fields)  # type: ignore[arg-type]
        )

    def run(self) -> None:
        self.say("starting")
        if "fail" in self.settings:
            error, fatal = str(self.settings["fail"]), bool(self.settings.get("fatal"))
            self.alloc.write_state(WorkerState("failed", error=error, fatal=fatal))
            raise RuntimeError(error)
        self.serve()
        self.say("interrupted" if self.deadline.interrupted else "closed")

    def serve(self) -> None:
        idle_since = time.monotonic()
        while time.monotonic() - idle_since < self.settings.get("idle_timeout_s", 60):
            released = self.alloc.released
            todo = [i for i in self.alloc.inbox() if self.spool.order(i).result() is None]
            if self.deadline.should_stop():
                break
            if todo:
                if not self.work(todo[0]):
                    break
                idle_since = time.monotonic()
            elif released:
                break
            else:
                self.say("ready")
                time.sleep(BEAT_S)

    def work(self, order_id: str) -> bool:
        """Publish the order's result; False if it is left to another job."""
        folder = self.spool.order(order_id)
        order, _ = folder.order()
        steps = int(float(order.options.get("seconds", 0)) / BEAT_S)
        step = self.saved(order_id)
        while step < steps and not self.deadline.should_stop():
            step += not self.waits_at(step, order)
            folder.write_progress({"step": step, "steps": steps, "loss": 1.0})
            self.say("running", order_id)
            time.sleep(BEAT_S)
        if step < steps and self.deadline.interrupted:
            checkpoint = self.spool.checkpoints / checkpoint_name(order_id, step)
            publish(checkpoint / CHECKPOINT_META, json.dumps({"steps": step}))
            return False
        if step == 0 < steps:
            return False
        with open(self.spool.root / "trained.log", "a") as log:  # each line: one order trained
            log.write(f"{order_id} {self.alloc.name}\n")
        folder.write_result(_result(order, step if step < steps else order.steps))
        return True

    def waits_at(self, step: int, order: Order) -> bool:
        """Tell whether the test wants the order to stay in the middle."""
        return step == order.options.get("gate") and not (self.spool.root / GATE).exists()

    def saved(self, order_id: str) -> int:
        found = self.spool.checkpoints.glob(f"{order_id}@*")
        return max((int(path.name.rpartition("@")[2]) for path in found), default=0)


def _result(order: Order, steps: int) -> Result:
    if "fail" in order.options:
        return Result(order.id, "failed", error=str(order.options["fail"]))
    return Result(order.id, "done", steps=steps, metrics={"train_loss": 1.0})
