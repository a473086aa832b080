"""A run that does not fit says so before its first job."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from flwr_hpc import run
from flwr_hpc.config.compose import compose_config
from flwr_hpc.errors import UserError
from flwr_hpc.server import preflight, session

GB = 10**9
LLAMA = ("+facility=local_a", "model=llama3_8b")  # 8.03 B parameters, 32.1 GB in float32


def space(tmp_path: Path, free: int, *overrides: str) -> list[str]:
    config = compose_config([*LLAMA, *overrides])
    return preflight.check_space(config, tmp_path / "run", lambda path: free)


def test_a_disk_without_room_for_one_order_is_refused(tmp_path: Path) -> None:
    """Protects a job's hours in the queue: a version and a checkpoint (128.5 GB) never fit."""
    with pytest.raises(UserError, match="cannot begin with less than 128 GB") as refusal:
        space(tmp_path, 128 * GB)
    assert f"{tmp_path}/run: 128 GB free" in str(refusal.value)
    assert "run_dir=/other/path" in str(refusal.value)
    assert "train.checkpoint_every_orders=0" in str(refusal.value)
    assert space(tmp_path, 128 * GB, "train.checkpoint_every_orders=0")


def test_a_disk_that_may_fill_up_is_warned_of(tmp_path: Path) -> None:
    """Protects from a stop in the third round; site and server are on one disk here."""
    (warning,) = space(tmp_path, 480 * GB)
    assert warning.startswith("warning: ")
    assert "up to 482 GB" in warning  # 8 models of the site and 7 of the server
    assert space(tmp_path, 600 * GB) == []


def test_a_site_on_another_disk_is_named_by_its_setting(tmp_path: Path) -> None:
    """Protects who has to move the folder that is too full, and not the other."""
    config = compose_config([*LLAMA, "facilities.local_a.workdir=/dev/shm"])
    sizes = {Path("/dev/shm"): 1 * GB}
    with pytest.raises(UserError, match=r"facilities.local_a.workdir=/other/path"):
        preflight.check_space(config, tmp_path / "run", lambda path: sizes.get(path, 10**15))


def test_a_site_that_joins_is_judged_without_the_server(tmp_path: Path) -> None:
    """Protects a centre from a run that its disk does not hold; the server's is elsewhere."""
    config = compose_config([*LLAMA])
    (warning,) = preflight.check_space(config, tmp_path, lambda path: 200 * GB, joins=True)
    assert "up to 257 GB" in warning
    assert "site.dir=/other/path" in warning
    assert preflight.check_space(config, tmp_path, lambda path: 300 * GB, joins=True) == []


@pytest.mark.parametrize(
    "overrides", [["model.path=org/name", "model.lora.r=8"], ["+facility=local_a"]]
)
def test_what_is_small_or_not_known_is_not_judged(tmp_path: Path, overrides: list[str]) -> None:
    """Protects adapters, whose size is not the model's, and the demo."""
    config = compose_config(overrides)
    assert preflight.check_space(config, tmp_path / "run", lambda path: 10 * GB) == []


def test_a_dry_run_says_what_an_adapter_takes_on_its_way(tmp_path: Path) -> None:
    """Protects the sizing of a slow line: of LoRA the adapter travels, not the model."""
    shape = compose_config([*LLAMA]).model.config
    (tmp_path / "config.json").write_text(json.dumps(shape))
    lora = ["+facility=local_a", f"model.path='{tmp_path}'", "model.lora.r=8", "data=jsonl"]
    lora += ["data.paths.local_a=[x.jsonl]"]
    config = compose_config([*lora, "exchange.codec=int8"])
    assert preflight.sent_parameters(config) == 20_971_520  # by hand in plan/test_search.py
    told = session._traffic(config)
    assert "adapter: 0.021 B parameters, 0.0839 GB" in told
    assert "0.0839 GB to a site (exchange.downlink=full) and 0.0211 GB back" in told
    config = compose_config([*lora, "model.lora.target_modules='q_proj,v_proj'"])
    assert preflight.sent_parameters(config) is None
    assert session._traffic(config) == ""


def test_the_command_ends_with_2_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects from a run directory, and jobs, of a run that was refused."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10 * GB))
    folder = tmp_path / "run"
    assert run.main([*LLAMA, f"run_dir={folder}"]) == 2
    assert "10 GB free" in capsys.readouterr().err
    assert not folder.exists()
