"""The inexactness of averaging LoRA adapters, against dense matrices in float64."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from strategies.parts import rules
from strategies.parts.lora import adapters

RANK = 3
SHAPES = {"q": (5, 7), "v": (9, 4)}  # outputs, inputs
A, B = "base.{}.lora_A.weight", "base.{}.lora_B.weight"


def adapter(rng, frozen=None, b_scale=1.0):
    """Return random adapters; the A of `frozen` where given."""
    tensors = {}
    for layer, (out, into) in SHAPES.items():
        a = rng.normal(size=(RANK, into)).astype(np.float32)
        a_name = A.format(layer)
        tensors[a_name] = a if frozen is None else frozen[a_name].numpy()
        b = b_scale * rng.normal(size=(out, RANK))
        tensors[B.format(layer)] = b.astype(np.float32)
    return ArrayRecord({name: Array(tensor) for name, tensor in tensors.items()})


def products(record):
    """Return B A of every layer, dense, in one vector."""
    layers = ((record[B.format(n)], record[A.format(n)]) for n in SHAPES)
    dense = [b.numpy().astype(float) @ a.numpy().astype(float) for b, a in layers]
    return np.concatenate([x.ravel() for x in dense])


def combined(models, coefficients):
    """Return the average of A and B apart, in float64."""
    return ArrayRecord(
        {
            name: Array(
                sum(
                    c * m[name].numpy().astype(float)
                    for c, m in zip(coefficients, models, strict=True)
                )
            )
            for name in models[0]
        }
    )


def dense(models, coefficients):
    """Return the inexactness from the dense matrices."""
    exact = sum(c * products(m) for c, m in zip(coefficients, models, strict=True))
    apart = exact - products(combined(models, coefficients))
    return np.linalg.norm(apart) / np.linalg.norm(exact)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.mark.parametrize("chunk", [4096, 2], ids=["whole", "in-chunks"])
def test_it_is_that_of_dense_matrices(rng, chunk, monkeypatch):
    """Protects the figure: Gram matrices of the factors give what dense matrices give."""
    monkeypatch.setattr(adapters, "CHUNK", chunk)
    models, weights = [adapter(rng) for _ in range(4)], [10.0, 20.0, 5.0, 1.0]
    found = adapters.inexactness(adapters.mean_of(models, weights))
    expected = dense(models, rules.normalised(weights))
    assert expected > 0.1
    assert found == pytest.approx(expected, rel=1e-10)


def test_a_mixture_counts_the_model_before(rng):
    """Protects FedAsync: one reply is averaged with the global adapter, which is inexact too."""
    theta, trained = adapter(rng), adapter(rng)
    found = adapters.inexactness(adapters.mixture_of(theta, [trained], [0.6]))
    assert found == pytest.approx(dense([theta, trained], [0.4, 0.6]), rel=1e-10)


def test_a_step_counts_the_sites_where_their_updates_lead(rng):
    """Protects buffers of pseudo-gradients: the sites stand at theta - delta."""
    theta, sites = adapter(rng), [adapter(rng) for _ in range(2)]
    deltas = [adapters.difference(theta, site) for site in sites]
    found = adapters.inexactness(adapters.step_of(theta, deltas, [0.5, 0.2]))
    assert found == pytest.approx(dense([theta, *sites], [0.3, 0.5, 0.2]), rel=1e-5)


def test_with_one_a_the_average_is_exact(rng):
    """Protects FFA-LoRA's claim: where A is the same everywhere the figure is 0, not nearly."""
    first = adapter(rng)
    models = [first, *(adapter(rng, frozen=first) for _ in range(4))]
    weights = [3.0, 7.0, 11.0, 1.0, 1.0]
    assert dense(models, rules.normalised(weights)) < 1e-14
    assert adapters.inexactness(adapters.mean_of(models, weights)) == 0.0


def test_small_differences_are_not_lost(rng):
    """Protects the figure near convergence, where norms subtracted would be rounding alone."""
    first = adapter(rng)
    near = {n: Array(t.numpy() + rng.normal(size=t.shape) * 1e-6) for n, t in first.items()}
    models, weights = [first, ArrayRecord(near)], [0.5, 0.5]
    expected = dense(models, weights)
    assert expected < 1e-11
    assert adapters.inexactness(adapters.mean_of(models, weights)) == pytest.approx(
        expected, rel=1e-3
    )


def test_adapters_of_embeddings_and_convolutions(rng):
    """Protects peft's other adapters: their factors have other names and more axes."""

    def model():
        return {
            "e.lora_embedding_A": Array(rng.normal(size=(2, 11))),
            "e.lora_embedding_B": Array(rng.normal(size=(6, 2))),
            "c.lora_A.weight": Array(rng.normal(size=(2, 3, 3, 3))),
            "c.lora_B.weight": Array(rng.normal(size=(4, 2, 1, 1))),
        }

    models, half = [model(), model()], [0.5, 0.5]
    exact = apart = 0.0
    for a, b in (
        ("e.lora_embedding_A", "e.lora_embedding_B"),
        ("c.lora_A.weight", "c.lora_B.weight"),
    ):
        pairs = [(m[b].numpy().reshape(-1, 2), m[a].numpy().reshape(2, -1)) for m in models]
        mean = sum(y @ x for y, x in pairs) / 2
        plain = sum(y for y, _ in pairs) @ sum(x for _, x in pairs) / 4
        exact, apart = exact + np.sum(mean**2), apart + np.sum((mean - plain) ** 2)
    assert adapters.inexactness(adapters.mean_of(models, half)) == pytest.approx(
        np.sqrt(apart / exact), rel=1e-10
    )


def test_other_models_have_none(rng):
    """Protects runs of whole models: there is nothing to tell."""
    weights = ArrayRecord({"w": Array(np.ones(3))})
    assert adapters.inexactness(adapters.mean_of([weights], [1.0])) is None
    assert adapters.facts("it does not average", weights) == {}


def test_b_alone_is_averaged_exactly(rng):
    """Protects runs with a frozen A, of which B alone travels."""
    only_b = [{n: t for n, t in adapter(rng).items() if "lora_B" in n} for _ in range(2)]
    assert adapters.facts(adapters.mean_of(only_b, [1.0, 2.0]), only_b[0]) == {
        "lora_inexactness": 0.0
    }
