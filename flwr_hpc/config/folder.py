"""Where the shipped configuration lies. Standard library only."""

from __future__ import annotations

from pathlib import Path

import flwr_hpc


def conf_dir() -> Path:
    """Return the folder of the shipped configuration, installed or in a checkout."""
    package = Path(flwr_hpc.__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"
