"""Virtual time, and the models of batch queues."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flwr_hpc.errors import UserError
from flwr_hpc.simulate.clock import HorizonReached, VirtualClock
from flwr_hpc.simulate.queues.cluster import BackfillCluster
from flwr_hpc.simulate.queues.models import (
    EmpiricalQueue,
    FirstWaitQueue,
    LognormalQueue,
    NoQueue,
    ReplayQueue,
    Ticket,
)
from flwr_hpc.simulate.queues.trace import TraceJob, TraceQueue, read_trace, similar_jobs


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ---- the clock ----------------------------------------------------------------------------------


def test_events_happen_in_order():
    """By time, at one time by the order of the calls; the past means now."""
    clock, seen = VirtualClock(), []
    for when, what in ((5.0, "c"), (1.0, "a"), (5.0, "d"), (2.0, "b")):
        clock.at(when, lambda what=what: seen.append((clock.now(), what)))
    clock.at(2.0, lambda: clock.at(0.0, lambda: seen.append((clock.now(), "late"))))
    clock.sleep(10.0)
    assert seen == [(1.0, "a"), (2.0, "b"), (2.0, "late"), (5.0, "c"), (5.0, "d")]
    assert clock.now() == 10.0


def test_sleep_goes_on_to_the_next_event():
    """Polling an idle federation costs nothing: no poll is played before something happens."""
    clock, seen = VirtualClock(), []
    clock.at(1000.0, lambda: seen.append(clock.now()))
    clock.sleep(1.0)
    assert (clock.now(), seen) == (1000.0, [1000.0])
    clock.sleep(1.0)
    assert clock.now() == 1001.0


def test_the_horizon_ends_it():
    """Before an event beyond it, and without one."""
    clock = VirtualClock(horizon_s=100.0)
    clock.sleep(99.0)
    clock.at(101.0, lambda: pytest.fail("beyond the horizon"))
    with pytest.raises(HorizonReached, match="100 s"):
        clock.sleep(0.5)
    assert clock.now() <= 100.0


# ---- sampled waits ------------------------------------------------------------------------------


def wait(queue: object, clock: VirtualClock) -> float:
    """Submit a job and return how long it waits."""
    began: list[float] = []
    at = clock.now()
    queue.submit(Ticket(1, 60.0, start=lambda: began.append(clock.now())))
    while not began:
        clock.sleep(1.0)
    return began[0] - at


def test_no_queue():
    """The job starts at once."""
    assert wait(NoQueue(), VirtualClock()) == 0.0


def test_lognormal_waits():
    """Median and spread are those asked for."""
    clock = VirtualClock()
    queue = LognormalQueue(clock, 1800.0, 0.8, 0.0, rng())
    logs = np.log([wait(queue, clock) for _ in range(2000)])
    assert np.exp(np.median(logs)) == pytest.approx(1800.0, rel=0.06)
    assert np.std(logs) == pytest.approx(0.8, rel=0.06)


def test_lognormal_waits_are_alike_for_a_while():
    """Correlation exp(-t / memory) of the logarithms."""
    levels = {600.0: [], 7200.0: []}
    for later, pairs in levels.items():
        for seed in range(600):
            clock = VirtualClock()
            queue = LognormalQueue(clock, 1.0, 1.0, 3600.0, rng(seed))
            first = np.log(queue.wait_s())
            clock.sleep(later)
            pairs.append((first, np.log(queue.wait_s())))
    for later, pairs in levels.items():
        found = np.corrcoef(np.array(pairs).T)[0, 1]
        assert found == pytest.approx(np.exp(-later / 3600.0), abs=0.1)


def test_lognormal_regimes():
    """The median is a function of the time."""
    clock = VirtualClock()
    queue = LognormalQueue(clock, lambda t: 10.0 if t < 5000.0 else 9000.0, 0.0, 0.0, rng())
    assert wait(queue, clock) == pytest.approx(10.0)
    clock.sleep(5000.0)
    assert wait(queue, clock) == pytest.approx(9000.0)


def test_empirical_waits_are_those_seen():
    """No other value, and all of them."""
    clock = VirtualClock()
    queue = EmpiricalQueue(clock, [3.0, 50.0, 700.0], rng())
    assert {round(wait(queue, clock)) for _ in range(60)} == {3, 50, 700}


def test_an_empirical_queue_without_waits():
    """Nothing to draw from is the user's to fix."""
    with pytest.raises(UserError, match="at least one wait"):
        EmpiricalQueue(VirtualClock(), [], rng())


def test_replayed_waits_keep_their_order():
    """Job by job as they were, then from the first again."""
    clock = VirtualClock()
    queue = ReplayQueue(clock, [3.0, 50.0, 7.0])
    assert [round(wait(queue, clock)) for _ in range(5)] == [3, 50, 7, 3, 50]
    with pytest.raises(UserError, match="at least one wait"):
        ReplayQueue(clock, [])


def test_a_cancelled_job_does_not_start():
    """It has left the queue."""
    clock = VirtualClock()
    queue = LognormalQueue(clock, 100.0, 0.0, 0.0, rng())
    ticket = Ticket(1, 60.0, start=lambda: pytest.fail("started"))
    queue.submit(ticket)
    ticket.cancelled = True
    clock.sleep(1000.0)


# ---- traces -------------------------------------------------------------------------------------

TRACE = """; Version: 2.2
; Computer: test
  1 0 120 3600 8 -1 -1 8 7200 -1 1 1 1 1 1 1 -1 -1
  2 9 777 3600 8 -1 -1 64 7200 -1 1 1 1 1 1 1 -1 -1

  3 9 888 3600 8 -1 -1 8 86400 -1 1 1 1 1 1 1 -1 -1
  4 9 -1 3600 8 -1 -1 8 7200 -1 1 1 1 1 1 1 -1 -1
  5 9 340 3600 8 -1 -1 -1 -1 -1 1 1 1 1 1 1 -1 -1
"""


def swf(folder: Path, text: str) -> Path:
    path = folder / "trace.swf"
    path.write_text(text)
    return path


def test_waits_of_a_trace(tmp_path):
    """Of jobs of about this size and length; what is not known (-1) does not speak against one."""
    path = swf(tmp_path, TRACE)
    assert [job.wait_s for job in similar_jobs(path, 8, 7200.0)] == [120.0, 340.0]
    assert [job.wait_s for job in similar_jobs(path, 24, 7200.0)] == [120.0, 777.0, 340.0]


def test_a_trace_is_replayed_at_its_times():
    """A job waits as the next one of the trace; after the last comes the first, times scaled."""
    jobs = [TraceJob(at, wait, 1, 60) for at, wait in ((100, 7), (110, 9), (130, 5))]
    clock, waits = VirtualClock(), []
    queue = TraceQueue(clock, jobs, begin_s=5.0, time_scale=10.0)

    def submit() -> None:
        now = clock.now()
        queue.submit(Ticket(1, 600.0, start=lambda: waits.append(clock.now() - now)))

    for at in (
        0.0,
        0.0,
        51.0,
        251.0,
    ):  # in the trace: 105, 105, 110.1, 100.1
        clock.at(at, submit)
    clock.sleep(1000.0)
    assert waits == [90.0, 90.0, 50.0, 90.0]


def test_the_first_job_alone_waits():
    """The oracle that no launcher can beat."""
    clock, started = VirtualClock(), []
    queue = FirstWaitQueue(ReplayQueue(clock, [70.0]))
    for _ in range(3):
        queue.submit(Ticket(1, 600.0, start=lambda: started.append(clock.now())))
    clock.sleep(100.0)
    assert started == [0.0, 0.0, 70.0]


def test_the_shipped_trace():
    """Jobs of a real Slurm, by time; enough of them like those of the scenario."""
    jobs = read_trace(Path("lab.swf"))
    assert [job.submit_s for job in jobs] == sorted(job.submit_s for job in jobs)
    assert len(similar_jobs(Path("lab.swf"), 1, 60.0)) > 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("job wait nodes\n", "line 1: not a line of the Standard Workload Format"),
        (TRACE + "6 1 2\n", "line 9: not a line"),
        ("; nothing\n", "no job with about 8 processors"),
    ],
)
def test_a_bad_trace(tmp_path, text, message):
    """The file, the line, and what was expected."""
    with pytest.raises(UserError, match=message):
        similar_jobs(swf(tmp_path, text), 8, 7200.0)


def test_a_missing_trace(tmp_path):
    """Named."""
    with pytest.raises(UserError, match=r"cannot read the trace .*no\.swf"):
        similar_jobs(tmp_path / "no.swf", 8, 7200.0)


# ---- the small cluster --------------------------------------------------------------------------


class Job:
    """A job of a hand-made schedule."""

    def __init__(self, cluster: BackfillCluster, nodes: int, runs: float, asks: float) -> None:
        self.began: float | None = None
        self.cluster, self.runs = cluster, runs
        self.ticket = Ticket(nodes, asks, start=self._start)
        cluster.submit(self.ticket)

    def _start(self) -> None:
        clock = self.cluster.clock
        self.began = clock.now()
        clock.at(clock.now() + self.runs, lambda: self.cluster.ended(self.ticket))


def empty(nodes: int = 4) -> tuple[VirtualClock, BackfillCluster]:
    """A cluster whose other users have next to nothing to do."""
    clock = VirtualClock()
    cluster = BackfillCluster(clock, nodes, 1e-9, 1.0, 1.0, rng())
    clock.advance(3600.0)
    return clock, cluster


def test_easy_backfill():
    """Small jobs go ahead where the first one is not delayed, by time or beside it."""
    clock, cluster = empty()
    t = clock.now()
    Job(cluster, 3, runs=100, asks=100)
    head = Job(cluster, 3, runs=100, asks=100)  # can start at t + 100, with one node to spare
    short = Job(cluster, 1, runs=90, asks=90)  # is gone by then
    clock.advance(t + 95)
    beside = Job(cluster, 1, runs=500, asks=500)  # fits beside it
    late = Job(cluster, 1, runs=50, asks=50)  # neither: no node is free
    clock.advance(t + 1000)
    assert [job.began - t for job in (head, short, beside)] == [100, 0, 95]
    assert late.began == t + 200


def test_backfill_goes_by_the_walltime_that_is_asked_for():
    """A job that asks for too much is not let ahead, however short it turns out."""
    clock, cluster = empty(nodes=2)
    t = clock.now()
    Job(cluster, 1, runs=100, asks=100)
    head = Job(cluster, 2, runs=10, asks=10)
    greedy = Job(cluster, 1, runs=5, asks=1000)
    clock.advance(t + 1000)
    assert (head.began - t, greedy.began - t) == (100, 110)


@pytest.mark.parametrize("seed", range(5))
def test_backfill_never_delays_the_first_job(seed):
    """Its start by the walltimes known when it became the first is an upper bound."""
    clock = VirtualClock()
    cluster = BackfillCluster(clock, 8, 0.95, 2.0, 600.0, rng(seed))
    promised: dict[int, float] = {}
    started: dict[int, float] = {}
    kept = []
    plain = cluster._start

    def start(ticket: Ticket) -> None:
        started[id(ticket)] = clock.now()
        plain(ticket)

    cluster._start = start
    for _ in range(400):
        clock.advance(clock.now() + 120.0)
        if cluster._queue:
            head = cluster._queue[0]
            kept.append(head)  # so that its id is not given to another
            promised.setdefault(id(head), cluster._reservation(head.nodes)[0])
    late = [t for t, due in promised.items() if t in started and started[t] > due + 1e-6]
    assert len(promised) > 20
    assert not late


def test_the_cluster_is_as_busy_as_asked_for():
    """Utilisation near the offered load, from the start: the others' jobs were there before."""
    used = []
    for seed in range(4):
        clock = VirtualClock()
        cluster = BackfillCluster(clock, 16, 0.8, 2.0, 600.0, rng(seed), warmup_s=24 * 600.0)
        assert clock.now() == 0.0
        for _ in range(500):
            used.append(1 - cluster._free() / 16)
            assert 0 <= cluster._free() <= 16
            clock.advance(clock.now() + 120.0)
    assert np.mean(used) == pytest.approx(0.8, abs=0.1)
    assert np.mean(used[::500]) > 0.4


def test_a_job_waits_longer_where_there_is_more_load():
    """The queue is the other users'."""
    means = []
    for load in (0.4, 0.95):
        waits = []
        for seed in range(12):
            clock = VirtualClock()
            cluster = BackfillCluster(clock, 16, load, 2.0, 600.0, rng(seed), warmup_s=24 * 600.0)
            waits.append(wait_in(cluster, clock, nodes=8))
        means.append(np.mean(waits))
    assert means[0] < 600 < means[1]


def wait_in(cluster: BackfillCluster, clock: VirtualClock, nodes: int) -> float:
    job = Job(cluster, nodes, 10, 7200)
    while job.began is None:
        clock.sleep(1.0)
    return job.began


@pytest.mark.parametrize("when", ["queued", "starting", "running"])
def test_a_cancelled_job_frees_its_nodes(when):
    """In the queue, in the moment between its turn and its start, and while it runs."""
    clock, cluster = empty(nodes=2)
    first = Job(cluster, 2, runs=100, asks=100) if when == "queued" else None
    job = Job(cluster, 2, runs=100, asks=100)
    if when == "running":
        clock.advance(clock.now() + 1)
    job.ticket.cancelled = True
    if when == "running":
        cluster.ended(job.ticket)
    t = clock.now()
    other = Job(cluster, 2, runs=1, asks=1)
    clock.advance(t + 150)
    assert (job.began is not None) == (when == "running")
    assert other.began == t + (100 if first else 0)


def test_a_job_that_never_fits():
    """Would wait for ever: said at once."""
    _, cluster = empty(nodes=2)
    with pytest.raises(UserError, match="3 nodes never fits a cluster of 2"):
        Job(cluster, 3, 1, 1)
