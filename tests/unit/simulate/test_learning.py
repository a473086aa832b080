"""What simulated sites learn: the small network, the transformer on text, the surrogate."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from flwr_hpc.simulate.learning import unicode_names
from flwr_hpc.simulate.learning.base import Learner
from flwr_hpc.simulate.learning.network import NetworkConfig, NetworkLearner, forward
from flwr_hpc.simulate.learning.surrogate import FLOOR, START, SurrogateLearner
from flwr_hpc.simulate.learning.text import TextConfig, TextLearner, Transformer

SMALL = NetworkConfig(vocabulary=6, width=5, batch=8)
CORPUS_SHA256 = "b4488d90566a2b2c0ed39534b07dd6c49b91cff523f5dd221180d9ebd8060be9"
SMALL_TEXT = TextConfig(width=4, blocks=2, context=5, batch=3, held_out=8)


def small(kind: str, seed: int = 0) -> Learner:
    """Return a learner of two sites that is quickly trained."""
    if kind == "network":
        return NetworkLearner(2, SMALL, seed)
    if kind == "text":
        return TextLearner(2, SMALL_TEXT, seed)
    return SurrogateLearner(2, seed, noise=0.0)


def average(*weights: dict) -> dict:
    return {k: np.mean([w[k] for w in weights], axis=0) for k in weights[0]}


def test_gradients_by_finite_differences():
    """Every weight of every tensor, in double precision."""
    learner, rng = NetworkLearner(2, SMALL, 0), np.random.default_rng(1)
    w = {k: a.astype(np.float64) for k, a in learner.initial().items()}
    domain, token, label = (rng.integers(0, n, size=12) for n in (2, 6, 6))
    gradients, scratch = ({k: np.zeros_like(a) for k, a in w.items()} for _ in range(2))
    learner.backward(w, gradients, domain, token, label)
    for name, tensor in w.items():
        for index in np.ndindex(tensor.shape):
            losses = []
            for step in (1e-5, -1e-5):
                tensor[index] += step
                losses.append(learner.backward(w, scratch, domain, token, label))
                tensor[index] -= step
            slope = (losses[0] - losses[1]) / 2e-5
            assert gradients[name][index] == pytest.approx(slope, abs=1e-8), (name, index)


def test_gradients_of_the_transformer_by_finite_differences():
    """Every weight of every tensor of two blocks, in double precision."""
    model, rng = Transformer(SMALL_TEXT), np.random.default_rng(1)
    w = {k: a.astype(np.float64) for k, a in model.initial(rng).items()}
    passages = rng.integers(0, len(unicode_names.ALPHABET), size=(3, 6))
    gradients = {k: np.zeros_like(a) for k, a in w.items()}
    loss = model.backward(w, gradients, passages)
    assert loss == pytest.approx(model.loss(w, passages), rel=1e-12)
    for name, tensor in w.items():
        for index in np.ndindex(tensor.shape):
            losses = []
            for step in (1e-5, -1e-5):
                tensor[index] += step
                losses.append(model.loss(w, passages))
                tensor[index] -= step
            slope = (losses[0] - losses[1]) / 2e-5
            assert gradients[name][index] == pytest.approx(slope, abs=1e-8), (name, index)


def test_the_transformer_does_not_see_what_it_predicts():
    """A change of a character leaves the predictions before it as they were."""
    model, rng = Transformer(SMALL_TEXT), np.random.default_rng(2)
    w = model.initial(rng)
    inputs = rng.integers(0, len(unicode_names.ALPHABET), size=(1, 5))
    *_, before = model._forward(w, inputs)
    inputs[0, 3] = (inputs[0, 3] + 1) % len(unicode_names.ALPHABET)
    *_, after = model._forward(w, inputs)
    np.testing.assert_array_equal(before[:3], after[:3])
    assert (before[3:] != after[3:]).any(axis=1).all()


def test_the_text_is_the_same_in_every_python():
    """Recorded figures would not be comparable otherwise."""
    text = "\n".join(unicode_names.names())
    assert set(text) <= set(unicode_names.ALPHABET)
    assert hashlib.sha256(text.encode()).hexdigest() == CORPUS_SHA256


def test_every_name_belongs_to_one_domain_and_is_trained_on_or_held_out():
    """Nothing of the held-out loss is ever trained on."""
    shares = unicode_names.domains(4)
    assert [name for share in shares for name in share] == unicode_names.names()
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) < 1.1 * min(sizes)
    for share in shares:
        train, held_out = unicode_names.split(share)
        assert sorted(train + held_out) == sorted(share)
        assert not set(train) & set(held_out)


def test_a_site_reads_mostly_its_own_domain():
    """With an own share of 1 every passage is of it."""
    learner = TextLearner(2, TextConfig(own_share=1.0, context=80), 0)
    for site in (0, 1):
        (passages,) = next(learner.batches(site, 1))
        own = set(unicode_names.domains(2)[site])
        text = ["".join(unicode_names.ALPHABET[i] for i in passage) for passage in passages]
        names = {name for line in text for name in line.split("\n")[1:-1]}
        assert names
        assert names <= own


def test_text_sites_need_each_other():
    """The mean of sites that train in turns beats, on all domains, each of them alone."""
    config = TextConfig(batch=8, lr=1e-2)
    learner, alone = TextLearner(2, config, 0), TextLearner(2, config, 0)
    w = learner.initial()
    for _ in range(5):
        w = average(*(learner.train(site, w, 40)[0] for site in range(2)))
    losses = [alone.evaluate(alone.train(site, alone.initial(), 200)[0]) for site in range(2)]
    assert learner.evaluate(w) < min(losses) - 0.1


def test_the_held_out_loss_is_exact():
    """The expectation over domains, tokens and next tokens, summed here one by one."""
    learner = NetworkLearner(2, SMALL, 3)
    w, total = learner.initial(), 0.0
    for domain in range(2):
        for token in range(6):
            _, logp = forward(w, np.array([domain]), np.array([token]))
            total -= float((learner.tables[domain, token] * logp[0]).sum())
    assert learner.evaluate(w) == pytest.approx(total / 12, rel=1e-6)


def test_the_held_out_loss_agrees_with_samples():
    """And is what training on all domains alike would see."""
    learner = NetworkLearner(3, NetworkConfig(vocabulary=8, width=8, own_share=0.0, batch=4000), 5)
    w = learner.initial()
    g = learner.initial()
    losses = [learner.backward(w, g, d, t, y) for d, t, y in learner.batches(0, 5)]
    assert learner.evaluate(w) == pytest.approx(np.mean(losses), rel=0.02)


@pytest.mark.parametrize("kind", ["network", "text", "surrogate"])
def test_training_is_deterministic(kind):
    """Same seed, same bits; another seed, others."""

    def trained(seed: int) -> dict:
        learner = small(kind, seed)
        w, _ = learner.train(1, learner.initial(), 7)
        return learner.train(1, w, 5)[0]

    first, again, other = trained(0), trained(0), trained(1)
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, again[name])
    assert any(not np.array_equal(first[n], other[n]) for n in first)


@pytest.mark.parametrize("kind", ["network", "text", "surrogate"])
def test_training_leaves_its_input_alone(kind):
    """The arrays are those of the server's checkpoint."""
    learner = small(kind)
    w = learner.initial()
    for tensor in w.values():
        tensor.flags.writeable = False
    learner.train(0, w, 3)


def test_the_loss_falls_towards_the_entropy():
    """One site that sees all domains alike learns the task."""
    learner = NetworkLearner(2, NetworkConfig(vocabulary=12, width=32, own_share=0.0), 0)
    w, before = learner.initial(), learner.evaluate(learner.initial())
    w, _ = learner.train(0, w, 800)
    floor = learner.floor()
    assert floor < learner.evaluate(w) < floor + 0.15 * (before - floor)


def test_averaging_beats_own_data_only():
    """The sites need each other: their mean is better on all domains than any of them alone."""
    learner = NetworkLearner(4, NetworkConfig(vocabulary=12, width=32), 0)
    w = learner.initial()
    for _ in range(6):
        w = average(*(learner.train(site, w, 50)[0] for site in range(4)))
    alone = NetworkLearner(4, NetworkConfig(vocabulary=12, width=32), 0)
    losses = [alone.evaluate(alone.train(site, alone.initial(), 300)[0]) for site in range(4)]
    assert learner.evaluate(w) < min(losses) - 0.1


def test_surrogate_averaging_beats_own_data_only():
    """As with real learning."""
    learner = SurrogateLearner(4, 0)
    w = learner.initial()
    assert learner.evaluate(w) == pytest.approx(START, rel=1e-6)
    for _ in range(20):
        w = average(*(learner.train(site, w, 100)[0] for site in range(4)))
    alone = [learner.evaluate(learner.train(k, learner.initial(), 2000)[0]) for k in range(4)]
    assert FLOOR <= learner.evaluate(w) < 1.05 < min(alone)


def test_surrogate_steps_add_up():
    """Without noise, 300 steps are 100 and 200: the formula is that of single steps."""
    whole, parts = SurrogateLearner(2, 0, noise=0.0), SurrogateLearner(2, 0, noise=0.0)
    w, _ = whole.train(0, whole.initial(), 300)
    v, _ = parts.train(0, parts.train(0, parts.initial(), 100)[0], 200)
    np.testing.assert_allclose(w["point"], v["point"], rtol=1e-5)


@pytest.mark.parametrize("kind", ["network", "text", "surrogate"])
def test_the_proximal_term_keeps_sites_near(kind):
    """FedProx: the larger mu, the nearer; a huge one all but stops the site."""
    moved = []
    for mu in (0.0, 0.1, 10.0):
        learner = small(kind)
        w = learner.initial()
        v, _ = learner.train(0, w, 200, 1.0, mu, w)
        moved.append(sum(float(np.square(v[k] - w[k]).sum()) for k in w))
    assert moved[0] > moved[1] > moved[2]


@pytest.mark.parametrize("kind", ["network", "text", "surrogate"])
def test_the_learning_rate_can_be_scaled(kind):
    """FedQueue sends smaller ones to sites that do more steps."""
    moved = []
    for scale in (1.0, 0.1):
        learner = small(kind)
        w = learner.initial()
        v, _ = learner.train(0, w, 20, scale)
        moved.append(sum(float(np.square(v[k] - w[k]).sum()) for k in w))
    assert moved[1] < 0.1 * moved[0]


@pytest.mark.parametrize("kind", ["network", "text", "surrogate"])
def test_the_correction_is_added_to_the_gradients_that_are_summed(kind):
    """SCAFFOLD: the sums are of the site's own gradients, and the steps go along the corrected."""
    learner = small(kind)
    w, rng, own = learner.initial(), np.random.default_rng(4), {}
    shift = {k: rng.normal(size=a.shape).astype(np.float32) for k, a in w.items()}
    v, _ = learner.train(0, w, 1, correction=shift, gradients=own)
    used = {k: own[k] + shift[k] for k in w}
    for k in w:  # a step of Adam, or of the gradient, goes against it
        clear = np.abs(used[k]) > 1e-3
        assert (np.sign(w[k] - v[k])[clear] == np.sign(used[k])[clear]).all(), k
    first = {k: g.copy() for k, g in own.items()}
    learner.train(0, v, 1, correction=shift, gradients=own)  # the order goes on: sums add up
    assert any((own[k] != first[k]).any() for k in w)


def test_surrogate_gradients_are_the_papers_option_two():
    """Their mean is (x - y) / (K eta) less the correction."""
    learner, sums = SurrogateLearner(2, 0, noise=0.0), {}
    w, shift = learner.initial(), {"point": np.full(8, 0.3, dtype=np.float32)}
    v, _ = learner.train(0, w, 50, correction=shift, gradients=sums)
    v, _ = learner.train(0, v, 150, correction=shift, gradients=sums)
    moved = (w["point"] - v["point"]) / (200 * learner.rate)
    np.testing.assert_allclose(sums["point"] / 200, moved - shift["point"], atol=1e-4)
