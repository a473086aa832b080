"""Where a benchmark ran, and where its figures go."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "record"]

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("flwr", "numpy", "torch", "transformers")


def record(name: str, figures: dict[str, Any], config: dict[str, Any]) -> None:
    """Write ``results/<name>.json``: date, machine, figures and the configuration."""
    body = {
        "date": datetime.date.today().isoformat(),
        "machine": _machine(),
        **figures,
        "config": config,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(body, indent=2) + "\n")


def _machine() -> dict[str, Any]:
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **_versions(),
    }


def _versions() -> dict[str, str]:
    """Return the versions of what is installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
