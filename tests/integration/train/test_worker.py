"""Real worker processes, reached through the files of a spool as the launcher does."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from worlds.train.worker_site import FAST, SLOW, Site

from flwr_hpc.protocol import Result
from flwr_hpc.spool import Spool


def assert_equal(found: Path, expected: Path) -> None:
    a, b = load_file(found), load_file(expected)
    assert a.keys() == b.keys()
    for name in b:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Iterator[Site]:
    """A site whose allocation did: initialize, train, train, evaluate, and was released."""
    site = Site(Spool(tmp_path_factory.mktemp("undisturbed")), text)
    allocation = site.start()
    first = site.order(allocation, 0, kind="initialize")
    site.done(first)
    second = site.order(allocation, 1, kind="train", steps=4, evaluate=True, start=first.weights)
    site.done(second)
    third = site.order(allocation, 2, kind="train", steps=4, start=second.weights)
    site.done(third)
    site.done(site.order(allocation, 3, kind="evaluate", start=third.weights))
    allocation.release()
    site.ended()
    yield site
    site.close()


def result_of(site: Site, seq: int) -> Result:
    result = site.spool.order(f"run-a-{seq:06d}").result()
    assert result is not None
    return result


def weights_of(site: Site, seq: int) -> Path:
    return site.spool.order(f"run-a-{seq:06d}").weights


def test_a_released_allocation_ends_in_order(undisturbed: Site) -> None:
    """All ranks leave with exit code 0 and the state says so."""
    assert [p.returncode for p in undisturbed.processes[0]] == [0, 0], undisturbed.logs()
    state = undisturbed.spool.allocations()[0].state()
    assert state is not None
    assert (state.state, state.error) == ("closed", "")
    assert set(state.seconds) == {"startup", "load", "train", "evaluate", "transfer", "idle"}
    assert state.seconds["startup"] > 0
    assert state.seconds["train"] > 0


def test_initialize_answers_with_a_hugging_face_directory(undisturbed: Site) -> None:
    """Initial weights, and the small files that go with them."""
    result = result_of(undisturbed, 0)
    assert {"config.json", "generation_config.json"} <= set(result.files)
    assert json.loads(result.files["config.json"])["architectures"] == ["LlamaForCausalLM"]
    assert any("tokenizer" in name for name in result.files)
    assert "model.embed_tokens.weight" in load_file(weights_of(undisturbed, 0))


def test_training_learns_and_is_measured(undisturbed: Site) -> None:
    """The second order starts better than the first did; its numbers are complete."""
    first, second, evaluated = (result_of(undisturbed, seq) for seq in (1, 2, 3))
    assert (first.steps, first.examples, first.tokens) == (4, 16, 16 * 31)
    assert {
        "train_loss", "last_loss", "held_out_loss", "held_out_tokens", "grad_norm",
        "tokens_per_s", "mfu", "peak_memory_gb",
    } <= set(first.metrics)  # fmt: skip
    assert evaluated.metrics["held_out_loss"] < first.metrics["held_out_loss"]
    assert "held_out_loss" not in second.metrics  # was not asked for
    assert {"read", "train", "write", "first_step"} <= set(second.seconds)
    assert len(second.sha256) == 64


def test_kill_of_one_rank_ends_all_and_the_order_is_finished_elsewhere(
    site: Site, undisturbed: Site
) -> None:
    """kill -9 in the middle of an order: no rank hangs, the next allocation starts from the
    last checkpoint, and the weights are those of a run in which nothing happened."""
    allocation = site.start()
    start = weights_of(undisturbed, 0)
    site.done(site.order(allocation, 1, kind="train", steps=4, evaluate=True, start=start))
    long = site.order(allocation, 2, kind="train", steps=100_000, start=weights_of(site, 1))
    site.wait(lambda: bool(long.progress()))
    site.processes[0][1].kill()
    codes = site.ended()
    assert codes[0] not in (0, None)
    assert long.result() is None

    # The same order with the steps it has in the undisturbed run.
    (long.path / "order.json").unlink()
    allocation = site.start()
    again = site.order(allocation, 2, kind="train", steps=4, start=weights_of(site, 1))
    site.done(again)
    allocation.release()
    assert site.ended() == [0, 0]
    assert_equal(again.weights, weights_of(undisturbed, 2))


def test_kill_while_a_checkpoint_is_written(site: Site, undisturbed: Site) -> None:
    """The next order is trained meanwhile; kill -9 then costs what was not answered and no more:
    the checkpoint before is whole, and both orders end as in a run in which nothing happened."""
    allocation = site.start(program=SLOW)
    start = weights_of(undisturbed, 0)
    one = site.order(allocation, 1, kind="train", steps=4, evaluate=True, start=start)
    site.done(one)
    (allocation.path / "slow").touch()
    two = site.order(allocation, 2, kind="train", steps=4, start=one.weights)
    three = site.order(allocation, 3, kind="train", steps=100_000, start=one.weights)
    site.wait(lambda: three.progress().get("step", 0) > 3)
    assert two.result() is None
    site.processes[0][1].kill()
    site.ended()
    assert two.result() is None
    allocation.mark_job_ended()

    again = site.start()
    for order in (two, three):
        again.assign(order.id)
    site.done(two)
    assert_equal(two.weights, weights_of(undisturbed, 2))
    site.wait(lambda: bool(three.progress().get("step")))
    names = sorted(path.name for path in site.spool.checkpoints.iterdir())
    assert names == ["run-a-000001@0000000004", "run-a-000002@0000000008"]


def test_a_released_allocation_waits_for_what_it_writes(site: Site, undisturbed: Site) -> None:
    """No order that was trained is lost because its job had nothing more to do."""
    allocation = site.start(program=SLOW)
    (allocation.path / "slow").touch()
    start = weights_of(undisturbed, 0)
    order = site.order(allocation, 1, kind="train", steps=4, evaluate=True, start=start)
    site.wait(lambda: order.weights.exists())
    allocation.release()
    assert order.result() is None
    (allocation.path / "slow").unlink()
    assert site.ended() == [0, 0], site.logs()
    site.done(order)
    assert_equal(order.weights, weights_of(undisturbed, 1))


def test_kill_of_an_idle_rank_ends_all(site: Site) -> None:
    """Also when no order runs and nobody is in a collective that could fail."""
    allocation = site.start()
    site.wait(lambda: (s := allocation.state()) is not None and s.state == "ready")
    site.processes[0][1].kill()
    site.ended()


def test_sigterm_keeps_the_steps_done(site: Site, undisturbed: Site) -> None:
    """A preempted job saves in the middle of an order; requeued, it goes on from there, on
    another number of ranks if need be, and no step is trained twice. Of an order of SCAFFOLD,
    the gradients of all its steps are kept."""
    initial = load_file(weights_of(undisturbed, 0))
    correction = site.spool.root.with_name("correction.safetensors")
    save_file({name: np.full_like(w, 1e-3) for name, w in initial.items()}, correction)
    scaffold: dict[str, Any] = {
        "options": {"mean-gradient": True}, "extra_arrays": {"correction": correction},
    }  # fmt: skip
    allocation = site.start(train=dataclasses.replace(FAST, schedule_steps=3000))
    order = site.order(
        allocation, 1, kind="train", steps=3000, evaluate=True,
        start=weights_of(undisturbed, 0), **scaffold,
    )  # fmt: skip
    site.wait(lambda: order.progress().get("step", 0) > 3)
    site.processes[0][0].send_signal(signal.SIGTERM)
    assert site.ended() == [0, 0], site.logs()
    assert order.result() is None
    before = allocation.state()
    assert before is not None
    assert before.state == "interrupted"
    (saved,) = site.spool.checkpoints.iterdir()
    meta = json.loads((saved / "meta.json").read_text())
    assert 3 < meta["step"] < 3000
    assert meta["trained"]["steps"] == meta["step"]

    steps = meta["step"] + 2
    (order.path / "order.json").unlink()
    site.start(ranks=1, train=dataclasses.replace(FAST, micro_batch=4), requeued=allocation)
    again = site.order(allocation, 1, kind="train", steps=steps, evaluate=True, **scaffold)
    result = site.done(again)
    assert result.steps == steps
    assert result.tokens == steps * 4 * 31
    assert "held_out_loss" in result.metrics  # measured before the signal
    mean = load_file(again.arrays("gradient"))
    assert result.extra_arrays.keys() == {"gradient"}
    assert {n: g.shape for n, g in mean.items()} == {n: w.shape for n, w in initial.items()}
    assert all(np.isfinite(g).all() and g.any() for g in mean.values())
    allocation.release()
    assert site.ended() == [0]
    after = allocation.state()
    assert after is not None
    assert after.beat > before.beat
    assert after.seconds["load"] > before.seconds["load"]  # of both starts


def test_a_warning_returns_what_is_done(site: Site, undisturbed: Site) -> None:
    """The scheduler's signal ahead of the walltime's end: a result with the true steps and
    tokens, published, and the job is left in order."""
    allocation = site.start(ranks=1)
    order = site.order(allocation, 1, kind="train", steps=10**6, start=weights_of(undisturbed, 0))
    site.wait(lambda: order.progress().get("step", 0) > 3)
    site.processes[0][0].send_signal(signal.SIGUSR2)
    result = site.done(order)
    assert site.ended() == [0], site.logs()
    assert 3 < result.steps < 10**6
    assert result.tokens == result.steps * 2 * 31
    state = allocation.state()
    assert state is not None
    assert (state.state, state.error) == ("closed", "")
    (saved,) = site.spool.checkpoints.iterdir()
    assert json.loads((saved / "meta.json").read_text())["finished"]


def test_a_loaded_allocation_takes_over(site: Site, undisturbed: Site) -> None:
    """Order 1 in one allocation, order 2 in another that was loaded before order 1 was trained,
    on another number of ranks: as in a single one. The first saves its state as it leaves."""
    first = site.start(train=dataclasses.replace(FAST, checkpoint_every_orders=5))
    second = site.start(ranks=1, train=dataclasses.replace(FAST, micro_batch=4))
    site.wait(lambda: (s := second.state()) is not None and s.state == "ready")
    start = weights_of(undisturbed, 0)
    one = site.order(first, 1, kind="train", steps=4, evaluate=True, start=start)
    site.done(one)
    assert not site.spool.checkpoints.exists()
    first.release()
    assert site.ended(0) == [0, 0], site.logs()
    two = site.order(second, 2, kind="train", steps=4, start=one.weights)
    site.done(two)
    found, expected = load_file(two.weights), load_file(weights_of(undisturbed, 2))
    for name in expected:  # 1e-2 is one step of AdamW: another data order or schedule is far off
        np.testing.assert_allclose(found[name], expected[name], atol=5e-4, err_msg=name)


def test_a_finished_checkpoint_without_result_is_only_written_out(
    site: Site, undisturbed: Site
) -> None:
    """A job that dies between checkpoint and result has trained: the next one just answers."""
    allocation = site.start(ranks=1)
    start = weights_of(undisturbed, 0)
    order = site.order(allocation, 1, kind="train", steps=4, start=start)
    before = site.done(order)
    allocation.release()
    site.ended()
    (saved,) = site.spool.checkpoints.iterdir()
    names = FileSystemReader(saved).read_metadata().state_dict_metadata
    assert {name.partition(".")[0] for name in names} == {"optimizer"}, "and no weights"
    written = order.weights.stat().st_mtime_ns
    (order.path / "result.json").unlink()
    order.write_answer(before)  # as it is until the checkpoint is there

    allocation = site.start(ranks=1)
    allocation.assign("run-a-000001")
    after = site.done(order)
    assert after == before
    assert order.weights.stat().st_mtime_ns == written
    two = site.order(allocation, 2, kind="train", steps=4, start=order.weights)
    site.done(two)
    allocation.release()
    site.ended()
    meta = json.loads((max(site.spool.checkpoints.iterdir()) / "meta.json").read_text())
    assert meta["step"] == 8, "it has gone on from there"
    assert order.answer() is None, "left beside the result"


HURRIED = """
import sys, time
from flwr_hpc.train import trainer, worker
endings, init, step = [], worker.Deadline.__init__, trainer.Trainer._train_step
def noted(self, *args):
    init(self, *args)
    endings.append(self)
def hurried(self, *args):
    if self.step == 3:
        end = time.monotonic() + endings[0].reserve_s + 0.5
        endings[0].walltime_s = end - endings[0]._start
    return step(self, *args)
worker.Deadline.__init__, trainer.Trainer._train_step = noted, hurried
worker.run(sys.argv[1])
"""


def test_an_order_is_cut_to_the_walltime(site: Site) -> None:
    """With the walltime nearly over the order ends early, with what it did, and the job too.
    (The walltime is cut short at a step, so that a slow start does not use it up.)"""
    allocation = site.start(ranks=1, program=HURRIED)
    order = site.order(allocation, 0, kind="train", steps=10**6)
    result = site.done(order)
    assert 3 < result.steps < 10**6
    assert site.ended() == [0]
    state = allocation.state()
    assert state is not None
    assert state.state == "closed"
    assert state.walltime_left_s is not None
    assert state.walltime_left_s > 0
