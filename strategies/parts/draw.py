"""Who takes part when fewer than all do."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from functools import lru_cache


def drawn(seed: str, names: Iterable[str], count: int, last: Collection[str] = ()) -> list[str]:
    """Return so many of the names by a draw that the seed decides.

    Every name has a lot of its own, so that who comes or goes changes nobody else's; those of
    `last` are drawn only when no others are left.
    """
    order = sorted(names, key=lambda name: (name in last, _lot(seed, name)))
    return order[: max(0, count)]


@lru_cache(maxsize=10_000)
def _lot(seed: str, name: str) -> float:
    return random.Random(f"{seed}:{name}").random()
