"""One simulated site: its allocations, orders and messages, against a clock that is watched."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from worlds.driven import record
from worlds.grid import name_this_process

from flwr_hpc import protocol
from flwr_hpc.protocol import Order, Status
from flwr_hpc.simulate.clock import VirtualClock
from flwr_hpc.simulate.facility import Facility
from flwr_hpc.simulate.queues.models import NoQueue, Ticket
from flwr_hpc.simulate.site import SimulatedSite

FOREVER = 1e9


class FixedWaits:
    """A queue whose waits are those of a list; the last one stays."""

    def __init__(self, clock: VirtualClock, *waits: float) -> None:
        self.clock, self.waits, self.submitted = clock, list(waits), 0

    def submit(self, ticket: Ticket) -> None:
        wait = self.waits[min(self.submitted, len(self.waits) - 1)]
        self.submitted += 1
        start = lambda: None if ticket.cancelled else ticket.start()  # noqa: E731
        self.clock.at(self.clock.now() + wait, start)

    def ended(self, ticket: Ticket) -> None: ...


class Counts:
    """A learner whose only weight counts the steps."""

    def initial(self) -> dict[str, Any]:
        return {"n": np.zeros(1, np.float32)}

    def train(
        self,
        site: int,
        weights: dict[str, Any],
        steps: int,
        lr_scale: float = 1.0,
        mu: float = 0.0,
        anchor: Any = None,
        correction: Any = None,
        gradients: dict[str, Any] | None = None,
    ) -> tuple[dict[str, Any], float]:
        if gradients is not None:  # of a step: the correction, or 1 without one
            more = steps * (1.0 if correction is None else correction["n"])
            gradients["n"] = gradients.get("n", 0.0) + more
        return {k: w + np.float32(steps) for k, w in weights.items()}, 2.0

    def evaluate(self, weights: dict[str, Any]) -> float:
        return float(weights["n"][0])


class Scripted:
    """Waiting times until preemptions and failures, in the order they are drawn."""

    def __init__(self, *after: float) -> None:
        self.after = list(after)

    def exponential(self, mean: float) -> float:
        return self.after.pop(0) if self.after else FOREVER


class Site(SimulatedSite):
    """A site with a plain facility: a step of 1 s, 60 s to start, 10 s to write, 2 h walltime."""

    def __init__(self, *waits: float, faults: tuple[float, ...] = (), **facility: Any) -> None:
        name_this_process()
        clock = VirtualClock()
        queue = FixedWaits(clock, *waits) if waits else NoQueue()
        shape = Facility(**{"step_s": 1.0, "latency_s": 0.0, "transfer_s": 0.0, **facility})
        super().__init__("x", 0, shape, queue, Counts(), clock, Scripted(*faults))

    def ask(self, kind: str, order: Order | None = None, wait_s: float = FOREVER) -> Reply:
        content = RecordDict({protocol.WAIT: ConfigRecord({"wait_s": wait_s})})
        if order is not None:
            content[protocol.ORDER] = ConfigRecord({"json": protocol.to_json(order)})
            if kind != protocol.COLLECT:
                content[protocol.ARRAYS] = record({"n": np.zeros(1)})
        reply = Reply(self.clock)
        self.handle(Message(content, 1, kind), reply.take)
        return reply

    def train(self, steps: int, seq: int = 0, wait_s: float = FOREVER, version: int = 0) -> Reply:
        return self.ask(protocol.TRAIN, order(steps, seq, version), wait_s)

    def collect(self, steps: int, seq: int = 0, wait_s: float = FOREVER) -> Reply:
        return self.ask(protocol.COLLECT, order(steps, seq), wait_s)

    def until(self, done: Callable[[], bool], limit: float = 1e6) -> None:
        while not done():
            assert self.clock.now() < limit, "nothing came of it"
            self.clock.sleep(1.0)


class Reply:
    """The one answer to a message."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock, self.content, self.at = clock, None, FOREVER

    def take(self, content: RecordDict) -> None:
        assert self.content is None, "answered twice"
        self.content, self.at = content, self.clock.now()

    @property
    def status(self) -> Status:
        return protocol.from_json(Status, str(self.content[protocol.STATUS]["json"]))

    @property
    def trained(self) -> tuple[int, float]:
        """Steps by the result, and by the weights."""
        arrays = self.content[protocol.ARRAYS]
        return self.status.result.steps, float(arrays["n"].numpy()[0])


def order(steps: int, seq: int = 0, version: int = 0) -> Order:
    return Order("k", "x", seq, "train", version, steps)


def max_queued(segments: list) -> int:
    """Return how many jobs waited at the same time, at most."""
    queued = [s for s in segments if s.what == "queue"]
    changes = sorted([(s.begin, 1) for s in queued] + [(s.end, -1) for s in queued])
    return max(accumulate(step for _, step in changes))


def states(site: Site) -> list[tuple[str, float, float]]:
    return [(s.what, s.begin, s.end) for s in site.pool.segments]


# ---- an order's life ----------------------------------------------------------------------------


def test_acquire_then_train():
    """ACQUIRE is answered when the job is up; the order is given then (late binding)."""
    site = Site(3600.0)
    acquired = site.ask(protocol.ACQUIRE)
    site.clock.advance(5000.0)
    assert (acquired.at, acquired.status.state) == (3660.0, "ready")
    assert acquired.status.walltime_left_s == 7200.0 - 60.0
    assert site.pool.queue.submitted == 1


def test_an_order_is_trained():
    """The steps asked for, in their time, with what it took by the site's clock."""
    site = Site(100.0)
    reply = site.train(500)
    site.clock.advance(2000.0)
    assert reply.at == 100 + 60 + 500 + 10
    assert reply.trained == (500, 500.0)
    status = reply.status
    assert (status.state, status.result.seconds["train"]) == ("done", 500.0)
    assert status.result.metrics["train_loss"] == 2.0
    assert status.queued_s == 100.0
    assert status.allocation == "a0000"
    assert states(site)[:3] == [("queue", 0, 100), ("load", 100, 160), ("train", 160, 670)]


def test_an_order_sent_twice_is_trained_once():
    """Idempotent: while it runs, and when it is done."""
    site = Site()
    first = site.train(100)
    site.clock.advance(100.0)
    again = site.train(100)
    site.clock.advance(300.0)
    assert first.content is None  # one message at a time: the new one has taken its place
    assert again.trained == (100, 100.0)
    third = site.train(100)
    site.clock.advance(310.0)
    assert third.trained == (100, 100.0)
    assert (site.pool.orders, site.steps) == (1, 100)


def test_a_long_poll_is_answered_in_time():
    """With the state reached so far: queued, then running with its step, then done."""
    site = Site(100.0)
    polls = [site.train(500, wait_s=90.0)]
    for _ in range(8):
        site.until(lambda: polls[-1].content is not None)
        polls.append(site.collect(500, wait_s=90.0))
        site.clock.advance(site.clock.now())
    found = [(p.status.state, p.status.step, p.at) for p in polls if p.content is not None]
    assert found[:3] == [("queued", 0, 90.0), ("running", 20, 180.0), ("running", 110, 270.0)]
    assert found[-1][0] == "done"


def test_an_unknown_order_cannot_be_collected():
    """The server hands it in again."""
    site = Site()
    reply = site.collect(10)
    site.clock.advance(1.0)
    assert reply.status.state == "failed"


def test_evaluation_and_initialization():
    """No steps; the loss of the weights that were sent; the initial weights."""
    site = Site()
    reply = site.ask(protocol.EVALUATE, Order("k", "x", 0, "evaluate"))
    site.clock.advance(100.0)
    assert reply.status.result.metrics["held_out_loss"] == 0.0
    assert protocol.ARRAYS not in reply.content
    reply = site.ask(protocol.TRAIN, Order("k", "x", 1, "initialize"))
    site.clock.advance(200.0)
    assert float(reply.content[protocol.ARRAYS]["n"].numpy()[0]) == 0.0


def test_transfers_and_latency():
    """Weights take their time, words almost none."""
    site = Site(latency_s=2.0, transfer_s=20.0)
    reply = site.train(100)
    site.clock.advance(1000.0)
    assert reply.at == 60 + 100 + 10 + 22
    acquired = site.ask(protocol.ACQUIRE)
    t = site.clock.now()
    site.clock.advance(t + 500)
    assert acquired.at <= t + 62


# ---- the walltime -------------------------------------------------------------------------------


def test_the_walltime_cuts_an_order_short():
    """It returns the steps that were trained, tells so, and the next job is not there yet."""
    site = Site(0.0, 1000.0, walltime_s=370.0)
    reply = site.train(5000)
    site.clock.advance(380.0)
    assert reply.trained == (300, 300.0)  # 370 - 60 to start - 10 to write
    assert reply.at == 370.0
    assert reply.status.allocation == ""  # so that the next order is bound when a job is up
    assert site.node_hours() == pytest.approx(370 / 3600)


def test_an_allocation_without_room_for_a_step_is_over():
    """It must not be taken for one that is ready."""
    site = Site(0.0, 1000.0, walltime_s=370.0, step_s=100.0)
    reply = site.train(2)
    site.clock.advance(280.0)
    assert reply.trained == (2, 2.0)  # 60 to 260, written at 270; 90 s left
    acquired = site.ask(protocol.ACQUIRE)
    site.clock.advance(2000.0)
    assert acquired.at == 270 + 10 + 1000 + 60
    assert site.node_hours() == pytest.approx((270 + 360) / 3600)  # ends in time, with nothing


def test_orders_never_run_beyond_the_walltime():
    """Whatever is asked for, a job ends in time."""
    site = Site(10.0, walltime_s=300.0, step_s=7.0)
    for seq in range(30):
        reply = site.train(13, seq)
        site.until(lambda reply=reply: reply.content is not None)
    spent: dict[str, float] = {}
    for s in site.pool.segments:
        if s.what != "queue":
            spent[s.allocation] = spent.get(s.allocation, 0.0) + s.end - s.begin
    assert max(spent.values()) <= 300.0 + 1e-6
    assert len(spent) > 2


def test_an_idle_allocation_ends():
    """After the timeout, not before; node-hours count until then."""
    site = Site()
    site.train(100)
    site.clock.advance(170 + 599.0)
    assert site.node_hours() == pytest.approx(769 / 3600)
    site.clock.advance(5000.0)
    assert site.pool.node_s == 770.0


def test_per_round():
    """A job for every order, and nothing kept warm."""
    site = Site(500.0, per_round=True)
    for seq in range(3):
        reply = site.train(100, seq)
        site.until(lambda reply=reply: reply.content is not None)
        assert reply.status.allocation == ""
    assert site.pool.queue.submitted == 3
    assert site.pool.node_s == 3 * 170.0
    assert site.clock.now() == 3 * 670.0


def test_an_acquired_job_takes_the_order_that_follows():
    """Per round as well: one job, not two."""
    site = Site(500.0, per_round=True)
    site.ask(protocol.ACQUIRE)
    site.clock.advance(560.0)
    reply = site.train(100)
    site.clock.advance(1000.0)
    assert (reply.at, site.pool.queue.submitted) == (670.0, 1)


def test_renewal():
    """The successor is submitted ahead by the waits seen and takes over when it is up."""
    site = Site(600.0, max_successors=1, walltime_s=2000.0)
    replies = []
    for seq in range(40):
        replies.append(site.train(90, seq))
        site.until(lambda: replies[-1].content is not None)
        site.clock.advance(site.clock.now() + 5)
    waits = [s.end - s.begin for s in site.pool.segments if s.what == "queue"]
    assert len(waits) >= 3
    gaps = [b.at - a.at for a, b in pairwise(replies)]
    assert max(gaps) < 400  # a gap of 600 + 60 without it
    assert [r.trained[0] for r in replies[:5]] == [90] * 5


def test_a_successor_that_queues_in_time_keeps_nobody_waiting():
    """As the launcher counts it: only time in the queue in which no job ran."""
    site = Site(600.0, max_successors=1, walltime_s=2000.0, forecasts_s=(0.0, 600.0))
    first = site.train(90)
    site.clock.advance(300.0)
    assert site.pool.queued_s() == 300.0  # the one that waits still, too
    site.until(lambda: first.content is not None)
    assert first.status.queued_s == 600.0
    second = site.train(1900, seq=1)
    site.until(lambda: second.content is not None)
    assert site.pool.queue.submitted == 2
    assert second.status.queued_s == 600.0


def test_a_successor_is_not_submitted_too_early():
    """As the launcher does: a quarter of the walltime is used whatever the waits were."""
    site = Site(10.0, 5000.0, max_successors=1, walltime_s=2000.0, forecasts_s=(5000.0, 5000.0))
    site.train(1500)
    site.clock.advance(10 + 0.25 * 2000.0 - 1)
    assert site.pool.queue.submitted == 1
    site.clock.advance(10 + 0.25 * 2000.0 + 1)
    assert site.pool.queue.submitted == 2


def test_several_successors_wait_where_waits_are_longer_than_walltimes():
    """By the launcher's rule; each takes over as the one before it ends, and works alone."""
    waits = 5000.0
    site = Site(*[waits] * 9, max_successors=3, walltime_s=2000.0, forecasts_s=(waits,) * 9)
    replies = []
    for seq in range(90):
        replies.append(site.train(90, seq))
        site.until(lambda: replies[-1].content is not None)
    gaps = [b.at - a.at for a, b in pairwise(replies)]
    assert max(gaps) < 600  # of 5000 + 60 without them
    assert max_queued(site.pool.segments) == 3
    runs = sorted((s.begin, s.end) for s in site.pool.segments if s.what == "train")
    assert all(b[0] >= a[1] for a, b in pairwise(runs))


def test_an_idle_sites_successor_is_submitted_too():
    """When the server asks how it is, as at a real site."""
    site = Site(10.0, 50.0, max_successors=1, walltime_s=1000.0, idle_timeout_s=5000.0)
    site.train(50)
    site.clock.advance(980.0)
    assert site.pool.queue.submitted == 1
    site.ask(protocol.DESCRIBE)
    assert site.pool.queue.submitted == 2


def test_the_order_of_a_job_that_waits_goes_to_the_one_that_starts_first():
    """The second of two jobs starts first: nobody waits for the other."""
    site = Site(3000.0, 100.0, walltime_s=1000.0)
    reply = site.train(50)
    site.pool._submit()
    site.clock.advance(500.0)
    assert reply.trained == (50, 50.0)
    assert reply.status.allocation == "a0001"


def test_without_partial_work_an_order_goes_on_in_the_next_allocation():
    """It is whole when it comes back."""
    site = Site(0.0, 1000.0, walltime_s=370.0, partial_work=False)
    reply = site.train(400)
    site.clock.advance(2000.0)
    assert reply.trained[0] == 400
    assert reply.at == 370 + 1000 + 60 + 100 + 10


def test_a_successor_waits_for_a_message():
    """As at a real site: nobody looks after its jobs between two messages."""
    site = Site(10.0, max_successors=1, walltime_s=2000.0, forecasts_s=(0.0, 100.0))
    site.train(50)
    site.clock.advance(10 + 2000.0 - 100 - 60 + 1)
    assert site.pool.queue.submitted == 1
    site.train(10, seq=1)
    assert site.pool.queue.submitted == 2


def test_the_scheduler_warns_ahead_of_the_end():
    """What is kept back of the walltime may be more than writing takes."""
    site = Site(0.0, walltime_s=1000.0, reserves_s=(90.0, 5.0))
    first = site.train(2000)
    site.clock.advance(999.0)
    assert first.trained == (1000 - 60 - 90, 850.0)
    assert first.at == 1000 - 90 + 10
    second = site.train(2000, seq=1)
    site.clock.advance(3000.0)
    assert second.status.result.steps == 1000 - 60 - 10


# ---- faults -------------------------------------------------------------------------------------


def test_a_preempted_order_goes_on_from_its_checkpoint():
    """Nothing is trained twice; the queue's wait is counted."""
    site = Site(0.0, 1000.0, preemptions_per_hour=1.0, faults=(160.0,))
    reply = site.train(500)
    site.clock.advance(3000.0)
    # 100 steps from 60 to 160, 1000 s in the queue, 60 to start, the other 400, 10 to write
    assert reply.trained == (500, 500.0)
    assert reply.at == 160 + 1000 + 60 + 400 + 10
    assert (site.steps, site.pool.orders) == (500, 1)
    assert reply.status.queued_s == 1000.0


def test_the_mean_gradient_is_over_all_steps_of_an_order():
    """SCAFFOLD: those before a preemption included; a second record takes its time, too."""
    site = Site(0.0, 1000.0, preemptions_per_hour=1.0, faults=(160.0,), transfer_s=20.0)
    asked = Order("k", "x", 0, "train", 0, 500, options={protocol.MEAN_GRADIENT: True})
    content = RecordDict({protocol.ORDER: ConfigRecord({"json": protocol.to_json(asked)})})
    content[protocol.ARRAYS] = record({"n": np.zeros(1)})
    content[protocol.CORRECTION] = record({"n": np.full(1, 3.0)})
    reply = Reply(site.clock)
    site.handle(Message(content, 1, protocol.TRAIN), reply.take)
    site.clock.advance(3000.0)
    assert reply.trained == (500, 500.0)
    assert reply.content[protocol.GRADIENT]["n"].numpy() == 3.0
    assert reply.at == 160 + 1000 + 60 + 400 + 10 + 2 * 20


def test_a_site_keeps_its_weights_and_merges_what_comes():
    """With alpha = 1/2 and a weight of 0 that comes, half of what it has; from these or none."""
    site, found = Site(), []
    for merges, after in ((None, -1), ([], 0), (["n"], 1), (["n"], 1)):
        options = {"after": after, "alpha": 0.5}
        asked = Order("k", "x", len(found), "train", 0, 4, options=options, merges=merges)
        reply = site.ask(protocol.TRAIN, asked)
        site.until(lambda reply=reply: reply.content is not None)
        found.append(reply)
    assert [float(r.content[protocol.ARRAYS]["n"].numpy()[0]) for r in found[:3]] == [4, 8, 8]
    last = found[3].status
    assert (last.state, last.fatal, last.result.refused) == ("failed", False, True)


def test_a_part_of_the_weights_takes_its_part_of_the_time():
    """Transfers are as long as what they carry."""
    site = Site(transfer_s=20.0)
    for names, time_s in ((["n"], 20.0), ([], 20.0), (["n", "m"], 40.0)):
        tensors = record({name: np.zeros(1) for name in names})
        content = RecordDict({protocol.ARRAYS: tensors})
        assert site.transfer_s(content) == time_s


def test_a_failed_job_loses_its_order_and_tries_again():
    """The steps of the first job are gone, those of the second count."""
    site = Site(0.0, 1000.0, failures_per_hour=1.0, faults=(160.0,))
    reply = site.train(500)
    site.clock.advance(3000.0)
    assert reply.trained == (500, 500.0)
    assert reply.at == 160 + 1000 + 60 + 500 + 10
    assert site.steps == 500  # those of the first job were never handed to anybody


def test_an_order_whose_jobs_fail_again_and_again():
    """Is reported as failed, and can be handed in anew."""
    site = Site(10.0, failures_per_hour=1.0, faults=(100.0, 100.0, 100.0))
    reply = site.train(500)
    site.clock.advance(3000.0)
    assert (reply.status.state, reply.status.error) == ("failed", "gave up after 3 allocations")
    again = site.train(500)
    site.clock.advance(6000.0)
    assert again.trained == (500, 500.0)


def test_an_outage():
    """What runs is lost, the site is not to be reached, and nothing starts until it is back."""
    site = Site(0.0, outages=((200.0, 5000.0),))
    reply = site.train(500)
    site.clock.advance(199.0)
    assert site.online()
    site.clock.advance(201.0)
    assert not site.online()
    site.clock.advance(9000.0)
    assert site.online()
    assert reply.at == 5000 + 60 + 500 + 10
    assert reply.trained == (500, 500.0)


def test_release_cancels_what_waits():
    """A queued job leaves the queue; a ready one that has nothing to do ends."""
    site = Site(1000.0)
    site.ask(protocol.ACQUIRE, wait_s=10.0)
    site.clock.advance(20.0)
    site.ask(protocol.RELEASE)
    site.clock.advance(5000.0)
    assert (site.pool.node_s, states(site)) == (0.0, [("queue", 0, 20)])


def test_release_of_a_queued_job_with_an_order_submits_no_other():
    """The order is begun again only when somebody asks for it, as by the launcher."""
    site = Site(1000.0, 0.0)
    site.train(500, wait_s=10.0)
    site.clock.advance(20.0)
    site.ask(protocol.RELEASE)
    site.clock.advance(5000.0)
    assert (site.pool.node_s, states(site)) == (0.0, [("queue", 0, 20)])
    reply = site.collect(500)
    site.clock.advance(7000.0)
    assert reply.trained == (500, 500.0)


def test_a_released_allocation_finishes_its_order():
    """And ends then."""
    site = Site()
    reply = site.train(500)
    site.clock.advance(100.0)
    site.handle(Message(RecordDict(), 1, protocol.RELEASE), lambda content: None)
    site.clock.advance(1000.0)
    assert site.pool.node_s == 570.0
    again = site.collect(500)
    site.clock.advance(1010.0)
    assert (reply.trained if reply.content else again.trained) == (500, 500.0)


def test_node_hours_are_those_of_the_timeline():
    """What is charged is what the allocations held, faults and all."""
    site = Site(
        300.0,
        20.0,
        700.0,
        nodes=3,
        max_successors=1,
        walltime_s=1500.0,
        preemptions_per_hour=1.0,
        failures_per_hour=1.0,
        faults=(FOREVER, FOREVER, 400.0, FOREVER, 900.0, FOREVER, 333.0),
    )
    for seq in range(30):
        reply = site.train(77, seq)
        site.until(lambda reply=reply: reply.content is not None)
    site.ask(protocol.RELEASE)
    site.clock.advance(site.clock.now() + 3000)
    held = sum(s.end - s.begin for s in site.pool.segments if s.what != "queue")
    assert site.node_hours() == pytest.approx(3 * held / 3600)
    assert not site.pool._allocations


def test_finished_orders_are_forgotten():
    """A site's memory does not grow with the orders it has done."""
    site = Site()
    for seq in range(50):
        reply = site.train(1, seq)
        site.until(lambda reply=reply: reply.content is not None)
    assert len(site._tasks) <= 4
