"""W&B is set up strictly, written tolerantly, and only by the server side."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from worlds.tracking.events import run_events
from worlds.tracking.job_events import job_events

from flwr_hpc.config.schema import TrackingConfig
from flwr_hpc.errors import UserError
from flwr_hpc.tracking.wandb_writer import WandbWriter, mode_of


class FakeRun:
    """What the writer uses of a W&B run."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.defined: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None
        self.broken = False

    def log(self, values: dict[str, Any]) -> None:
        if self.broken:
            raise RuntimeError("no connection")
        self.logged.append(values)

    def define_metric(self, name: str, step_metric: str | None = None, **_: Any) -> None:
        self.defined[name] = step_metric

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A module in wandb's place that records what it is asked."""
    module = SimpleNamespace(run=FakeRun(), asked={}, Settings=lambda **k: k)

    def init(**kwargs: Any) -> FakeRun:
        module.asked = kwargs
        return module.run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)  # type: ignore[arg-type]
    return module


def writer(tmp_path: Path, **more: Any) -> WandbWriter:
    tracking = TrackingConfig(wandb=True, mode="offline")
    return WandbWriter(tracking, tmp_path, "k7f3", {"env": {"HF_TOKEN": "t"}, "n": 1}, **more)


def test_a_run_is_named_by_its_key_and_can_be_resumed(
    fake: SimpleNamespace, tmp_path: Path
) -> None:
    """Sessions of one run are one W&B run; no secret leaves."""
    writer(tmp_path)
    assert fake.asked["id"] == "k7f3"
    assert fake.asked["resume"] == "allow"
    assert fake.asked["mode"] == "offline"
    assert fake.asked["dir"] == str(tmp_path)
    assert fake.asked["config"] == {"env": {"HF_TOKEN": "***"}, "n": 1}


def test_metrics_stand_over_steps_and_versions(fake: SimpleNamespace, tmp_path: Path) -> None:
    """Curves have a meaningful x axis, and the summary is written at the end."""
    with writer(tmp_path) as w:
        for event in run_events(2, 6):
            w.log(event)
    run = fake.run
    assert run.defined["leonardo/*"] == "leonardo/steps"
    assert run.defined["leonardo/held_out_loss"] == "version"
    assert run.defined["held_out_loss"] == "version"
    trained = [v for v in run.logged if "jupiter/train_loss" in v]
    assert trained[-1]["jupiter/steps"] == 240
    held_out = [v for v in run.logged if "jupiter/held_out_loss" in v]
    assert [v["version"] for v in held_out] == [0, 1, 2, 3, 4, 5, 6]
    whole = [v for v in run.logged if "held_out_loss" in v]
    assert whole[-1]["version"] == 6
    assert run.summary["facilities"]["jupiter"]["steps"] == 240
    assert run.exit_code == 0
    assert all(v is not None for values in run.logged for v in values.values())


def test_node_hours_and_queue_waits_are_metrics(fake: SimpleNamespace, tmp_path: Path) -> None:
    """What the run cost, order by order, and each wait once."""
    with writer(tmp_path) as w:
        for event in job_events():
            w.log(event)
    waits = [v for v in fake.run.logged if "leonardo/queue_wait_s" in v]
    assert [v["leonardo/queue_wait_s"] for v in waits] == [600.0, 900.0, 600.0]
    used = [v["leonardo/node_hours/used"] for v in fake.run.logged if "leonardo/tokens" in v]
    assert used == sorted(used)
    assert fake.run.logged[-1].keys().isdisjoint({"leonardo/queue_wait_s"})
    assert fake.run.summary["facilities"]["lumi"]["node_hours"]["lost"] > 0


def test_a_resumed_session_continues_the_counts(fake: SimpleNamespace, tmp_path: Path) -> None:
    """Earlier events give the counts and are not logged again."""
    events = run_events(1, 4, resume_at=2, reject_at=None, replace_at=None)
    again = next(i for i, e in enumerate(events) if e.get("resumed"))
    with writer(tmp_path, history=events[:again]) as w:
        for event in events[again:]:
            w.log(event)
    steps = [v["leonardo/steps"] for v in fake.run.logged if "leonardo/steps" in v]
    assert min(steps) > 80
    assert max(steps) == 160


def test_a_failure_of_wandb_is_told_once_and_ends_nothing(
    fake: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Tracking never costs a training run."""
    with writer(tmp_path) as w:
        fake.run.broken = True
        for event in run_events(1, 3):
            w.log(event)
    assert caplog.text.count("no connection") == 1
    assert fake.run.exit_code == 0


def test_a_refused_start_is_a_users_error(fake: SimpleNamespace, tmp_path: Path) -> None:
    """Before the run, a wrong key or entity is said at once."""

    def refuse(**_: Any) -> None:
        raise RuntimeError("permission denied")

    fake.init = refuse
    with pytest.raises(UserError, match=r"permission denied.*tracking\.mode=offline"):
        writer(tmp_path)


def test_a_missing_package_is_a_users_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The message holds the command that helps."""
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "wandb":
            raise ImportError("No module named 'wandb'")
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'flwr-hpc\[wandb\]'"):
        writer(tmp_path)


def test_auto_is_online_only_when_logged_in(tmp_path: Path) -> None:
    """Nothing leaves the machine unless somebody logged in."""
    auto = TrackingConfig(wandb=True)
    home = {"HOME": str(tmp_path)}
    assert mode_of(auto, home) == "offline"
    assert mode_of(auto, {**home, "WANDB_API_KEY": "k"}) == "online"
    assert mode_of(auto, {**home, "WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}) == "disabled"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password p\n")
    assert mode_of(auto, home) == "online"
    assert mode_of(auto, {**home, "WANDB_BASE_URL": "https://wandb.example.org"}) == "offline"
    assert mode_of(TrackingConfig(mode="offline"), {"WANDB_API_KEY": "k"}) == "offline"
    with pytest.raises(UserError, match="Valid: auto, online, offline, disabled"):
        mode_of(TrackingConfig(mode="on"))


def test_the_real_wandb_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls fit the installed wandb; its files go to the run directory."""
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    with writer(tmp_path) as w:
        for event in run_events(1, 2):
            w.log(event)
    assert list((tmp_path / "wandb").glob("offline-run-*/run-k7f3.wandb"))
