"""Python's garbage collector between steps: on all ranks at the same ones, and nowhere else.

Left to itself it stops each rank at other places, and all wait for whoever is stopped.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

EVERY_STEPS = 50
YOUNG = 1  # Generations 0 and 1: what a step leaves behind is not old


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the collector from running by itself."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def collect_at(step: int) -> None:
    """Collect what is young, at every `EVERY_STEPS`-th step of a facility."""
    if step % EVERY_STEPS == 0:
        gc.collect(YOUNG)


def freeze() -> None:
    """Take all that is loaded by now for good, so that no collection looks at it again."""
    gc.collect()
    gc.freeze()
