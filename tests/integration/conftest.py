"""One undisturbed run that many tests look at."""

from __future__ import annotations

import pytest
from filelock import FileLock
from worlds.runs.run import Run
from worlds.train.worker_site import site, text

__all__ = ["site", "text", "undisturbed"]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Run:
    """Return a finished small run; made once, also when tests run in several processes."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent
    folder = shared / "a run" / "with spaces"
    with FileLock(shared / "undisturbed.lock"):
        if not (folder / "summary.json").exists():
            run = Run(folder)
            assert run.end() == 0, run.said()
    return Run.of(folder)
