"""Events of a made-up run on batch systems: successors ahead, a requeue, a lost node."""

from __future__ import annotations

from typing import Any

Event = dict[str, Any]
T0 = 1.7e9
LUMI_AHEAD_S = 3600.0  # its clock is wrong by an hour


class Log:
    """Collects the events of one facility; times are seconds of the run."""

    def __init__(self, facility: str, skew_s: float = 0.0) -> None:
        self.facility, self.skew_s = facility, skew_s
        self.events: list[Event] = []
        self.jobs: dict[str, dict[str, Any]] = {}
        self.ledger: dict[str, dict[str, float]] = {}

    def job(self, name: str, **facts: Any) -> None:
        """Say what the scheduler says of a job from now on."""
        times = {k: T0 + v + self.skew_s for k, v in facts.items() if k.endswith("_s") and v}
        number = str(4700 + int(name[1:]))
        self.jobs[name] = {**self.jobs.get(name, {"id": number}), **facts, **times}

    def emit(self, s: float, event: str, **fields: Any) -> None:
        base = {"t": T0 + s, "s": s, "event": event, "facility": self.facility}
        self.events.append({**base, **fields})

    def allocation(self, s: float, name: str, state: str, **fields: Any) -> None:
        self.emit(s, "allocation", allocation=name, state=state, **self._account(), **fields)

    def order(self, sent_s: float, done_s: float, seq: int, name: str, **seconds: float) -> None:
        """Send and finish an order that trained for most of the time."""
        order = {"order_id": f"k-{self.facility}-{seq:06d}", "kind": "train", "version": seq}
        self.emit(sent_s, "order_sent", **order, steps=40, attempt=1)
        self.done(done_s, order, name, train=0.8 * (done_s - sent_s), **seconds)

    def done(self, s: float, order: dict[str, Any], name: str, **seconds: float) -> None:
        self.ledger[name]["train"] += seconds["train"]
        metrics = {"train_loss": 5.0 / (1 + order["version"]), "tokens_per_s": 9000.0}
        self.emit(s, "order_done", **order, steps=40, tokens=10_000, metrics=metrics,
                  seconds=seconds, **self._account())  # fmt: skip

    def worker(self, name: str, queue: float, train: float = 0.0, idle: float = 0.0) -> None:
        """A worker starts in an allocation; `queue` is that of all its cycles."""
        self.ledger[name] = {
            "queue": queue, "startup": 20.0, "load": 100.0, "train": train, "idle": idle
        }  # fmt: skip

    def _account(self) -> dict[str, Any]:
        return {
            "jobs": {n: dict(j) for n, j in self.jobs.items()},
            "ledger": {n: dict(x) for n, x in self.ledger.items()},
        }


def leonardo() -> list[Event]:
    """A successor that queues and loads ahead, is preempted, requeued, and goes on."""
    log = Log("leonardo")
    log.job("a0000", nodes=4, submitted_s=5.0)
    log.allocation(10, "a0000", "queued", queue_wait_s=700.0, queue_wait_high_s=2400.0,
                   reason="Priority")  # fmt: skip
    log.job("a0000", nodes=4, eligible_s=6.0, started_s=605.0)
    log.worker("a0000", queue=600, idle=30)
    log.allocation(740, "a0000", "ready", walltime_left_s=3000.0)
    log.order(741, 1500, 0, "a0000")
    log.job("a0001", nodes=4, submitted_s=1600.0)
    log.allocation(1630, "a0000", "ready", walltime_left_s=2100.0)
    log.order(1505, 2400, 1, "a0000")
    log.job("a0001", nodes=4, started_s=2500.0)
    log.worker("a0001", queue=900, idle=400)
    log.allocation(2625, "a0000", "ready", walltime_left_s=1100.0)
    log.order(2405, 3300, 2, "a0000")
    log.job("a0000", nodes=4, ended_s=3308.0, outcome="completed")
    log.allocation(3310, "a0000", "ended")
    log.allocation(3310, "a0001", "ready", walltime_left_s=3000.0)
    order = {"order_id": "k-leonardo-000003", "kind": "train", "version": 3}
    log.emit(3312, "order_sent", **order, steps=40, attempt=1)
    log.ledger["a0001"]["train"] = 400.0  # of which a checkpoint saves 300
    log.job("a0001", nodes=4, ended_s=3800.0, restarts=1)
    log.allocation(3820, "a0001", "queued", queue_wait_s=500.0, reason="BeginTime")
    first = {k: log.jobs["a0001"][k] for k in ("submitted_s", "started_s", "ended_s")}
    log.worker("a0001", queue=1500)
    log.jobs["a0001"].pop("ended_s")
    log.job("a0001", nodes=4, submitted_s=3800.0, started_s=4400.0)
    log.jobs["a0001"]["cycles"] = [first, {k: log.jobs["a0001"].get(k) for k in first}]
    log.allocation(4530, "a0001", "ready", walltime_left_s=3000.0)
    log.done(5000, order, "a0001", train=420.0, resumed=300.0)
    return log.events


def lumi() -> list[Event]:
    """A node fails in the middle of an order; the clock is an hour ahead of the server's."""
    log = Log("lumi", LUMI_AHEAD_S)
    log.job("a0000", nodes=2, submitted_s=5.0)
    log.allocation(9, "a0000", "queued", reason="Resources")
    log.job("a0000", nodes=2, started_s=1005.0)
    log.worker("a0000", queue=1000)
    log.allocation(1130, "a0000", "ready", walltime_left_s=7000.0)
    log.order(1131, 1900, 0, "a0000")
    order = {"order_id": "k-lumi-000001", "kind": "train", "version": 1}
    log.emit(1901, "order_sent", **order, steps=40, attempt=1)
    log.emit(2100, "order_progress", order_id=order["order_id"], step=9, steps=40, loss=3.0)
    log.ledger["a0000"]["train"] += 500.0
    log.job("a0000", nodes=2, ended_s=2450.0, outcome="node_fail")
    log.job("a0001", nodes=2, submitted_s=2460.0)
    log.allocation(2461, "a0000", "ended")
    log.allocation(2461, "a0001", "queued", queue_wait_s=400.0, queue_wait_high_s=900.0)
    log.job("a0001", nodes=2, started_s=3060.0)
    log.worker("a0001", queue=600)
    log.allocation(3185, "a0001", "ready", walltime_left_s=7000.0)
    log.done(4000, order, "a0001", train=780.0)
    log.order(4005, 4900, 2, "a0001")
    return log.events


def plain() -> list[Event]:
    """A facility of which no scheduler tells."""
    log = Log("other")
    log.emit(30, "order_sent", order_id="k-other-000000", kind="train", version=0, steps=40)
    order = {"order_id": "k-other-000000", "kind": "train", "version": 0}
    log.ledger["x"] = {"queue": 0.0, "startup": 50.0, "load": 10.0, "train": 0.0, "idle": 7.0}
    log.done(2000, order, "x", train=1800.0)
    return log.events


def job_events() -> list[Event]:
    """Return the whole run's events in order."""
    start = {"t": T0, "s": 0.0, "event": "run_started", "run_key": "k", "strategy": "FedBuff",
             "rounds": 4, "facilities": ["leonardo", "lumi", "other"], "version": 0}  # fmt: skip
    end = {"t": T0 + 5100, "s": 5100.0, "event": "run_finished", "status": "finished"}
    events = [*leonardo(), *lumi(), *plain()]
    return [start, *sorted(events, key=lambda e: e["s"]), end]
