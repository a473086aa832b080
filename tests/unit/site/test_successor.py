"""Jobs that follow one another: a successor submitted ahead, and a job for each order."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from worlds.site import Foretold, Killed, World, order

from flwr_hpc.config.schema import AllocationConfig
from flwr_hpc.errors import UserError
from flwr_hpc.schedulers.base import JobInfo
from flwr_hpc.site.renewal import lead_s, next_successor_in_s, preparing_s

HOUR = 3600.0


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "site")


def near_its_end(world: World, left_s: float = 50.0) -> None:
    """Let the first allocation run, with an order, shortly before its walltime's end."""
    world.site.submit(order(), None)
    world.up(0)
    world.worker(0, "running", order_id=order().id, walltime_left_s=left_s)
    world.site.collect(order().id)


@pytest.mark.parametrize(
    ("ahead", "wait", "preparing", "lead"),
    [
        ("forecast", None, None, 60.0),
        ("forecast", 0.0, 10.0, 60.0),
        ("forecast", 600.0, 100.0, 700.0),
        ("forecast", 5000.0, 100.0, 5100.0),
        ("forecast", None, HOUR, 0.25 * HOUR),
        ("00:30:00", 600.0, 100.0, 1800.0),
        ("off", 600.0, 100.0, None),
    ],
)
def test_lead(ahead: str, wait: float | None, preparing: float | None, lead: float | None) -> None:
    """Protects the moment of the submission: the expected start meets the end."""
    assert lead_s(AllocationConfig(renew_ahead=ahead), HOUR, wait, preparing) == lead
    config = AllocationConfig(policy="per_round", renew_ahead=ahead)
    assert lead_s(config, HOUR, wait, preparing) is None


def test_preparing_is_measured() -> None:
    """Protects the lead from one slow start, and from allocations that never got that far."""
    ledgers = [{"queue": 9.0}, *({"startup": s, "load": 10.0} for s in (5.0, 500.0, 7.0))]
    assert preparing_s(ledgers) == 17.0
    assert preparing_s([]) is None


@pytest.mark.parametrize("call", ["collect", "acquire", "submit"])
def test_one_successor_is_submitted_in_time(world: World, call: str) -> None:
    """Protects the site from a gap between two jobs, and from a third one."""
    near_its_end(world, 100.0)
    assert len(world.scheduler.jobs) == 1
    world.worker(0, "running", walltime_left_s=50.0)
    args = {"collect": [order().id], "acquire": [], "submit": [order(), None]}[call]
    for _ in range(3):
        getattr(world.restart(), call)(*args)
        world.clock.time += 31
    assert list(world.scheduler.jobs) == [world.name(0), world.name(1)]
    assert not world.alloc(0).released


def test_the_forecast_moves_the_submission(world: World) -> None:
    """Protects long queues: the wait is added to the lead."""
    world.forecast.expected_s = 1000.0
    near_its_end(world, 1061.0)
    assert len(world.scheduler.jobs) == 1
    world.worker(0, "running", walltime_left_s=1059.0)
    world.site.collect(order().id)
    assert len(world.scheduler.jobs) == 2


def test_orders_go_to_the_newest_that_is_ready(world: World) -> None:
    """Protects warmth: a successor is used once it is ready, and the old one is let go."""
    near_its_end(world)
    world.done(order())
    world.worker(0, "ready", walltime_left_s=40.0)
    world.job(1, "running")
    world.worker(1, "loading")
    status = world.site.collect(order().id)
    assert (status.state, status.allocation) == ("done", "a0000")
    assert world.site.submit(order(1), None).allocation == "a0000"
    assert not world.alloc(0).released
    world.worker(1, "ready", walltime_left_s=3600.0)
    status = world.site.collect(order(1).id)
    assert (status.state, status.allocation) == ("running", "a0000")  # keeps what it has
    assert world.alloc(0).released
    assert world.scheduler.cancelled == []
    world.done(order(1))
    status = world.site.collect(order(1).id)
    assert (status.state, status.allocation, status.walltime_left_s) == ("done", "a0001", 3600.0)
    world.worker(0, "closed")
    status = world.site.submit(order(2), None)
    assert (status.state, status.allocation) == ("running", "a0001")
    assert world.alloc(1).inbox() == [order(2).id]
    assert len(world.scheduler.jobs) == 2  # the old one's end needs no third job


def test_the_successor_waits_for_the_old_ones_state(world: World) -> None:
    """Protects the optimizer's state: the order is assigned once the old one has saved it."""
    near_its_end(world)
    world.done(order())
    world.up(1)
    assert world.site.acquire().allocation == "a0001"
    released = world.alloc(0).path / "release"
    os.utime(released, (world.clock.wall(), world.clock.wall()))
    status = world.site.submit(order(1), None)
    assert (status.state, status.allocation) == ("running", "a0001")
    assert world.alloc(1).inbox() == []
    world.restart()
    world.worker(0, "closed")
    assert world.site.collect(order(1).id).allocation == "a0001"
    assert world.alloc(1).inbox() == [order(1).id]


def test_the_successor_does_not_wait_for_ever(world: World) -> None:
    """Protects a site whose old allocation is stuck in an order nobody wants any more."""
    near_its_end(world)
    world.done(order())
    world.up(1)
    world.site.acquire()
    released = world.alloc(0).path / "release"
    os.utime(released, (world.clock.wall(), world.clock.wall()))
    for _ in range(5):
        world.site.submit(order(1), None)
        world.clock.time += 31
        world.worker(0, "running", walltime_left_s=40.0)
        world.worker(1, "ready", walltime_left_s=3000.0)
    world.site.collect(order(1).id)
    assert world.alloc(1).inbox() == [order(1).id]


def test_an_order_the_old_one_left_goes_to_the_successor(world: World) -> None:
    """Protects an order that the walltime cut off: it is finished, and by no third job."""
    near_its_end(world)
    world.worker(0, "closed")
    status = world.site.collect(order().id)
    assert (status.state, status.allocation) == ("queued", "a0001")
    assert world.alloc(1).inbox() == [order().id]
    assert len(world.scheduler.jobs) == 2


@pytest.mark.parametrize("ahead", ["off", "forecast"])
def test_without_a_successor_one_comes_when_needed(world: World, ahead: str) -> None:
    """Protects a run whose job ended before anybody looked."""
    world.restart(renew_ahead=ahead)
    near_its_end(world, 3000.0 if ahead == "forecast" else 10.0)
    assert len(world.scheduler.jobs) == 1
    world.worker(0, "closed")
    assert world.site.collect(order().id).allocation == "a0001"


def test_a_successor_that_fails_harms_nobody(world: World) -> None:
    """Protects running work, and the scheduler from one submission after the other."""
    world.scheduler.refusal = None
    world.site.submit(order(), None)
    world.up(0)
    world.scheduler.refusal = UserError("over the limit of 1 job")
    world.worker(0, "running", walltime_left_s=50.0)
    for _ in range(3):
        assert world.site.collect(order().id).state == "running"
        world.clock.time += 31
        world.worker(0, "running", walltime_left_s=40.0)
    assert len(world.spool.allocations()) == 2
    world.scheduler.refusal = None
    world.worker(0, "closed")
    assert world.site.collect(order().id).allocation == "a0002"


def test_release_cancels_a_queued_successor(world: World) -> None:
    """Protects the queue from jobs nobody needs once the run is over."""
    near_its_end(world)
    world.site.release()
    assert world.scheduler.cancelled == [world.name(1)]
    assert world.alloc(0).released


@pytest.mark.parametrize("moment", ["declared", "submitted"])
def test_killed_while_renewing(world: World, moment: str) -> None:
    """Protects from a second successor after kill -9 in the middle of submitting one."""
    world.site.submit(order(), None)
    world.up(0)
    world.worker(0, "running", walltime_left_s=50.0)
    if moment == "declared":
        world.scheduler.refusal = Killed()
    else:
        world.scheduler.trouble = Killed()
    with pytest.raises(Killed):
        world.site.collect(order().id)
    world.scheduler.refusal = world.scheduler.trouble = None
    for _ in range(2):
        assert world.restart().collect(order().id).state == "running"
    assert list(world.scheduler.jobs) == [world.name(0), world.name(1)]
    assert world.alloc(1).job() is not None


def test_a_preempted_one_yields_to_its_successor(world: World) -> None:
    """Protects an order from waiting in the queue while another job is ready for it."""
    near_its_end(world)
    world.worker(0, "interrupted")
    world.up(1)
    world.job(0, "pending", restarts=1)
    world.worker(1, "ready", walltime_left_s=3500.0)
    status = world.site.collect(order().id)
    assert (status.state, status.allocation) == ("running", "a0001")
    assert world.scheduler.cancelled == [world.name(0)]
    verdict = world.alloc(0).verdict.read()
    assert verdict is not None
    assert verdict.why == "cancelled"


def test_an_order_is_not_left_with_a_job_that_was_overtaken(world: World) -> None:
    """Protects an order from waiting for the later of two queued jobs."""
    near_its_end(world)
    world.worker(0, "interrupted")
    world.job(0, "pending", restarts=1)
    (world.alloc(0).path / "inbox" / order().id).unlink()
    world.alloc(1).assign(order().id)
    world.job(0, "running", restarts=1)
    world.worker(0, "ready", walltime_left_s=3000.0)
    status = world.site.collect(order().id)
    assert (status.state, status.allocation) == ("running", "a0000")
    assert world.alloc(1).inbox() == []


def test_a_job_for_each_order(world: World) -> None:
    """Protects the per-round policy: acquired late, released with its order, one job each."""
    world.restart(policy="per_round")
    for number in range(3):
        assert world.site.acquire().state == "queued"
        world.up(number)
        assert world.site.acquire().state == "ready"
        status = world.site.submit(order(number), None)
        assert (status.state, status.allocation) == ("running", f"a{number:04d}")
        assert world.alloc(number).released
        assert world.alloc(number).inbox() == [order(number).id]
        world.done(order(number))
        status = world.site.collect(order(number).id)
        assert (status.state, status.allocation) == ("done", "")  # nothing is warm
        world.worker(number, "closed")
    assert len(world.scheduler.jobs) == 3


def test_per_round_after_a_kill(world: World) -> None:
    """Protects from a job that idles as its launcher died between assignment and release."""
    world.restart(policy="per_round")
    world.site.submit(order(), None)
    (world.alloc(0).path / "release").unlink()
    world.restart().collect(order().id)
    assert world.alloc(0).released
    world.job(0, "ended", outcome="node_fail")
    assert world.restart().collect(order().id).allocation == "a0001"
    assert world.alloc(1).released


@pytest.mark.parametrize(
    ("lead", "left_s", "starts_in_s", "due_in_s"),
    [
        (600.0, HOUR, [], 3000.0),
        (600.0, 600.0, [], 0.0),
        (600.0, 0.0, [0.0], 3000.0),  # one waits, and it lasts longer than the lead
        (3 * HOUR, HOUR, [], 0.25 * HOUR),  # a part of a walltime is used in any case
        (3 * HOUR, 0.5 * HOUR, [], 0.0),
        (3 * HOUR, 0.5 * HOUR, [3 * HOUR], HOUR),  # the next when that one is a walltime nearer
        (3 * HOUR, None, [2 * HOUR], 0.0),  # none runs: the first in the queue is no successor
        (3 * HOUR, None, [HOUR, 2 * HOUR], 0.0),
        (3 * HOUR, None, [0.5 * HOUR, 1.5 * HOUR, 2.5 * HOUR], 0.5 * HOUR),
        (3 * HOUR, None, [0.0, 0.0, 0.0, 0.0], None),  # three at most
        (3 * HOUR, 60.0, [0.0, 0.0, 0.0], None),
        (None, 60.0, [], None),
        (600.0, None, [], None),  # nothing is to be succeeded
    ],
)
def test_next_successor(
    lead: float | None, left_s: float | None, starts_in_s: list[float], due_in_s: float | None
) -> None:
    """Protects the chain where waits exceed walltimes: each is to start as another ends."""
    config = AllocationConfig()
    assert next_successor_in_s(config, HOUR, lead, left_s, starts_in_s) == due_in_s


class LongQueue(Foretold):
    """Every job waits three hours, and that is known."""

    def wait_s(self, quantile: float = 0.5) -> float | None:
        return 3 * HOUR

    def remaining_s(self, info: JobInfo, age_s: float, quantile: float = 0.5) -> float | None:
        return max(0.0, 3 * HOUR - age_s)


@pytest.fixture
def long(tmp_path: Path) -> World:
    return long_queue(tmp_path / "long")


def long_queue(root: Path) -> World:
    """Return a site of one-hour jobs behind a queue of three hours."""
    world = World(root)
    world.forecast = LongQueue()
    world.restart()
    return world


def test_a_chain_where_waits_exceed_walltimes(long: World) -> None:
    """Protects long queues: a job a walltime later than the one before it, at most three more;
    seen to by every message, in a process of its own."""
    long.site.acquire()
    began, submitted = long.clock.time, []
    while long.clock.time < began + 6 * HOUR:
        long.restart().acquire()
        submitted += [long.clock.time - began] * (len(long.scheduler.jobs) - 1 - len(submitted))
        long.clock.time += 60.0
    assert submitted == [pytest.approx(h * HOUR, abs=200.0) for h in (1, 2, 3)]


def test_a_chain_of_one(long: World) -> None:
    """Protects accounts with few jobs: max_successors is kept to."""
    long.restart(max_successors=1).acquire()
    for _ in range(500):
        long.clock.time += 60.0
        long.site.acquire()
    assert len(long.scheduler.jobs) == 2


def test_orders_wait_for_the_first_of_a_chain(long: World) -> None:
    """Protects an order from the last place in the queue."""
    long.site.acquire()
    long.clock.time += 1.5 * HOUR
    assert long.site.acquire().allocation == "a0000"
    assert len(long.scheduler.jobs) == 2
    assert long.site.submit(order(), None).allocation == "a0000"
    assert long.alloc(1).inbox() == []


def chain_of_two(world: World) -> None:
    """Let the first allocation run, and two more wait."""
    world.site.acquire()
    world.clock.time += 1.5 * HOUR
    world.site.acquire()
    world.clock.time += HOUR
    world.site.acquire()
    world.up(0)
    assert world.site.acquire().state == "ready"
    assert len(world.scheduler.jobs) == 3


def test_one_that_overtakes_costs_no_place_in_the_queue(long: World) -> None:
    """Protects a job's hours in the queue: when a later one starts first, it stays its successor,
    and it takes over when it starts in its turn."""
    chain_of_two(long)
    long.up(2)
    long.worker(2, "ready", walltime_left_s=3500.0)
    assert long.site.acquire().allocation == "a0002"
    assert long.alloc(0).released
    assert long.scheduler.cancelled == []
    long.worker(0, "closed")
    long.up(1)
    long.worker(1, "ready", walltime_left_s=3590.0)
    long.worker(2, "ready", walltime_left_s=2000.0)
    assert long.site.acquire().allocation == "a0001"
    assert long.alloc(2).released


@pytest.mark.parametrize("closed", [False, True])
def test_one_let_go_for_an_older_one_does_not_stop_renewal(long: World, closed: bool) -> None:
    """Protects the chain when jobs start out of turn: the older one, taking over from a newer, gets
    a successor of its own."""
    chain_of_two(long)
    long.up(2)
    long.site.acquire()
    long.worker(0, "closed")
    long.up(1)
    long.worker(1, "ready", walltime_left_s=3590.0)
    long.worker(2, "ready", walltime_left_s=2000.0)
    assert long.site.acquire().allocation == "a0001"
    if closed:
        long.worker(2, "closed")
    long.clock.time += 0.5 * HOUR
    long.worker(1, "ready", walltime_left_s=1700.0)
    assert long.site.acquire().allocation == "a0001"
    assert len(long.scheduler.jobs) == 4


def test_release_cancels_a_whole_chain(long: World) -> None:
    """Protects the queue from jobs nobody needs, and accounts for each."""
    chain_of_two(long)
    status = long.site.release()
    assert sorted(long.scheduler.cancelled) == [long.name(1), long.name(2)]
    assert set(status.jobs) == set(status.ledger) == {"a0000", "a0001", "a0002"}
    assert long.site.status().state == "idle"
    assert len(long.scheduler.jobs) == 3


@pytest.mark.parametrize("call", ["status", "status_with_forecast"])
def test_an_idle_warm_site_gets_its_successor(world: World, call: str) -> None:
    """Protects a site that has nothing to do as its walltime ends: being asked for its state is
    enough, and an idle site without a job is asked for nothing."""
    assert getattr(world.site, call)().state == "idle"
    assert world.scheduler.jobs == {}
    world.site.acquire()
    world.up(0)
    world.worker(0, "ready", walltime_left_s=50.0)
    assert getattr(world.restart(), call)().state == "ready"
    assert list(world.scheduler.jobs) == [world.name(0), world.name(1)]


@pytest.mark.parametrize("chain", [False, True])
def test_killed_at_any_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chain: bool) -> None:
    """Protects from kill -9 of the launcher at each file it publishes, in the life of two
    allocations or of a chain of four: called again, it submits no job twice, leaves none and
    loses no order."""
    replace, writes = Path.replace, [0]

    def count(path: Path, target: Path) -> Path:
        writes[0] -= 1
        if writes[0] == 0:
            path.with_name(f".{target.name}.killed.tmp").write_bytes(path.read_bytes())
            raise Killed()
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", count)
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # there is no power failure here
    for moment in range(1, 60):
        world = long_queue(tmp_path / str(moment)) if chain else World(tmp_path / str(moment))
        writes[0] = moment
        (live_through_a_chain if chain else live_through_two)(world)
        assert list(world.scheduler.jobs) == [world.name(n) for n in range(4 if chain else 2)]
        if chain:
            assert set(world.scheduler.cancelled) == {world.name(2), world.name(3)}
        else:
            assert world.scheduler.cancelled in ([], [world.name(1)])
    assert writes[0] > 0, "not every write was tried"


def again(world: World, call: str, *args: object) -> object:
    """Call, and once more in a new process if the first was killed."""
    for _ in range(2):
        with contextlib.suppress(Killed):
            return getattr(world.site, call)(*args)
        world.restart()
    raise AssertionError("killed twice")


def worker(world: World, *args: object, **fields: object) -> None:
    with contextlib.suppress(Killed):
        world.worker(*args, **fields)  # type: ignore[arg-type]
        return
    world.worker(*args, **fields)  # type: ignore[arg-type]


def live_through_two(world: World) -> None:
    """Be killed at most once, anywhere."""
    again(world, "acquire")
    world.job(0, "running")
    worker(world, 0, "ready", walltime_left_s=3000.0)
    again(world, "submit", order(), None)
    worker(world, 0, "running", walltime_left_s=50.0)
    again(world, "collect", order().id)
    again(world, "collect", order().id)
    world.job(1, "running")
    worker(world, 1, "ready", walltime_left_s=3600.0)
    again(world, "collect", order().id)
    worker(world, 0, "closed")
    status = again(world, "collect", order().id)
    assert (status.state, status.allocation) == ("running", "a0001")  # type: ignore[attr-defined]
    assert world.alloc(1).inbox() == [order().id]
    again(world, "release")


def live_through_a_chain(world: World) -> None:
    """Wait long, with successors; be killed at most once, anywhere."""
    again(world, "acquire")
    for _ in range(3):
        world.clock.time += HOUR + 60.0
        again(world, "acquire")
    world.job(0, "running")
    worker(world, 0, "ready", walltime_left_s=3000.0)
    again(world, "submit", order(), None)
    world.job(1, "running")
    worker(world, 1, "ready", walltime_left_s=3600.0)
    again(world, "collect", order().id)
    worker(world, 0, "closed")
    status = again(world, "collect", order().id)
    assert (status.state, status.allocation) == ("running", "a0001")  # type: ignore[attr-defined]
    again(world, "release")
