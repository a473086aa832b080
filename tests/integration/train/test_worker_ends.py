"""Worker processes that end by themselves, refuse what is wrong, or stay and load nothing again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from worlds.train.worker_site import Site

from flwr_hpc.config.schema import DataConfig


def test_a_walltime_that_loading_uses_up_is_told(site: Site) -> None:
    """Protects from one job after the other that never gets to work: it counts as a failure."""
    allocation = site.start(ranks=1, walltime_s=0.01)
    assert site.ended() == [0], site.logs()
    state = allocation.state()
    assert state is not None
    assert (state.state, state.fatal) == ("failed", False)
    assert "facilities.a.walltime" in state.error


def test_bad_weights_fail_the_order_and_not_the_allocation(site: Site, tmp_path: Path) -> None:
    """What a strategy sent is refused with a reason; the allocation stays warm and intact."""
    (tmp_path / "bad.safetensors").write_text("no weights at all")
    allocation = site.start(ranks=1)
    bad = site.order(allocation, 0, kind="train", steps=1, start=tmp_path / "bad.safetensors")
    site.wait(lambda: bad.result() is not None)
    result = bad.result()
    assert result is not None
    assert (result.state, result.fatal) == ("failed", True)
    assert "cannot be read" in result.error
    site.done(site.order(allocation, 1, kind="train", steps=1))


def test_bad_data_fails_the_allocation_for_good(site: Site) -> None:
    """The launcher must not try again, and gets the reason; every rank ends."""
    data = DataConfig(kind="text", paths={"a": ["/does/not/exist.txt"]})
    allocation = site.start(data=dataclasses.asdict(data))
    assert all(site.ended())
    state = allocation.state()
    assert state is not None
    assert (state.state, state.fatal) == ("failed", True)
    assert "/does/not/exist.txt" in state.error


def test_idle_allocation_ends(site: Site) -> None:
    """An allocation nobody needs gives its nodes back."""
    site.start(ranks=1, idle_timeout_s=0.2)
    assert site.ended() == [0]


COUNTING = """
import sys
from flwr_hpc.train.worker import Worker, run
carry_out = Worker._carry_out
def counted(self, *task):
    before = set(sys.modules)
    done = carry_out(self, *task)
    print("NEW", sorted(set(sys.modules) - before), flush=True)
    return done
Worker._carry_out = counted
run(sys.argv[1])
"""


def test_warm_orders_load_nothing(site: Site) -> None:
    """From the second order on no module is imported any more, and the first step begins
    within a fraction of what a cold start takes."""
    allocation = site.start(ranks=1, program=COUNTING, fresh=True)
    results = [
        site.done(site.order(allocation, seq, kind="train", steps=2, evaluate=True))
        for seq in range(3)
    ]
    allocation.release()
    assert site.ended() == [0]
    imported = [line for line in site.logs().splitlines() if line.startswith("NEW")]
    assert imported[1:] == ["NEW []", "NEW []"], imported
    state = allocation.state()
    assert state is not None
    assert state.seconds["startup"] > 0.5  # reading torch is part of it
    cold = state.seconds["startup"] + state.seconds["load"]
    assert min(r.seconds["first_step"] for r in results[1:]) < 0.2 * cold  # one may be held up


FAILING = """
import os, sys
from flwr_hpc.train import rendezvous, trainer, worker
rendezvous.PATIENCE_S = {patience}
step = trainer.Trainer._train_step
def failing(self, *args):
    if self.step == 1 and os.environ["RANK"] in {ranks}:
        raise RuntimeError("out of luck")
    return step(self, *args)
trainer.Trainer._train_step = failing
worker.run(sys.argv[1])
"""


@pytest.mark.parametrize(("ranks", "patience"), [("1", "1.0"), ("01", "600.0")])
def test_an_unexpected_error_is_told_and_ends_all_ranks(
    site: Site, ranks: str, patience: str
) -> None:
    """Whether one rank fails while the others wait for it, or all do: the order's result has
    the reason, may be tried again, and nobody hangs."""
    program = FAILING.replace("{ranks}", repr(ranks)).replace("{patience}", patience)
    allocation = site.start(program=program)
    order = site.order(allocation, 0, kind="train", steps=4)
    assert all(site.ended())
    result = order.result()
    assert result is not None
    assert (result.state, result.fatal) == ("failed", False)
    assert "RuntimeError: out of luck" in result.error
    state = allocation.state()
    assert state is not None
    assert state.state == ("failed" if ranks == "01" else "running")
