"""An allocation's worker that trains the simulator's network at a given pace.

Everything else is as in `flwr_hpc.train.worker`: start-up in a real job, orders from the spool,
the walltime's end, results and states as files. ``PACED_STEP_S`` is what a step takes; what the
computation leaves of it is slept. Beside the orders, ``paced.jsonl`` in the site's folder tells
when what happened.
"""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from flwr_hpc.clock import SystemClock
from flwr_hpc.exchange.tensorfile import sha256_of, write_stream
from flwr_hpc.files import publish
from flwr_hpc.protocol import Order, Result
from flwr_hpc.simulate.learning.network import NetworkConfig, NetworkLearner
from flwr_hpc.spool import AllocationDir, OrderDir, Spool
from flwr_hpc.worker.deadline import Deadline, Stop
from flwr_hpc.worker.inbox import Inbox
from flwr_hpc.worker.phase_timer import PhaseTimer, process_start
from flwr_hpc.worker.reporter import Reporter

__all__ = ["run"]


def run(allocation_dir: Path) -> None:
    """Serve an allocation of one rank."""
    allocation = AllocationDir(Path(allocation_dir))
    timer, deadline = PhaseTimer(), Deadline.detect(allocation.settings()["walltime_s"])
    with Reporter(allocation, timer, deadline) as reporter:
        reporter.set_state("starting")
        _Worker(allocation, timer, deadline, reporter).serve()
        reporter.set_state("interrupted" if deadline.interrupted else "closed")


class _Worker:
    def __init__(
        self, allocation: AllocationDir, timer: PhaseTimer, deadline: Deadline, reporter: Reporter
    ) -> None:
        self.timer, self.deadline, self.reporter = timer, deadline, reporter
        self.allocation, self.spool = allocation, Spool(allocation.path.parents[1])
        self.step_s = float(os.environ["PACED_STEP_S"])
        spec = allocation.settings()
        self.site = spec["facilities"].index(spec["facility"])
        self.new = NetworkLearner(len(spec["facilities"]), NetworkConfig(), spec["seed"])
        self.inbox = Inbox(allocation, self.spool, spec["idle_timeout_s"], self._over)

    def serve(self) -> None:
        self.timer.switch_to("idle")
        self.reporter.set_state("ready")
        self._tell("ready", began=time.time() - time.monotonic() + process_start(SystemClock()))
        while order_id := self.inbox.next():
            self.reporter.set_state("running", order_id)
            if not self._carry_out(order_id):
                break
            self.reporter.set_state("ready")
        if self.deadline.should_stop(self.step_s) is Stop.FINISH:
            self._tell("over", left_s=self.deadline.walltime_left())

    def _over(self) -> bool:
        return bool(self.deadline.should_stop(self.step_s))

    def _carry_out(self, order_id: str) -> bool:
        """Publish the order's result; False if it is left to another allocation."""
        seen, folder = time.time(), self.spool.order(order_id)
        order, weights = folder.order()
        learner = self._learner()
        arrays = learner.initial() if weights is None else load_file(weights)
        metrics: dict[str, float] = {}
        if order.evaluate or order.kind == "evaluate":
            metrics["held_out_loss"] = learner.evaluate(arrays)
        began, steps = time.monotonic(), 0
        if order.kind == "train":
            with self.timer.during("train"):
                arrays, loss, steps = self._train(order, learner, arrays)
            if steps == 0 or self.deadline.interrupted:
                return False
            metrics["train_loss"] = loss
        trained = time.monotonic()
        with self.timer.during("transfer"):
            result = self._write(order, folder, learner, arrays, steps, metrics, trained - began)
        self.deadline.reserve_s = 2.0 * (time.monotonic() - trained + self.step_s) + 1.0
        folder.write_result(result)
        self._tell("order", order=order_id, seen=seen, train_s=trained - began)
        return True

    def _train(self, order: Order, learner: NetworkLearner, arrays: Any) -> tuple[Any, float, int]:
        """Take the steps' time, and train them in the last one's."""
        began = time.monotonic()
        for step in range(order.steps):
            if self._over():
                return *self._learn(order, learner, arrays, step), step
            if step == order.steps - 1:
                arrays, loss = self._learn(order, learner, arrays, order.steps)
            time.sleep(max(0.0, began + (step + 1) * self.step_s - time.monotonic()))
        return arrays, loss, order.steps

    def _learn(
        self, order: Order, learner: NetworkLearner, arrays: Any, steps: int
    ) -> tuple[Any, float]:
        scale = float(order.options.get("lr-scale", 1.0))
        mu = float(order.options.get("proximal-mu", 0.0))
        return learner.train(self.site, arrays, steps, scale, mu, arrays)

    def _write(
        self,
        order: Order,
        folder: OrderDir,
        learner: NetworkLearner,
        arrays: Any,
        steps: int,
        metrics: dict[str, float],
        train_s: float,
    ) -> Result:
        publish(self.spool.root / "learner.pkl", pickle.dumps(learner))
        done = max(1, steps)
        seconds = {"train": train_s}
        result = Result(order.id, "done", steps, steps, done, metrics, seconds=seconds)
        if order.kind == "evaluate":
            return result
        write_stream(folder.weights, arrays.items())
        written = {"weights": folder.weights.name, "sha256": sha256_of(folder.weights)}
        return Result(**(vars(result) | written))

    def _learner(self) -> NetworkLearner:
        """Return the learner as the site's last order left it."""
        saved = self.spool.root / "learner.pkl"
        if not saved.exists():
            return self.new
        learner = pickle.loads(saved.read_bytes())
        assert isinstance(learner, NetworkLearner)
        return learner

    def _tell(self, what: str, **fields: Any) -> None:
        told = {"what": what, "t": time.time(), "allocation": self.allocation.name, **fields}
        with open(self.spool.root / "paced.jsonl", "a") as log:
            log.write(json.dumps(told) + "\n")
