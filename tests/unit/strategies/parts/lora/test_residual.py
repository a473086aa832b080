"""What averages of adapters leave out, as factors, against dense matrices."""

from __future__ import annotations

import numpy as np
import pytest

from strategies.parts.lora.residual import A, B, Factors, adapters, compressed, residual, stacked

RNG = np.random.default_rng(5)
OUT, IN, R = 11, 17, 3


def sites(n, out=OUT, inputs=IN):
    return RNG.normal(size=(n, R, inputs)), RNG.normal(size=(n, out, R))


def dense(factors):
    return factors.u @ factors.v


@pytest.mark.parametrize("c", [[1.0], [0.5, 0.5], [0.7, 0.2, 0.1], [0.1, 0.4, 0.2, 0.3]])
def test_it_is_the_average_of_products_less_the_product_of_averages(c):
    """Protects the exactness, also from pseudo-gradients against a base of all."""
    a, b = sites(len(c))
    exact = sum(w * y @ x for w, x, y in zip(c, a, b, strict=True))
    mean_a, mean_b = (np.tensordot(c, t, 1) for t in (a, b))
    expected = exact - mean_b @ mean_a
    for x, y in ((a, b), (RNG.normal(size=(R, IN)) - a, RNG.normal(size=(OUT, R)) - b)):
        found = residual(c, list(x), list(y))
        np.testing.assert_allclose(dense(found), expected, atol=1e-12)
        small, lost = compressed(found)
        np.testing.assert_allclose(dense(small), expected, atol=1e-12)
        assert len(small.v) == max(1, min((len(c) - 1) * R, OUT))
        assert lost < 1e-9


def test_equal_sites_leave_nothing():
    """Not even rounding, at any scale; the factors keep a rank that a file has a place for."""
    a, b = sites(1)
    found, lost = compressed(residual([0.3, 0.3, 0.4], [*a] * 3, [*b] * 3))
    assert (dense(found) == 0.0).all()
    assert found.v.shape == (1, IN)
    assert lost == 0.0


def test_over_versions_the_sum_stays_exact_and_its_rank_bounded():
    """Twelve versions of three sites: rank 72 as stacked, 11 as it is."""
    running, expected = None, np.zeros((OUT, IN))
    for _ in range(12):
        a, b = sites(3)
        new = residual([0.5, 0.25, 0.25], list(a), list(b))
        expected += dense(new)
        running, _ = compressed(new if running is None else stacked(running, new))
        assert len(running.v) <= OUT
    np.testing.assert_allclose(dense(running), expected, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_cut_is_the_nearest_of_its_rank_and_says_what_it_leaves_out(rank):
    """Against the singular values of the dense matrix (Eckart and Young)."""
    a, b = sites(3)
    whole = residual([0.2, 0.3, 0.5], list(a), list(b))
    found, lost = compressed(whole, rank)
    assert len(found.v) == rank
    values = np.linalg.svd(dense(whole), compute_uv=False)
    assert lost == pytest.approx(np.sqrt(np.sum(values[rank:] ** 2)))
    assert np.linalg.norm(dense(whole) - dense(found)) == pytest.approx(lost)


def test_large_offsets_cost_no_digits():
    """Factors of 1e4 that differ by 1: the residual is of differences."""
    a, b = sites(2)
    found = residual([0.5, 0.5], list(a + 1e4), list(b - 1e4))
    expected = residual([0.5, 0.5], list(a), list(b))
    np.testing.assert_allclose(dense(found), dense(expected), atol=1e-9)


def test_names_of_other_adapters_are_refused():
    """An embedding's, DoRA's magnitudes, and a frozen A, each with what to leave out."""
    plain = ["q" + A, "q" + B]
    assert adapters(plain) == ["q"]
    assert adapters(["layer.weight", "layer.bias"]) == []
    for odd in ("e.lora_embedding_A", "q.lora_magnitude_vector", "head.weight"):
        with pytest.raises(ValueError, match=odd):
            adapters([*plain, odd])
    with pytest.raises(ValueError, match="exact as it is"):
        adapters(["q" + B])
    with pytest.raises(ValueError, match="p"):
        adapters([*plain, "p" + A])


def test_factors_of_zero_are_no_fault():
    """A first version may leave nothing."""
    zero = Factors(np.zeros((OUT, 2)), np.zeros((2, IN)))
    assert compressed(stacked(zero, zero))[1] == 0.0
