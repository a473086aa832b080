"""The trainer computes the same numbers however the work is split over ranks and time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import worlds.train.checkpoint_scenarios as checkpoints
import worlds.train.numerics_scenarios as scenario
from safetensors.numpy import load_file, save_file
from worlds.train.comparing import KINDS, assert_same, gpt2
from worlds.train.torch_ranks import Team, start_team, start_teams


@pytest.fixture(scope="module")
def teams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Team]]:
    """One process alone, and two together; started once, as importing torch takes longest."""
    yield from start_teams(tmp_path_factory.mktemp, (1, 2))


@pytest.fixture
def solo(teams: dict[int, Team]) -> Team:
    return teams[1]


@pytest.fixture
def pair(teams: dict[int, Team]) -> Team:
    return teams[2]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_equal_one_process(
    solo: Team, pair: Team, tmp_path: Path, kind: dict[str, bool]
) -> None:
    """Sharding changes no number: loss, gradient norm, held-out loss, weights after k steps."""
    one = solo.run(scenario.trained, tmp_path / "1", micro_batch=8, **kind)
    two = pair.run(scenario.trained, tmp_path / "2", micro_batch=4, **kind)
    for key in ("losses", "train_loss", "last_loss", "grad_norm", "held_out"):
        np.testing.assert_allclose(two[key], one[key], rtol=1e-5, err_msg=key)
    assert two["tokens"] == one["tokens"]
    assert two["held_out_counts"] == one["held_out_counts"]
    assert len(one["losses"]) == 4
    assert_same(two["weights"], one["weights"])


def test_goldfish_loss_of_two_ranks_equals_one_process(
    solo: Team, pair: Team, tmp_path: Path
) -> None:
    """Protects the mean over the kept tokens, of which every rank has another count."""
    options: dict[str, Any] = {"loss": "goldfish", "goldfish_k": 2, "goldfish_h": 3}
    one = solo.run(scenario.trained, tmp_path / "1", micro_batch=8, **options)
    two = pair.run(scenario.trained, tmp_path / "2", micro_batch=4, **options)
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-5)
    assert_same(two["weights"], one["weights"])
    plain = solo.run(scenario.trained, tmp_path / "3", micro_batch=8)
    assert two["tokens"] == one["tokens"] < 0.75 * plain["tokens"]
    assert two["held_out_counts"] == plain["held_out_counts"], "evaluation leaves nothing out"


def test_a_model_with_other_names_is_sharded_alike(solo: Team, pair: Team, tmp_path: Path) -> None:
    """GPT-2: Conv1D, biases, learnt positions and a tied head, a unit per layer on two ranks."""
    model = gpt2(n_embd=32, n_layer=2, n_positions=32)
    one = solo.run(scenario.trained, tmp_path / "1", micro_batch=8, model=model)
    two = pair.run(scenario.trained, tmp_path / "2", micro_batch=4, model=model)
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-5)
    assert one["losses"][-1] < one["losses"][0]
    assert "transformer.h.1.attn.c_attn.weight" in one["weights"]
    assert_same(two["weights"], one["weights"])


@pytest.mark.parametrize("model", [None, gpt2(n_embd=32, n_layer=2)], ids=["llama", "gpt2"])
def test_dora_of_two_ranks_equals_one_process(
    solo: Team, pair: Team, tmp_path: Path, model: dict[str, Any] | None
) -> None:
    """The norm of a whole row of weights, of which a rank has but a shard; magnitudes learn."""
    kind: dict[str, Any] = {"dora": True, "model": model}
    start = solo.run(scenario.trained, tmp_path / "0", micro_batch=8, steps=1, lr=0.0, **kind)
    one = solo.run(scenario.trained, tmp_path / "1", micro_batch=8, **kind)
    two = pair.run(scenario.trained, tmp_path / "2", micro_batch=4, **kind)
    for key in ("losses", "grad_norm", "held_out"):
        np.testing.assert_allclose(two[key], one[key], rtol=1e-5, err_msg=key)
    assert_same(two["weights"], one["weights"])
    magnitudes = [n for n in one["weights"] if n.endswith("lora_magnitude_vector")]
    assert magnitudes
    for name in magnitudes:
        assert np.abs(one["weights"][name] - start["weights"][name]).max() > 1e-4, name


def test_dropout_is_drawn_by_the_step(pair: Team, tmp_path: Path) -> None:
    """A job that goes on after a preemption drops what the first one would have dropped."""
    model = gpt2(n_embd=32, n_layer=2, n_positions=32, resid_pdrop=0.5)
    options: dict[str, Any] = {"steps": 3, "model": model}
    again, _ = pair.run(checkpoints.interrupted, _new(tmp_path / "1"), 1, **options)
    once, _ = pair.run(checkpoints.uninterrupted, _new(tmp_path / "2"), **options)
    assert_same(again, once, rtol=0)
    without, _ = pair.run(
        checkpoints.uninterrupted, _new(tmp_path / "3"), 3, model=model | {"resid_pdrop": 0.0}
    )
    assert any((without[name] != value).any() for name, value in once.items())


def test_a_small_model_as_one_unit_equals_a_unit_per_layer(pair: Team, tmp_path: Path) -> None:
    """The shortcut for small models is a matter of speed alone."""
    layered = pair.run(scenario.trained, tmp_path / "1")
    whole = pair.run(scenario.trained, tmp_path / "2", one_unit_below=10**9)
    assert_same(whole["weights"], layered["weights"])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_averaged_and_not_summed(
    solo: Team, pair: Team, kind: dict[str, bool]
) -> None:
    """Guards against pytorch#162338: gloo once took AVG for SUM, silently; AdamW hides it."""
    one = solo.run(scenario.gradients, micro_batch=8, **kind)
    two = pair.run(scenario.gradients, micro_batch=4, **kind)
    assert any(np.abs(g).max() > 1e-4 for g in one.values())
    assert_same(two, one)


@pytest.mark.parametrize("size", [1, 2])
def test_accumulation_equals_a_large_batch(
    teams: dict[int, Team], tmp_path: Path, size: int
) -> None:
    """Micro batches are weighted by their tokens, although these are uneven."""
    splits = {"micro_batch": 8}, {"micro_batch": 2, "accumulation": 4}
    whole, parts = (teams[size].run(scenario.gradients, **split) for split in splits)
    assert_same(parts, whole, rtol=2e-6)
    large = teams[size].run(scenario.trained, tmp_path / "1", micro_batch=8)
    small = teams[size].run(scenario.trained, tmp_path / "2", micro_batch=2, accumulation=4)
    np.testing.assert_allclose(small["losses"], large["losses"], rtol=1e-5)
    assert_same(small["weights"], large["weights"])


@pytest.mark.parametrize("kind", KINDS)
def test_orders_in_a_row_equal_uninterrupted_training(
    pair: Team, tmp_path: Path, kind: dict[str, bool]
) -> None:
    """One facility whose weights come back as they went is plain training, to the last bit:
    optimizer state, schedule and data go on across orders."""
    at_once = pair.run(scenario.in_orders, tmp_path / "1", [6], **kind)
    in_three = pair.run(scenario.in_orders, tmp_path / "2", [2, 3, 1], **kind)
    assert_same(in_three, at_once, rtol=0)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_interrupted_equals_uninterrupted(pair: Team, tmp_path: Path, lora: bool) -> None:
    """A signal at one rank ends the order on all; restored, it gives the same bits."""
    once, once_loss = pair.run(checkpoints.uninterrupted, tmp_path / "1", 4, lora=lora)
    again, again_loss = pair.run(checkpoints.interrupted, tmp_path / "2", 2, 4, lora=lora)
    assert_same(again, once, rtol=0)
    assert again_loss == pytest.approx(once_loss, rel=1e-12)


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_checkpoint_is_written_while_training_goes_on(
    pair: Team, tmp_path: Path, lora: bool, with_weights: bool
) -> None:
    """What is written is the state at the order's end, with the weights or without."""
    found = pair.run(checkpoints.staged, tmp_path, with_weights, lora=lora)
    assert_same(found["states"][1], found["states"][0], rtol=0)
    assert len(found["files"]) == 2, "each rank writes its own shards"
    kinds = {name.partition(".")[0] for name in found["states"][1]}
    assert kinds == {"optimizer", "model"} if with_weights else {"optimizer"}


def test_the_last_two_checkpoints_stay(pair: Team, tmp_path: Path) -> None:
    """Nothing half-written is left behind, and saving again is harmless."""
    names = pair.run(checkpoints.saved_thrice, tmp_path)
    assert names == ["run-a-000001@0000000002", "run-a-000001@0000000003"]


@pytest.mark.parametrize("file", ["*.distcp", ".metadata", "meta.json"])
def test_a_damaged_checkpoint_is_set_aside_and_the_next_one_loaded(
    pair: Team, tmp_path: Path, file: str
) -> None:
    """One bad file does not block a site for good; it stays for a person to look at."""
    words, step, names = pair.run(checkpoints.damaged, tmp_path, file)
    assert "run-a-000001@0000000002 is damaged" in words[0]
    assert step == 2
    assert names == [".run-a-000001@0000000002.damaged", "run-a-000001@0000000001"]


def test_a_checkpoint_that_cannot_be_written_is_an_error_with_words(
    pair: Team, tmp_path: Path
) -> None:
    """torch's own error passes every ``except Exception``; and no half of a file is left."""
    error, left = pair.run(checkpoints.failing_save, tmp_path)
    assert error.startswith("RankError: checkpoint")
    assert "ValueError: no" in error
    assert left == []


@pytest.mark.parametrize(
    ("taken", "above"),
    [("weights.safetensors", 1e3), ("weights-00001-of-00002.safetensors", 0.0)],
    ids=["of rank 0", "of another"],
)
def test_a_failure_in_the_background_is_everybodys(
    pair: Team, tmp_path: Path, taken: str, above: float
) -> None:
    """No rank waits in a checkpoint for one that could not write the weights before it."""
    words, left = pair.run(
        checkpoints.failing_in_the_background, tmp_path, taken, shards_above_mb=above
    )
    assert taken in words[0]
    assert words[1] == words[0]
    assert left == []


def test_activation_checkpointing_changes_nothing(pair: Team, tmp_path: Path) -> None:
    """It trades time for memory only."""
    plain = pair.run(scenario.trained, tmp_path / "1")
    saving = pair.run(scenario.trained, tmp_path / "2", activation_checkpointing="full")
    assert_same(saving["weights"], plain["weights"], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_in_chunks_changes_nothing(
    pair: Team, tmp_path: Path, kind: dict[str, bool]
) -> None:
    """The head is computed again in the backward pass, on gathered weights."""
    whole = pair.run(scenario.trained, tmp_path / "1", **kind)
    chunks = pair.run(scenario.trained, tmp_path / "2", chunk_bytes=4096, **kind)
    np.testing.assert_allclose(chunks["losses"], whole["losses"], rtol=1e-6)
    assert_same(chunks["weights"], whole["weights"])


def test_bf16_trains_float32_weights(pair: Team, tmp_path: Path) -> None:
    """Mixed precision follows fp32 to bf16's accuracy; what is exchanged stays float32."""
    exact = pair.run(scenario.trained, tmp_path / "1")
    rough = pair.run(scenario.trained, tmp_path / "2", precision="bf16")
    np.testing.assert_allclose(rough["losses"], exact["losses"], rtol=2e-2)
    assert rough["losses"] != exact["losses"]
    assert {v.dtype for v in rough["weights"].values()} == {np.dtype(np.float32)}


def test_proximal_term_keeps_near_the_start(pair: Team, tmp_path: Path) -> None:
    """FedProx: the larger mu, the shorter the way from the received weights."""
    start = pair.run(scenario.trained, tmp_path / "0", steps=0 + 1, lr=0.0)["weights"]

    def distance(mu: float) -> float:
        weights = pair.run(scenario.trained, tmp_path / "1", mu=mu, clip=0.0)["weights"]
        return float(sum(np.square(weights[n] - start[n]).sum() for n in start))

    assert distance(1.0) < 0.9 * distance(0.0)


def test_proximal_term_by_hand(pair: Team, tmp_path: Path) -> None:
    """It adds mu (w - w_received) to the gradient: nothing in the first step, w_1 - w_0 after."""
    _, _, plain = pair.run(scenario.two_steps_with_proximal, tmp_path, 0.0)
    start, middle, found = pair.run(scenario.two_steps_with_proximal, tmp_path, 0.5)
    assert found
    for name, moment in found.items():
        expected = 0.1 * 0.5 * (middle[name] - start[name])  # 1 - beta_1, mu
        np.testing.assert_allclose(moment - plain[name], expected, rtol=1e-3, atol=1e-7)


def test_diloco_of_one_site_and_one_step_is_plain_training(solo: Team, tmp_path: Path) -> None:
    """H = 1, eta = 1, beta = 0: six rounds of one step are six steps, but for rounding."""
    at_once = solo.run(scenario.in_orders, _new(tmp_path / "1"), [6])
    in_rounds = solo.run(scenario.under_diloco, _new(tmp_path / "2"), [1] * 6)
    assert_same(in_rounds, at_once, rtol=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_mean_gradient_of_two_ranks_is_that_of_one(
    solo: Team, pair: Team, tmp_path: Path, lora: bool
) -> None:
    """SCAFFOLD: corrected steps and the mean gradient without the correction are whole tensors."""
    one = solo.run(scenario.with_variates, _new(tmp_path / "1"), micro_batch=8, lora=lora)
    two = pair.run(scenario.with_variates, _new(tmp_path / "2"), micro_batch=4, lora=lora)
    assert_same(two["weights"], one["weights"])
    assert_same(two["mean"], one["mean"], rtol=1e-4)


def test_the_correction_is_added_to_the_gradient(solo: Team, tmp_path: Path) -> None:
    """SCAFFOLD: after one step of Adam from zero moments the sign of g + (c - c_i) tells."""
    plain = {"warmup_steps": 0, "clip": 0.0, "weight_decay": 0.0, "eps": 1e-12}
    start = solo.run(scenario.trained, tmp_path / "0", steps=1, lr=0.0)["weights"]
    found = solo.run(scenario.with_variates, _new(tmp_path / "1"), steps=1, lr=1e-3, **plain)
    for name, correction in found["correction"].items():
        used = found["mean"][name] + correction
        clear = np.abs(used) > 1e-6
        moved = (start[name] - found["weights"][name])[clear]
        assert (np.sign(moved) == np.sign(used[clear])).all(), name
        assert (np.sign(used) != np.sign(found["mean"][name])).any(), name


def test_the_sum_of_the_gradients_survives_a_preemption(pair: Team, tmp_path: Path) -> None:
    """SCAFFOLD: the mean is over all steps of the order, those of the earlier job included."""
    once = pair.run(scenario.with_variates, _new(tmp_path / "1"))
    again = pair.run(scenario.with_variates, _new(tmp_path / "2"), at=2)
    assert_same(again["weights"], once["weights"], rtol=0)
    assert_same(again["mean"], once["mean"], rtol=0)


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_optimizer_can_be_reset(pair: Team) -> None:
    """``train.reset_optimizer`` forgets moments and their step count."""
    before, after = pair.run(scenario.moments)
    assert before > 0
    assert after == 0


def test_divergence_is_named(pair: Team) -> None:
    """Weights that are no numbers are not sent; the error says what to change."""
    error, steps = pair.run(scenario.diverging)
    assert error.startswith("DivergedError: training diverged")
    assert "train.lr" in error
    assert steps <= 3  # at once, and not at the end of a hundred


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_without_finite_gradients_is_not_taken(
    pair: Team, tmp_path: Path, poison: float
) -> None:
    """Weights, moments and step count stay as they were, on both ranks, if one rank fails."""
    before, after, words = pair.run(scenario.poisoned, tmp_path, poison)
    assert_same(after, before, rtol=0)
    assert "in step 2, sequences 8 to 15" in words


def test_two_ranks_go_on_with_the_data_of_four(pair: Team, tmp_path: Path) -> None:
    """No sequence comes twice or never after a job of another size has taken over."""
    four = start_team(_new(tmp_path / "team4"), 4)
    first = four.run(checkpoints.seen_on_four_then_two, tmp_path / "c", two=False)
    four.close()
    rest = pair.run(checkpoints.seen_on_four_then_two, tmp_path / "c", two=True)
    assert first + rest == list(range(2 * 8 + 2 * 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), "1 tensors are missing (model.norm.weight)"),
        (lambda w: w.update(extra=np.zeros(2, np.float32)), "1 tensors are unknown (extra)"),
        (lambda w: w.update({"model.norm.weight": np.zeros(3, np.float32)}), "has shape (3,)"),
        (
            lambda w: w["model.norm.weight"].fill(np.nan),
            "'model.norm.weight' has a value that is not finite",
        ),
    ],
    ids=["missing", "extra", "shape", "nan"],
)
def test_weights_that_do_not_fit_are_refused(
    pair: Team, tmp_path: Path, change: Any, message: str
) -> None:
    """Nothing is loaded in part or by broadcasting; every rank refuses."""
    weights = pair.run(scenario.trained, tmp_path, steps=1)["weights"]
    change(weights)
    save_file(weights, tmp_path / "bad.safetensors")
    error = pair.run(scenario.load_error, tmp_path / "bad.safetensors")
    assert error.startswith("UserError")
    assert message in error


def test_weights_and_files_are_a_hugging_face_directory(pair: Team, tmp_path: Path) -> None:
    """``from_pretrained`` takes the trained model and the trained adapter."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    pair.run(scenario.hub_directory, base)
    model = AutoModelForCausalLM.from_pretrained(base)
    exchanged = load_file(base / "model.safetensors")
    assert "lm_head.weight" not in exchanged
    parameters = dict(model.named_parameters())
    assert_same({n: p.detach().numpy() for n, p in parameters.items()}, exchanged, rtol=0)

    pair.run(scenario.hub_directory, adapter, lora=True, path=str(base))
    ids = torch.arange(8).reshape(1, 8)
    plain = model(ids).logits.detach().numpy()
    adapted = peft.PeftModel.from_pretrained(model, str(adapter))(ids).logits.detach().numpy()
    assert np.abs(adapted - plain).max() > 1e-4
