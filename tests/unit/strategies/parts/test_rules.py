"""The aggregation rules against hand computation."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import ArrayRecord
from worlds.strategies.toy_model import as_numpy, initial_arrays, pull_towards

from strategies.parts import rules


def f32(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def record(*tensors: np.ndarray) -> ArrayRecord:
    return ArrayRecord(list(tensors))


def only(pairs: rules.Tensors) -> np.ndarray:
    return next(iter(dict(pairs).values()))


def test_weighted_mean_by_hand():
    """(1*2 + 3*6) / 4 = 5."""
    np.testing.assert_array_equal(rules.weighted_mean([f32(2), f32(6)], [1, 3]), f32(5))


def test_weighted_mean_keeps_its_inputs_and_dtype():
    """Inputs may be mapped read-only; float16 models stay float16, the sum is float32."""
    x = np.full(3, 60000, dtype=np.float16)
    x.flags.writeable = False
    mean = rules.weighted_mean([x, x], [1, 1])
    assert mean.dtype == np.float16
    np.testing.assert_array_equal(mean, x)


def test_integer_tensors_are_rounded():
    """Counters in a model stay integers."""
    mean = rules.weighted_mean([np.array([1]), np.array([2])], [1, 3])
    assert mean.dtype == np.array([1]).dtype
    assert mean[0] == 2


def test_sparse_updates_are_averaged_over_those_who_sent_them():
    """Weights 1 and 3; what nobody sent stays. CCLoco's code takes a mean of what is there."""
    sent = [f32(2, 4, 0, 0), f32(6, 0, 8, 0)]
    np.testing.assert_array_equal(rules.sender_mean(sent, [1, 3]), f32(5, 4, 8, 0))


@pytest.mark.parametrize("weights", [[0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0]])
def test_bad_weights_are_refused(weights):
    """A site that claims nonsense must not silently scale the model."""
    with pytest.raises(ValueError, match="weights must be"):
        rules.weighted_mean([f32(1), f32(2)], weights)


def test_nesterov_outer_steps_by_hand():
    """Two steps of DiLoCo with eta = 0.5, beta = 0.9."""
    theta, m = f32(10), None
    # step 1: delta = 2, m = 2, theta = 10 - 0.5 (2 + 0.9*2) = 8.1
    delta = rules.pseudo_gradient(theta, f32(8))
    m = rules.momentum_step(m, delta, 0.9)
    theta = rules.nesterov_step(theta, delta, m, 0.5, 0.9)
    np.testing.assert_allclose(theta, [8.1], rtol=1e-6)
    # step 2: delta = 1, m = 0.9*2 + 1 = 2.8, theta = 8.1 - 0.5 (1 + 0.9*2.8) = 6.34
    delta = rules.pseudo_gradient(theta, f32(7.1))
    m = rules.momentum_step(m, delta, 0.9)
    theta = rules.nesterov_step(theta, delta, m, 0.5, 0.9)
    np.testing.assert_allclose(theta, [6.34], rtol=1e-6)


def test_nesterov_without_momentum_is_fedavg():
    """eta = 1, beta = 0: theta - sum w (theta - theta_k) = sum w theta_k."""
    base = initial_arrays()
    trained = [record_like(base, pull_towards(t)(as_numpy(base), 3)) for t in (1.0, -2.0)]
    mean = dict(rules.record_mean(trained, [1, 3]))
    for name, array in base.items():
        delta = rules.combined_delta(name, base, trained, [1, 3])
        got = rules.nesterov_step(array.numpy(), delta, delta, 1.0, 0.0)
        np.testing.assert_allclose(got, mean[name], rtol=1e-6, atol=1e-7)


def record_like(base: ArrayRecord, arrays: dict[str, np.ndarray]) -> ArrayRecord:
    values = ArrayRecord(list(arrays.values())).values()
    return ArrayRecord(dict(zip(base, values, strict=True)))


def test_a_step_by_hand():
    """FedBuff divides by K once, and not by the sum of the weights or the number of sites."""
    theta = record(f32(10))
    deltas = [record(f32(2)), record(f32(4))]
    # 10 - 1/2 (1*2 + 0.5*4) = 8
    assert only(rules.weighted_step(theta, deltas, [0.5, 0.25], 1.0)) == pytest.approx(8.0)
    assert only(rules.weighted_step(theta, deltas, [0.5, 0.25], 0.5)) == pytest.approx(9.0)


@pytest.mark.parametrize(
    ("kind", "tau", "parameters", "value"),
    [
        ("constant", 7, {}, 1.0),
        ("polynomial", 0, {}, 1.0),
        ("polynomial", 3, {}, 0.5),
        ("polynomial", 3, {"a": 1.0}, 0.25),
        ("hinge", 4, {}, 1.0),
        ("hinge", 5, {}, 1 / 11),
        ("hinge", 3, {"a": 2.0, "b": 1.0}, 0.2),
    ],
)
def test_staleness_weights_by_hand(kind, tau, parameters, value):
    """The forms and defaults of FedAsync and FedBuff."""
    assert rules.staleness_weight(kind, tau, **parameters) == pytest.approx(value)


def test_unknown_staleness_names_the_choices():
    """The message teaches."""
    with pytest.raises(ValueError, match="constant, polynomial, hinge"):
        rules.staleness_weight("linear", 1)
    with pytest.raises(ValueError, match="negative"):
        rules.staleness_weight("constant", -1)


def test_rules_load_one_tensor_at_a_time():
    """No rule needs the whole model in memory: arrays are asked for as the output is consumed."""
    loaded: list[str] = []

    class Lazy:
        shape, dtype = (1,), "float32"

        def __init__(self, name: str) -> None:
            self.name = name

        def numpy(self) -> np.ndarray:
            loaded.append(self.name)
            return f32(1)

    lazy = {name: Lazy(name) for name in ("a", "b")}
    for pairs in (
        rules.record_mean([lazy, lazy], [1, 1]),
        rules.record_delta(lazy, lazy),
        rules.weighted_pull(lazy, [lazy], [1]),
        rules.stepped(lazy, lazy, lazy, 0.5),
        rules.weighted_step(lazy, [lazy], [1]),
        rules.mixed(lazy, lazy, 0.5),
    ):
        loaded.clear()
        assert next(pairs)[0] == "a"
        assert set(loaded) == {"a"}


def test_mixed_by_hand():
    """FedAsync: (1 - 0.25) 8 + 0.25 * 4 = 7; alpha = 1 is the site's own weights, bit for bit."""
    theta, trained = record(f32(8)), record(f32(4))
    np.testing.assert_array_equal(only(rules.mixed(theta, trained, 0.25)), f32(7))
    np.testing.assert_array_equal(only(rules.mixed(theta, trained, 1.0)), f32(4))


def test_weighted_step_takes_the_weights_as_they_are():
    """10 - 0.5 (0.5*2 + 0.25*4) = 9: no normalisation, and no 1/n besides."""
    deltas = [record(f32(2)), record(f32(4))]
    assert only(rules.weighted_step(record(f32(10)), deltas, [0.5, 0.25], 0.5)) == 9.0
    assert only(rules.weighted_step(record(f32(10)), deltas, [0.5, 0.25])) == 8.0


def radial_directional(deltas, weights):
    return rules.radial_directional("0", [record(delta) for delta in deltas], weights)


def test_radial_directional_by_hand():
    """Norms 5 and 1, weights 3 and 1: radius 4, direction (0.6, 0.8) * 3/4 + (1, 0) / 4."""
    got = radial_directional([f32(3, 4), f32(1, 0)], [3.0, 1.0])
    direction = 0.75 * np.array([0.6, 0.8]) + 0.25 * np.array([1.0, 0.0])
    np.testing.assert_allclose(got, 4.0 * direction / np.linalg.norm(direction), rtol=1e-6)


def test_radial_directional_keeps_the_length():
    """Sites that pull in different directions do not shorten the step; one alone is itself."""
    got = radial_directional([f32(2, 0), f32(0, 2)], [1.0, 1.0])
    assert np.linalg.norm(got) == pytest.approx(2.0, rel=1e-6)
    np.testing.assert_allclose(radial_directional([f32(3, -4)], [7.0]), [3, -4], rtol=1e-6)


@pytest.mark.parametrize("deltas", [[f32(0, 0), f32(0, 0)], [f32(1, 0), f32(-1, 0)]])
def test_radial_directional_without_a_direction_is_zero(deltas):
    """Neither zero updates nor opposite ones make NaN."""
    np.testing.assert_array_equal(radial_directional(deltas, [1.0, 1.0]), f32(0, 0))


def test_every_rule_keeps_the_dtype_of_the_global_tensor():
    """A float16 model stays one; the arithmetic is float32."""
    half = ArrayRecord([np.full(3, 2, dtype=np.float16)])
    step = ArrayRecord([np.full(3, 1, dtype=np.float32)])
    for pairs in (
        rules.mixed(half, half, 0.5),
        rules.weighted_step(half, [step], [0.5]),
        rules.weighted_pull(half, [step], [1.0]),
        rules.stepped(half, step, half, 1.0),
    ):
        assert only(pairs).dtype == np.float16
