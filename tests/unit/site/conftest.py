"""A site of its own for every test."""

from __future__ import annotations

from pathlib import Path

import pytest
from worlds.site.world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "site")
