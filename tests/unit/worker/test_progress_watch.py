"""When work that stands still hangs, and when it only takes long."""

from __future__ import annotations

import pytest
from worlds.clock import FakeClock

from flwr_hpc.worker.phase_timer import PhaseTimer
from flwr_hpc.worker.progress_watch import ProgressWatch


class Rank:
    """Rank 0, looked at once a second."""

    def __init__(self, floor_s: float = 60.0) -> None:
        self.clock = FakeClock()
        self.timer = PhaseTimer(clock=self.clock)
        self.watch = ProgressWatch(self.timer, floor_s, self.clock)

    def stand(self, seconds: float) -> str:
        """Do nothing for so long; return the first complaint."""
        end = self.clock.time + seconds
        while self.clock.time < end:
            self.clock.sleep(1.0)
            if words := self.watch.overdue():
                return words
        return ""

    def steps(self, count: int, each_s: float) -> str:
        words = ""
        for _ in range(count):
            words = words or self.stand(each_s)
            self.watch.sign()
        return words


@pytest.fixture
def rank() -> Rank:
    return Rank()


def test_loading_may_take_for_ever(rank: Rank) -> None:
    """Protects a model that is fetched from afar."""
    assert not rank.stand(10_000)
    rank.timer.switch_to("load")
    assert not rank.stand(100_000)


def test_a_hang_is_noticed_after_the_floor(rank: Rank) -> None:
    """Protects the walltime: quick steps, then none."""
    rank.timer.switch_to("train")
    assert not rank.steps(20, 1.0)
    assert "no progress for 61 s (train; at most 60 s" in rank.stand(1000)


def test_the_deadline_grows_with_the_steps(rank: Rank) -> None:
    """Protects large models: a step of a minute may once take nine."""
    rank.timer.switch_to("train")
    assert not rank.steps(5, 60.0)
    assert not rank.stand(590)
    assert rank.stand(100)


def test_the_first_step_may_compile(rank: Rank) -> None:
    """Protects a cold start, which is not taken for the measure of what follows either."""
    rank.timer.switch_to("train")
    assert not rank.stand(350)
    rank.watch.sign()
    assert not rank.steps(3, 1.0)
    assert rank.stand(70)


def test_evaluation_and_writing_are_measured_by_themselves(rank: Rank) -> None:
    """Protects long evaluations and checkpoints among quick steps."""
    rank.timer.switch_to("train")
    assert not rank.steps(5, 1.0)
    for _ in range(2):
        with rank.timer.during("evaluate"):
            assert not rank.stand(300 if rank.clock.time > 300 else 100)
        with rank.timer.during("transfer"):
            assert not rank.stand(50)
    with rank.timer.during("transfer"):
        assert not rank.stand(499)
    assert not rank.steps(2, 1.0)
    assert rank.stand(70)


def test_an_idle_worker_looks_into_its_inbox(rank: Rank) -> None:
    """Protects from a worker that is ready for ever and takes no order."""
    rank.timer.switch_to("idle")
    assert not rank.steps(10_000, 1.0)
    assert rank.stand(70)


def test_a_suspended_job_does_not_hang(rank: Rank) -> None:
    """Protects a job that the scheduler stops for a night."""
    rank.timer.switch_to("train")
    assert not rank.steps(5, 1.0)
    rank.clock.time += 40_000
    assert not rank.watch.overdue()
    assert not rank.stand(40)


def test_it_can_be_switched_off() -> None:
    """Protects those who know better."""
    rank = Rank(floor_s=0.0)
    rank.timer.switch_to("train")
    rank.steps(5, 1.0)
    assert not rank.stand(100_000)
