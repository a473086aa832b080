"""Tensors that are computed a block at a time."""

from __future__ import annotations

import threading
import tracemalloc

import numpy as np
import pytest
from flwr.app import ArrayRecord

from strategies.parts import blocks, rules
from strategies.parts.blocks import Blocks, blockwise, flat_blocks

SHAPE = (7, 3)  # 21 numbers: five blocks of 4 and one of what is left


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 4)
    monkeypatch.setattr(blocks, "_memory", blocks._memory)


def records(count):
    rng = np.random.default_rng(0)
    shapes = (SHAPE, (), (4,))  # several blocks, one number, a block
    return [
        ArrayRecord([np.asarray(rng.standard_normal(s), np.float32) for s in shapes])
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    "rule",
    [
        lambda a, b, c: rules.tensors(a),
        lambda a, b, c: rules.record_mean([a, b, c], [1, 2, 3]),
        lambda a, b, c: rules.record_delta(a, b),
        lambda a, b, c: rules.weighted_step(a, [b, c], [0.5, 0.2], 0.7),
        lambda a, b, c: rules.weighted_pull(a, [b, c], [0.5, 0.2], 0.7),
        lambda a, b, c: rules.stepped(a, b, c, 0.3),
        lambda a, b, c: rules.mixed(a, b, 0.3),
        lambda a, b, c: ((n, rules.combined_delta(n, a, [b, c], [1, 3])) for n in a),
    ],
)
def test_blocks_make_the_bits_of_the_whole(rule, monkeypatch):
    """Protects every strategy: a large tensor is averaged as a small one is, in its shape."""
    given = records(3)
    lazy = list(rule(*given))
    assert [isinstance(tensor, Blocks) for _, tensor in lazy] == [True, False, False]
    in_blocks = [(name, np.asarray(tensor)) for name, tensor in lazy]
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    whole = list(rule(*given))
    for (name, found), (same, tensor), (_, described) in zip(in_blocks, whole, lazy, strict=True):
        assert isinstance(tensor, np.ndarray)
        assert (name, described.shape, described.dtype) == (same, tensor.shape, tensor.dtype)
        np.testing.assert_array_equal(found, tensor)


def test_norms_over_blocks_are_those_of_the_whole(monkeypatch):
    """Protects Decoupled DiLoCo: its length and direction are the whole tensor's."""
    given = records(3)
    in_blocks = np.asarray(rules.radial_directional("0", given, [1, 2, 3]))
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    whole = rules.radial_directional("0", given, [1, 2, 3])
    np.testing.assert_allclose(in_blocks, whole, rtol=1e-5)


def test_blocks_of_blocks_are_computed_in_one_pass():
    """Protects memory: a rule of a rule keeps nothing in between."""
    lengths = []

    def noted(x):
        lengths.append(x.size)
        return x + 1

    inner = blockwise(noted, np.zeros(10, np.float32))
    outer = blockwise(lambda x, y: x * 2 + y, inner, np.ones(10, np.float32))
    assert lengths == [0]  # its dtype alone was asked for
    assert [block.tolist() for block in outer] == [[3.0] * 4, [3.0] * 4, [3.0] * 2]
    assert sorted(lengths[1:]) == [2, 4, 4]


def test_whoever_reads_may_be_slow():
    """Protects memory: no more blocks are computed ahead than there are cores."""
    done = []
    computed = threading.Event()

    def rule(x):
        if x.size:
            done.append(1)
            computed.set()
        return x

    reading = iter(Blocks(rule, np.zeros(4 * 1000)))
    next(reading)
    computed.wait()
    reading.close()
    assert len(done) <= len(blocks.os.sched_getaffinity(0)) + 2


def test_a_rule_that_fails_ends_the_reading():
    """Protects the run: weights that are not finite are an error, and not half a file."""

    def rule(x):
        if x.size and x[0] == 8:
            raise ValueError("not finite")
        return x

    with pytest.raises(ValueError, match="not finite"):
        list(Blocks(rule, np.arange(12.0)))


def test_arrays_in_memory_come_as_blocks_too():
    """Protects who measures: one way to read both."""
    whole = np.arange(10.0).reshape(2, 5)
    for array in (whole, Blocks(np.asarray, whole)):
        assert [len(block) for block in flat_blocks(array)] == [4, 4, 2]
        np.testing.assert_array_equal(np.concatenate(list(flat_blocks(array))), whole.reshape(-1))


def test_a_users_formula_stays_in_blocks():
    """Protects who writes a rule of a rule: plain arithmetic, and nothing whole in memory."""
    x, y = (np.random.default_rng(n).random(SHAPE, np.float32) for n in (1, 2))
    sizes = []
    delta = Blocks(lambda block: sizes.append(block.size) or block, x)
    found = 0.9 * delta + y - np.sqrt(delta) / 2
    found += delta
    assert isinstance(found, Blocks)
    assert sizes == [0]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(found), 0.9 * x + y - np.sqrt(x) / 2 + x)
    by_rows = delta * y[:1]  # another shape
    np.testing.assert_array_equal(by_rows, x * y[:1])
    assert np.add.reduce(delta, axis=None) == np.add.reduce(x, axis=None)


def test_a_result_goes_where_it_is_told_to():
    """Protects a user's sum in place: the array has it, and not only who asked for it."""
    delta, total = Blocks(np.asarray, np.ones(SHAPE, np.float32)), np.ones(SHAPE, np.float32)
    np.add(total, delta, out=total)
    same = total
    same += delta
    assert same is total
    assert (total == 3).all()


@pytest.mark.parametrize("make", [Blocks, blockwise])
def test_tensors_of_other_shapes_are_not_paired(make):
    """Protects weights: as many numbers in another order would be taken for the same."""
    for other in ((3, 2), (2, 4)):
        with pytest.raises(ValueError, match="cannot be paired"):
            make(np.add, np.ones((2, 3)), np.ones(other))


def test_memory_is_bounded_however_many_arrays_are_read(monkeypatch):
    """Protects the server: with many sites the blocks are smaller, and so is what they take."""
    monkeypatch.setattr(blocks, "BLOCK", 1 << 19)
    arrays = [np.full(1 << 21, n, np.float32) for n in range(16)]
    peaks = []
    for limit in (256 << 20, 6 << 20):
        monkeypatch.setattr(blocks, "_memory", limit)
        made = Blocks(lambda *xs: np.median(np.stack(xs), axis=0), *arrays)
        tracemalloc.start()
        assert all((block == 7.5).all() for block in made)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] > 2 * limit > 2 * peaks[1]


def test_threads_are_fewer_before_blocks_are_too_small(monkeypatch):
    """Protects a small budget on a node of many cores."""
    monkeypatch.setattr(blocks.os, "sched_getaffinity", lambda pid: range(128))
    made = Blocks(np.add, *[np.zeros(1 << 20, np.float32)] * 2)
    each = 4 * (3 * 2 + 8) * blocks.LEAST
    for size, threads in ((1 << 40, 128), (5 * each, 5), (1, 1)):
        blocks.limit_memory(size)
        assert blocks._schedule(made)[1] == threads
