"""The commands of README.md and docs/ as they stand there."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from flwr_hpc.config.compose import compose_config, shown
from flwr_hpc.run import main
from flwr_hpc.server import preflight

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES_WITH_FILES = ("strategies.md", "facilities.md", "facilities-pbs.md")


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks in one of the languages (a pattern)."""
    found = re.findall(rf"^ *```(?:{language})\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    return [dedent(block) for block in found]


def commands() -> list[object]:
    """Return the arguments of every documented `python -m flwr_hpc.run`."""
    found = []
    for page in PAGES:
        for block in blocks(page.read_text(), "sh|bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "flwr_hpc.run" in words:
                    arguments = words[words.index("flwr_hpc.run") + 1 :]
                    found.append(pytest.param(arguments, id=f"{page.name}: {' '.join(arguments)}"))
    return found


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lay out what the commands speak of: files, a run, configuration, models, a strategy."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SBATCH_ACCOUNT", "PROJECT")  # as on a login node of yours
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    monkeypatch.setattr(preflight, "find_spec", lambda name: name)
    monkeypatch.setattr(preflight, "check_pretrained", lambda *_: None)
    run = "runs/2026-01-31_12-00-00"
    strategies, facilities, pbs = ((ROOT / "docs" / f).read_text() for f in PAGES_WITH_FILES)
    files = {
        "a/x.txt": "text " * 1000,
        "a/valid.txt": "text " * 1000,
        "b/x.txt": "text " * 1000,
        f"{run}/run.json": '{"run_key": "key"}',
        "sweeps/2026-01-31_12-00-00/points.json": '{"points": [{"name": "000", "overrides": []}]}',
        f"{run}/config.yaml": shown(compose_config([])),
        "my_module.py": next(b for b in blocks(strategies, "python") if "TrimmedMean" in b),
        "my_conf/strategy/trimmed.yaml": blocks(strategies, "yaml")[0],
        "my-conf/facility/mycluster.yaml": blocks(facilities, "yaml")[0],
        "my-conf/facility/mypbs.yaml": blocks(pbs, "yaml")[0],
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.mark.parametrize("arguments", commands())
@pytest.mark.usefixtures("here")
def test_documented_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Protects readers from commands that are refused."""
    code = main([*arguments, "dry_run=true"])
    lines = capsys.readouterr().err.splitlines()
    assert (code, [line for line in lines if not line.startswith("train.plan=auto: ")]) == (0, [])


def test_there_are_commands() -> None:
    """Protects the test above from a pattern that finds nothing."""
    assert len(commands()) >= 15
