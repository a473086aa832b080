"""Folders and files stay small enough to be looked through."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = ("flwr_hpc", "strategies", "benchmarks")
MOST_MODULES, MOST_LINES = 15, 400


def _modules(*parts: str) -> list[Path]:
    return [path for part in parts for path in (ROOT / part).rglob("*.py")]


def test_no_folder_is_a_heap() -> None:
    """Protects readers: what a folder holds is seen at a glance."""
    counts = Counter(str(p.parent.relative_to(ROOT)) for p in _modules(*PROGRAM, "tests"))
    assert {folder: n for folder, n in counts.items() if n > MOST_MODULES} == {}


def test_no_module_is_longer_than_a_few_screens() -> None:
    """Protects readers from files of several subjects."""
    lines = {
        str(p.relative_to(ROOT)): len(p.read_text().splitlines())
        for p in _modules(*PROGRAM, "tests")
    }
    assert {name: n for name, n in lines.items() if n > MOST_LINES} == {}


def test_every_package_has_its_line_in_the_guide() -> None:
    """Protects newcomers: CONTRIBUTING says where each thing lives."""
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    packages = [p.parent.name for p in (ROOT / "flwr_hpc").glob("*/__init__.py")]
    assert [name for name in packages if f"{name}/" not in guide] == []
