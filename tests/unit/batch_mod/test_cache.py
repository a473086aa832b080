"""Settings that are composed once for a run on a node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context
from worlds.site.batch_app import make_context

from flwr_hpc.batch_mod import compose
from flwr_hpc.batch_mod.cache import settings_of
from flwr_hpc.batch_mod.settings import Settings

FILE = "# @package facilities.mine\nscheduler: slurm\nwalltime: '{}'\n"


class Run:
    """A node in a run, and how often its settings were composed."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file = folder / "conf" / "facility" / "mine.yaml"
        self.file.parent.mkdir(parents=True)
        self.file.write_text(FILE.format("00:07:00"))
        self.given = {
            "facility": "mine",
            "config_dir": str(folder / "conf"),
            "workdir": str(folder / "scratch"),
        }
        self.composed, self._settle = 0, compose.settle
        monkeypatch.setattr(compose, "settle", self._count)
        monkeypatch.setenv("SBATCH_ACCOUNT", "first")

    def settings(self, context: Context | None = None, **given: Any) -> Settings:
        return settings_of(self.given | given, context or make_context())

    def _count(self, given: dict[str, Any]) -> Settings:
        self.composed += 1
        return self._settle(given)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path, monkeypatch)


def test_a_second_message_composes_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects each message from the cost of Hydra, and a run from changing its account."""
    first = run.settings()
    monkeypatch.setenv("SBATCH_ACCOUNT", "second")
    assert run.settings() == first
    assert (run.composed, first.facility.account) == (1, "first")
    other = Context(12, 7, {}, make_context().state, {})
    assert run.settings(other).facility.account == "second"
    assert run.composed == 2


def test_what_changes_is_composed_again(run: Run) -> None:
    """Protects users who edit a file or restart a node with other settings."""
    assert run.settings().facility.walltime == "00:07:00"
    run.file.write_text(FILE.format("00:08:00"))
    assert run.settings().facility.walltime == "00:08:00"
    assert run.settings(nodes=2).facility.nodes == 2
    assert run.settings(account=None).facility.account is None
    assert run.composed == 4


def test_a_file_that_asks_the_environment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects facilities whose file takes a value from the environment."""
    run.file.write_text(FILE.format("${oc.env:LIMIT}"))
    for limit in ("00:07:00", "00:09:00"):
        monkeypatch.setenv("LIMIT", limit)
        assert run.settings().facility.walltime == limit


def test_a_damaged_file_is_composed_again(run: Run, tmp_path: Path) -> None:
    """Protects a run from what an older version or a full disk left."""
    first = run.settings()
    (kept,) = (tmp_path / "scratch").rglob("settings-*.json")
    for text in ("", "{}", kept.read_text().replace("walltime", "wall_time")):
        kept.write_text(text)
        assert run.settings() == first
    assert run.composed == 4
