"""What a training order begins with and leaves behind, with a trainer that only counts."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from worlds.train.counting import Answers, CountingTrainer, Shelf, counted

from flwr_hpc.config.schema import DataConfig, TrainConfig
from flwr_hpc.protocol import Order, Result
from flwr_hpc.spool import OrderDir
from flwr_hpc.train.metrics import Meter
from flwr_hpc.train.order import OrderRunner
from flwr_hpc.train.progress import DivergedError
from flwr_hpc.train.state.background import Background
from flwr_hpc.train.state.site_state import SiteState
from flwr_hpc.worker.deadline import Stop
from flwr_hpc.worker.lifeline import RankError
from flwr_hpc.worker.phase_timer import PhaseTimer


@pytest.fixture
def shelf() -> Shelf:
    RESULTS.clear()
    ANSWERS.clear()
    return Shelf()


def runner(shelf: Shelf, **train: Any) -> OrderRunner:
    group = SimpleNamespace(
        ranks=SimpleNamespace(rank=0, world_size=1), largest=lambda x: x, device=None,
        broadcast=lambda x, group=None: x, background=None,
    )  # fmt: skip
    config, parts = TrainConfig(**train), {"reporter": None, "group": group}
    meter = Meter(timer=PhaseTimer(), train=config, data=DataConfig(), flops_per_token=1.0, **parts)
    meter.memory = dict  # type: ignore[assignment,method-assign]
    trainer: Any = CountingTrainer()
    checkpoints: Any = shelf
    background = Background(group)  # type: ignore[arg-type]
    state = SiteState(trainer, checkpoints, background, config, meter)
    return OrderRunner(state, {}, Answers(), algorithms=counted)


class Folder(OrderDir):
    """An order's folder in memory."""

    def write_result(self, result: Result) -> None:
        RESULTS[self] = result

    def write_answer(self, result: Result) -> None:
        ANSWERS[self] = result

    def answer(self) -> Result | None:
        return ANSWERS.get(self)


START = Path("/nowhere/start")
RESULTS: dict[OrderDir, Result] = {}
ANSWERS: dict[OrderDir, Result] = {}


def run(made: OrderRunner, seq: int, steps: int = 4) -> Result | None:
    return carry_out(made, Order("run", "a", seq, "train", steps=steps))


def carry_out(made: OrderRunner, order: Order, weights: Path | None = None) -> Result | None:
    """Return the result as it is published, after all that belongs to it."""
    folder = Folder(Path("/nowhere") / order.id)
    result = made.run(order, weights, folder)
    if result is None:
        return None
    made.publish(folder, result)
    made.background.wait()
    return RESULTS.pop(folder)


@pytest.mark.parametrize(
    ("weights", "parts", "stops", "kept"),
    [
        (START, {}, [Stop.NO], False),
        (None, {}, [Stop.NO], True),
        (START, {"returns": []}, [Stop.NO], True),
        (START, {}, [Stop.NO, Stop.LEAVE], True),
    ],
    ids=["whole", "none came", "a part", "under way"],
)
def test_weights_are_in_a_checkpoint_that_needs_them(
    shelf: Shelf, weights: Path | None, parts: dict[str, Any], stops: list[Stop], kept: bool
) -> None:
    """Protects a third of a checkpoint's disk, and weights that are nowhere else."""
    made = runner(shelf)
    made.deadline = Answers(*stops)
    carry_out(made, Order("run", "a", 0, "train", steps=4, **parts), weights)
    ((meta, tensors),) = shelf.kept.values()
    assert (meta["weights"], "weights" in tensors) == (kept, kept)
    again = runner(shelf)
    again.restore()
    assert again.state.left_by == ("run-a-000000" if kept else "")


def test_what_a_codec_sends_is_told(shelf: Shelf) -> None:
    """Protects the report of a codec's rate, which is known only once all is encoded."""
    made, folder = runner(shelf), Folder(Path("/nowhere/run-a-000000"))
    order = Order("run", "a", 0, "train", steps=4)
    result = made.run(order, START, folder)
    assert result is not None
    made.publish(folder, result)
    made.background.wait()
    assert RESULTS.pop(folder).metrics["sent_share"] == 0.1


def moments(made: OrderRunner) -> tuple[int, int]:
    return made.trainer.step, made.trainer.tensors()["moments"]  # type: ignore[return-value]


@pytest.mark.parametrize("why", [Stop.FINISH, Stop.LEAVE])
def test_no_step_no_result(shelf: Shelf, why: int) -> None:
    """Protects the aggregation from results of 0 steps: the order goes to the next job."""
    made = runner(shelf)
    made.deadline = Answers(why)
    assert run(made, 0) is None
    assert shelf.kept == {}


def test_a_cut_order_tells_its_true_steps_and_an_interrupted_one_none(shelf: Shelf) -> None:
    """Protects true numbers on a cut, and the rest of the order on an interruption."""
    made = runner(shelf)
    answers = [Stop.NO, Stop.NO, Stop.FINISH, Stop.NO, Stop.LEAVE]
    made.deadline = Answers(*answers)
    result = run(made, 0)
    assert result is not None
    assert result.steps == 2
    assert run(made, 1) is None
    assert shelf.kept["run-a-000001@0000000003"][0]["finished"] is False
    after = runner(shelf)
    result = run(after, 1)
    assert result is not None
    assert result.steps == 4
    assert moments(after) == (6, 6)


def test_a_newer_state_is_taken_over_once(shelf: Shelf) -> None:
    """Protects optimizer, data and schedule when a site's orders change the allocation."""
    first, second = runner(shelf), runner(shelf)
    run(first, 0)
    run(first, 1)
    assert shelf.loads == 0  # its own is never older
    run(second, 2)
    assert (shelf.loads, moments(second)) == (1, (12, 12))
    run(second, 3)
    assert (shelf.loads, moments(second)) == (1, (16, 16))
    run(first, 4)
    assert moments(first) == (20, 20)


def test_orders_of_another_flower_run_are_newer_by_their_steps(shelf: Shelf) -> None:
    """Protects from going back to an earlier run whose random id sorts later."""
    first, second = runner(shelf), runner(shelf)
    order = Order("zzz", "a", 0, "train", steps=4)
    carry_out(first, order)
    run(second, 0)
    run(second, 1)
    assert (shelf.loads, moments(second)) == (1, (12, 12))


@pytest.mark.parametrize(("every", "saved"), [(0, 0), (1, 3), (2, 2), (5, 1)])
def test_what_is_unsaved_is_saved_at_the_end(shelf: Shelf, every: int, saved: int) -> None:
    """Protects the state of orders between two checkpoints when the allocation ends."""
    made = runner(shelf, checkpoint_every_orders=every)
    for seq in range(3):
        run(made, seq)
    made.save()
    made.save()
    assert len(shelf.kept) == saved
    assert every == 0 or "run-a-000002@0000000012" in shelf.kept


def test_the_reserve_counts_a_checkpoint(shelf: Shelf) -> None:
    """Protects the last write: also of a checkpoint that was not written yet."""
    made = runner(shelf, checkpoint_every_orders=2)
    run(made, 0)
    assert made.write_s == pytest.approx(4 * made._weights_s)
    run(made, 1)
    assert made.write_s == pytest.approx(made.state.checkpoint_s + made._weights_s)
    assert made.deadline.reserve_s == pytest.approx(2 * (made.write_s + made.step_s) + 1)


def test_the_learning_rate_is_scaled_for_its_order_only(shelf: Shelf) -> None:
    """Protects FedQueue's scaling, and the orders of others from it."""
    made = runner(shelf)
    order = Order("run", "a", 0, "train", steps=1, options={"lr-scale": 0.25})
    carry_out(made, order)
    assert made.trainer.lr_scale == 0.25
    run(made, 1, steps=1)
    assert made.trainer.lr_scale == 1.0


def test_an_algorithm_goes_on_in_another_job(shelf: Shelf) -> None:
    """Protects SCAFFOLD's sums from a preemption, and other orders from their cost."""
    made, options = runner(shelf), {"count": True}
    order = Order("run", "a", 0, "train", steps=4, options=options)
    answers = [Stop.NO, Stop.LEAVE]
    made.deadline = Answers(*answers)
    assert carry_out(made, order) is None
    after = runner(shelf)
    result = carry_out(after, order)
    assert result is not None
    assert result.extra_arrays == {"gradient": "4 in 4"}
    assert result.metrics["begun"] == 1.0  # in the first job
    other = run(after, 1)
    assert other is not None
    assert other.extra_arrays == {}
    finished = [tensors for meta, tensors in shelf.kept.values() if meta["finished"]]
    assert finished
    assert not any("count" in tensors for tensors in finished)


def test_an_order_is_answered_by_the_job_after(shelf: Shelf) -> None:
    """Protects from training twice where a job dies between an order's checkpoint and result."""
    order = Order("run", "a", 0, "train", steps=4, options={"count": True})
    first = carry_out(runner(shelf), order)
    after = runner(shelf)
    assert carry_out(after, order) == first  # its answer, found with the checkpoint
    assert moments(after) == (4, 4)
    ANSWERS.clear()
    after = runner(shelf)
    assert carry_out(after, order) is not None  # trained again: better than no result for ever
    assert moments(after) == (8, 8)


def test_a_damaged_checkpoint_costs_its_steps_and_not_the_site(shelf: Shelf) -> None:
    """Protects a site from one bad file: the older one is tried, and the result says so."""
    for seq in range(2):
        run(runner(shelf), seq)
    shelf.damaged = {"run-a-000001@0000000008"}
    after = runner(shelf)
    result = run(after, 2)
    assert result is not None
    assert (result.state, moments(after)) == ("done", (8, 8))
    assert "run-a-000001@0000000008 is damaged" in result.note
    assert run(after, 3).note == ""  # type: ignore[union-attr]


def test_an_order_whose_own_checkpoint_is_damaged_begins_anew(shelf: Shelf) -> None:
    """Protects an interrupted order: without its half the whole of it is trained."""
    made = runner(shelf)
    made.deadline = Answers(Stop.NO, Stop.NO, Stop.LEAVE)
    assert run(made, 0) is None
    shelf.damaged = set(shelf.kept)
    after = runner(shelf)
    result = run(after, 0)
    assert result is not None
    assert (result.steps, moments(after)) == (4, (4, 4))


def test_divergence_is_tried_once_more_from_the_last_good_state(shelf: Shelf) -> None:
    """Protects an order from a fault that passes, and the site from one that does not."""
    made = runner(shelf)
    made.meter.note = lambda *_: None  # type: ignore[method-assign]
    run(made, 0)
    made.trainer.diverges = 1  # type: ignore[attr-defined]
    result = run(made, 1)
    assert result is not None
    assert (result.steps, moments(made)) == (4, (8, 8))
    assert made.trainer.cursor.sequences == 32
    assert result.note.startswith("training diverged: in step 1. Started again")
    made.trainer.diverges = 2  # type: ignore[attr-defined]
    with pytest.raises(DivergedError, match="training diverged"):
        run(made, 2)


def test_training_goes_on_while_an_order_is_written(shelf: Shelf) -> None:
    """Protects GPU time: the next order is trained before the one before it is on disk."""
    made, trained = runner(shelf), threading.Event()
    stage = shelf.stage
    shelf.stage = lambda *args: _once(trained, stage(*args))  # type: ignore[method-assign]
    first = Order("run", "a", 0, "train", steps=4)
    folder = Folder(Path("/nowhere") / first.id)
    result = made.run(first, None, folder)
    assert result is not None
    made.publish(folder, result)
    written: list[int] = []

    def should_stop(_: float = 0.0) -> Stop:
        written.append(len(shelf.kept))
        if len(written) == 4:  # before the last step of the second order
            trained.set()
        return Stop.NO

    made.deadline.should_stop = should_stop  # type: ignore[method-assign]
    run(made, 1)
    assert written == [0] * 4
    assert list(shelf.kept) == ["run-a-000000@0000000004", "run-a-000001@0000000008"]
    assert moments(made) == (8, 8)
    assert shelf.kept["run-a-000000@0000000004"][1]["moments"] == 4, "a copy, not what it became"


def _once(event: threading.Event, write: Any) -> Any:
    def held() -> None:
        assert event.wait(600)
        write()

    return held


def test_no_result_is_seen_before_its_checkpoint(shelf: Shelf) -> None:
    """Protects a successor, and a site whose job is killed, from an answer without its state."""
    made = runner(shelf)
    seen: list[list[str]] = []
    folder = Folder(Path("/nowhere") / "run-a-000000")
    folder.__dict__["write_result"] = lambda _: seen.append(list(shelf.kept))
    result = made.run(Order("run", "a", 0, "train", steps=4), None, folder)
    assert result is not None
    made.publish(folder, result)
    made.background.wait()
    assert seen == [["run-a-000000@0000000004"]]


def test_what_cannot_be_written_in_the_background_is_said(shelf: Shelf) -> None:
    """Protects from orders that are trained and never kept: the disk is named, nothing answered."""
    made, shelf.full = runner(shelf), True
    folder = Folder(Path("/nowhere") / "run-a-000000")
    result = made.run(Order("run", "a", 0, "train", steps=4), None, folder)
    assert result is not None
    made.publish(folder, result)
    made.background.drain()
    assert made.background.failed
    with pytest.raises(RankError, match="No space left") as raised:
        run(made, 1)
    assert raised.value.cause == "disk"
    assert folder not in RESULTS


def merging(made: OrderRunner, seq: int, after: int) -> Result | None:
    order = Order("run", "a", seq, "train", steps=4, merges=[], options={"after": after})
    return carry_out(made, order)


def test_an_order_goes_on_from_its_predecessor_or_not_at_all(shelf: Shelf) -> None:
    """Protects the model from fragments merged into weights of another order."""
    first, second = runner(shelf), runner(shelf)
    run(first, 0)
    refused = merging(first, 1, after=7)
    assert refused is not None
    assert (refused.state, refused.refused, refused.fatal) == ("failed", True, False)
    assert "run-a-000007" in refused.error
    for seq in (1, 2):
        result = merging(first, seq, after=seq - 1)
        assert result is not None
        assert result.state == "done"
    assert merging(second, 3, after=2).state == "done"  # type: ignore[union-attr]
    assert moments(second) == (16, 16)


def test_merged_weights_are_not_saved_as_those_of_the_order_before(shelf: Shelf) -> None:
    """Protects from merging twice: without a step of its own, an order leaves nothing to go on."""
    made, successor = runner(shelf, checkpoint_every_orders=2), runner(shelf)
    run(made, 0)
    made.deadline = Answers(Stop.FINISH)
    assert merging(made, 1, after=0) is None
    made.save()
    assert shelf.kept == {}
    assert merging(successor, 1, after=0).state == "failed"  # type: ignore[union-attr]
