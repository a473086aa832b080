"""What of a site's checkpoints a job clears away as it starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flwr_hpc.train.state.checkpoint import Checkpoints, state_dict_saver

WHOLE = "run-a-000001@0000000004"


def test_a_start_removes_what_killed_jobs_left(tmp_path: Path) -> None:
    """Protects the quota from halves of checkpoints, and those that others still write from it."""
    halves = {name: tmp_path / f".{WHOLE}.{name}.tmp" for name in ("a0000", "a0001", "a0002")}
    others = [tmp_path / f".{WHOLE}.old", tmp_path / f".{WHOLE}.damaged", tmp_path / WHOLE]
    for folder in [*halves.values(), *others]:
        folder.mkdir()
        (folder / "__0_0.distcp").write_bytes(b"x")
    group: Any = SimpleNamespace(ranks=SimpleNamespace(rank=0, world_size=1))
    Checkpoints(tmp_path, group, writer="a0002").sweep(lambda name: name == "a0000")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {halves["a0001"].name, f".{WHOLE}.damaged", WHOLE}


def test_a_third_checkpoint_is_never_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the quota: the oldest goes before one more is written, and the newest never."""
    kept: list[list[str]] = []

    def save(tensors: Any, checkpoint_id: Path, **_: Any) -> None:
        kept.append(sorted(path.name for path in tmp_path.glob("[!.]*")))

    monkeypatch.setattr(state_dict_saver, "save", save)
    group: Any = SimpleNamespace(
        ranks=SimpleNamespace(rank=0, world_size=1), background=None, broadcast=lambda v, *_: v
    )
    checkpoints = Checkpoints(tmp_path, group, writer="a0000")
    names = [f"run-a-{seq:06d}@{seq + 1:010d}" for seq in range(4)]
    for seq in range(4):
        checkpoints.save(f"run-a-{seq:06d}", seq + 1, {}, {})
    assert kept == [[], names[:1], names[1:2], names[2:3]]
    assert sorted(path.name for path in tmp_path.iterdir()) == names[2:]
