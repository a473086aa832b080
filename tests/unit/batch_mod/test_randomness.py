"""Random numbers of a warm process, held against those of fresh ones."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from flwr_hpc.batch_mod.randomness import ImportSeeds

_numbers = itertools.count()
DRAW = """
def draw():
    import {module}.late
    numbers = [random.random(), float(np.random.rand()), {module}.late.draw()]
    return [*numbers, OWN.random(), PYTHON.random()]
"""
LATE = """
import random, torch
{late}
def draw():
    return torch.rand(1).item()
"""
HEAD = """
import random, numpy as np
{top}
OWN, PYTHON = np.random.default_rng({own}), random.Random(7)
"""
WARM = """
import importlib
from flwr_hpc.batch_mod.randomness import ImportSeeds
seeds = ImportSeeds("{app.folder}", {app.name!r})
seeds.watch()
module = importlib.import_module({app.name!r})
drawn = []
for _ in range({messages}):
    seeds.restore()
    drawn.append(module.draw())
print(json.dumps(drawn))
"""
SEEDED = "random.seed(1); np.random.seed(42); random.random()"


class App:
    """A package that draws, in a warm process (this one) and in fresh ones."""

    def __init__(self, folder: Path, top: str, late: str, own: str) -> None:
        self.name, self.folder = f"draws_{next(_numbers)}", folder
        package = folder / self.name
        package.mkdir()
        text = HEAD.format(top=top, own=own) + DRAW.format(module=self.name)
        (package / "__init__.py").write_text(text)
        (package / "late.py").write_text(LATE.format(late=late))

    def warm(self, messages: int) -> list[list[float]]:
        """Draw in one process, which has not imported torch before."""
        drawn: list[list[float]] = self._draw(WARM.format(app=self, messages=messages))
        return drawn

    def fresh(self) -> list[float]:
        """Draw in a process of its own, as plain Flower does."""
        drawn: list[float] = self._draw(f"import {self.name} as m; print(json.dumps(m.draw()))")
        return drawn

    def _draw(self, code: str) -> Any:
        command = [sys.executable, "-c", f"import json\n{code}"]
        return json.loads(subprocess.check_output(command, cwd=self.folder))


def test_seeds_at_import_count_for_every_message(tmp_path: Path) -> None:
    """Protects the numbers of plain Flower, seeded at once, in a late import, or in a variable."""
    seeded = App(tmp_path, SEEDED, "random.random(); torch.manual_seed(0); torch.rand(2)", "5")
    first, second, third = seeded.warm(3)
    assert first == second == third == seeded.fresh()
    assert round(first[1], 4) == 0.3745


def test_what_is_not_seeded_is_new_each_time(tmp_path: Path) -> None:
    """Protects apps without a seed from the same shuffles and dropouts in every round."""
    drawing = "random.random(); np.random.rand(5000)"
    free = App(tmp_path, drawing, "torch.rand(5000)", "")
    first, second, third = free.warm(3)
    drawn = list(zip(first, second, third, strict=True))
    assert [len(set(numbers)) for numbers in drawn] == [3, 3, 3, 3, 1]  # Random(7) is seeded


def test_modules_of_others_are_left_alone(tmp_path: Path) -> None:
    """Protects libraries, whose seeds are not the app's."""
    seeds = ImportSeeds(str(tmp_path), "nothing")
    assert seeds.find_spec("json") is None
    assert ImportSeeds("", "json").find_spec("json") is not None
