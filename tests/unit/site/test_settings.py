"""Settings of a site and of its workers: wrong ones are refused at the login node."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from flwr_hpc.config.compose import compose_config
from flwr_hpc.errors import UserError
from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.server.sites import site_settings
from flwr_hpc.site.settings import SiteSettings, from_node_config, to_node_config
from flwr_hpc.spool import AllocationDir
from flwr_hpc.worker.settings import WorkerSettings

CHANGES = [
    "+facility=frontier", "facilities.frontier.account=P1", "model.lora.r=4",
    "model.path=/models/tiny", "data.kind=text", "data.paths.frontier=[/data/a.txt]",
    "facilities.frontier.env.NAME='a \"b\" {c}'",
]  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path) -> SiteSettings:
    config = compose_config(CHANGES)
    return site_settings(RunDir(tmp_path / "run 1"), config, "frontier", "key")


def test_settings_survive_their_file(settings: SiteSettings, tmp_path: Path) -> None:
    """Protects what a user set on its way through JSON, to the launcher and to the job."""
    path = tmp_path / "with 'quotes\" and spaces" / "site.json"
    settings.write(path)
    key, _, value = to_node_config(path).partition("=")
    assert key == "site"
    read = from_node_config(value.strip('"'))
    assert read == settings
    assert read.worker.model.lora.r == 4
    allocation = AllocationDir(tmp_path / "a0000")
    allocation.write_settings(asdict(read.worker))
    assert WorkerSettings.read(allocation) == settings.worker


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("seed", "many", "seed"),
        ("facilities", None, "facilities"),
        ("idle_timeout_s", "soon", "idle_timeout_s"),
        ("train", {"steps": "ten"}, "train.steps"),
        ("train", {"stepz": 10}, "Did you mean 'steps'"),
        ("surprise", 1, "surprise"),
    ],
)
def test_wrong_worker_settings_are_refused(
    settings: SiteSettings, tmp_path: Path, field: str, value: Any, words: str
) -> None:
    """Protects from a job that waits for hours and dies of a setting of the wrong kind."""
    raw = json.loads(json.dumps(asdict(settings)))
    raw["worker"][field] = value
    (tmp_path / "site.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=words):
        SiteSettings.read(tmp_path / "site.json")
    allocation = AllocationDir(tmp_path / "a0000")
    allocation.write_settings(raw["worker"])
    with pytest.raises(UserError, match=r"settings\.json"):
        WorkerSettings.read(allocation)


def test_settings_are_checked_before_they_are_written(
    settings: SiteSettings, tmp_path: Path
) -> None:
    """Protects the driver's user: the error comes where the command was typed."""
    exchange = replace(settings.exchange, inline_below_mb="small")  # type: ignore[arg-type]
    wrong = replace(settings, exchange=exchange)
    with pytest.raises(UserError, match="inline_below_mb"):
        wrong.write(tmp_path / "site.json")
    assert not (tmp_path / "site.json").exists()


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}"])
def test_a_site_file_that_cannot_be_read(tmp_path: Path, text: str | None) -> None:
    """Protects whoever starts a SuperNode by hand: the message names the file, no traceback."""
    path = tmp_path / "site.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"site file|site\.json"):
        SiteSettings.read(path)
    with pytest.raises(UserError, match="--node-config"):
        from_node_config(None)
