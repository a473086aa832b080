"""What lies in folders in which others write meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def paths_under(*folders: Path) -> Iterator[Path]:
    """Yield the folders and all below them; one that goes meanwhile ends nothing, as with rglob."""
    for folder in folders:
        for parent, _, files in os.walk(folder):
            yield Path(parent)
            yield from (Path(parent, name) for name in files)
