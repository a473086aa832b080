"""A rank that dies or hangs costs the allocation, never the order: real ranks over gloo."""

from __future__ import annotations

import signal

import psutil
import pytest
from worlds.train.worker_site import RUN, Site

from flwr_hpc.spool import AllocationDir, OrderDir

# Nobody watches the connections: what shows the death of a peer is an error of a collective.
DEAF = "import flwr_hpc.worker.lifeline as l; l._exit = lambda rank: None; " + RUN
# Seconds without a sign of life, or of progress, in place of minutes.
IMPATIENT = (
    "import flwr_hpc.worker.lifeline as l; l.BEAT_S, l.SILENT_S = 0.2, 20.0; "
    "import flwr_hpc.worker.progress_watch as w; w.FACTOR = w.COLD_FACTOR = 1.0; " + RUN
)
# Rank 1 stands still in its third step, in Python; its process goes on.
STUCK = """
import time
import flwr_hpc.train.trainer as trainer
from flwr_hpc.worker.ranks import Ranks
step = trainer.Trainer._train_step
def stuck(self, *args):
    if self.step == 3 and Ranks.detect().rank == {rank}:
        time.sleep(3600)
    return step(self, *args)
trainer.Trainer._train_step = stuck
"""


def _long_order(site: Site, allocation: AllocationDir) -> OrderDir:
    return site.order(allocation, 0, kind="train", steps=100_000)


def test_an_error_of_a_collective_is_no_failure_of_the_order(site: Site) -> None:
    """Protects an order whose peer dies: rank 0 meets the error before it notices the death."""
    allocation = site.start(program=DEAF)
    order = _long_order(site, allocation)
    site.wait(lambda: bool(order.progress()))
    site.processes[0][1].kill()
    codes = site.ended()
    assert codes[0] == 75, site.logs()
    assert order.result() is None
    state = allocation.state()
    assert state is not None
    assert state.state == "running"  # why its peer died the scheduler knows better
    assert "PeerLostError: rank 0:" in site.logs()
    assert "a rank of this allocation is gone" in site.logs()


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_noticed(site: Site, stopped: int) -> None:
    """Protects the walltime from a rank that hangs in the kernel: its sockets stay open."""
    allocation = site.start(program=IMPATIENT)
    order = _long_order(site, allocation)
    site.wait(lambda: bool(order.progress()))
    site.processes[0][stopped].send_signal(signal.SIGSTOP)
    living = site.processes[0][1 - stopped]
    site.wait(lambda: living.poll() is not None)
    assert living.returncode == 75
    assert f"rank {stopped} of this allocation gave no sign of life" in site.logs()
    assert order.result() is None
    state = allocation.state()
    assert state is not None
    if stopped == 1:  # the site replaces it at once, and cancels what is left of the job
        assert (state.state, state.fatal) == ("failed", False)
        assert "rank 1" in state.error
    else:  # nobody is left to say so: the site notices that the worker's beat stands still
        assert psutil.Process(site.processes[0][0].pid).status() == psutil.STATUS_STOPPED


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_lives_but_hangs_is_noticed(site: Site, rank: int) -> None:
    """Protects the walltime from a dead lock, wherever it is: rank 0 stands still, too."""
    program = STUCK.replace("{rank}", str(rank)) + IMPATIENT
    allocation = site.start(program=program, progress_timeout_s=20.0)
    order = _long_order(site, allocation)
    codes = site.ended()
    assert codes == [75, 75], site.logs()
    state = allocation.state()
    assert state is not None
    assert (state.state, state.fatal) == ("failed", False)
    assert "no progress for" in state.error
    assert order.result() is None
    assert "_train_step" in site.logs() or "stuck" in site.logs()  # where it stood
