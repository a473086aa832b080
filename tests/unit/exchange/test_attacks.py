"""Thousands of attacks by one site: refused or right; see `worlds.exchange.attacks`."""

from __future__ import annotations

import logging
import tracemalloc

import pytest
from worlds.exchange.attacks import Attacks

BATCHES, CASES = 10, 200


@pytest.fixture(autouse=True)
def quiet():
    """Flower warns of every record that is replaced."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_every_attack_is_refused_or_right(tmp_path, batch):
    """A failing case is made again by its seed alone: `Attacks(folder).run(seed)`."""
    attacks = Attacks(tmp_path)
    for seed in range(batch * CASES, (batch + 1) * CASES):
        try:
            attacks.run(seed)
        except Exception as exc:
            raise AssertionError(f"attack {seed}: {exc}") from exc
    attacks.check_honest()
    kinds = {attack.__name__[7:] for attack in attacks.kinds}
    refused = {name.partition(":")[0] for name in attacks.outcomes if name.endswith("refused")}
    assert refused == kinds - {"unasked"}
    assert any(name.endswith("right") for name in attacks.outcomes)


def test_attacks_cost_little_memory(tmp_path):
    """The peak is that of a piece of a payload, whatever sizes are claimed."""
    attacks = Attacks(tmp_path)
    attacks.run(0)
    tracemalloc.start()
    for seed in range(1, 200):
        attacks.run(seed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
