"""``train.plan=auto``: the winner of the plan command is what the run trains by."""

from __future__ import annotations

from pathlib import Path

import pytest

from flwr_hpc import run
from flwr_hpc.config.compose import compose_config, resume_config, shown
from flwr_hpc.config.schema import Config
from flwr_hpc.errors import UserError
from flwr_hpc.plan.__main__ import main
from flwr_hpc.server.run_dir import configure

LEONARDO = ["model=tiny_llama", "+facility=leonardo", "facilities.leonardo.account=A"]
LOCAL = ["+facility=[local_a,local_b]", *(f"facilities.local_{n}.gpu_memory_gb=16" for n in "ab")]
AUTO = "train.plan=auto"


def planned(*overrides: str) -> Config:
    config, resumed = configure([*overrides, AUTO], None)
    assert not resumed
    return config


def test_the_run_has_the_settings_that_the_command_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Protects from a second opinion: same facility, nodes and sequences, same plan."""
    assert main([*LEONARDO, "nodes=1", "data.seq_len=256"]) == 0
    printed = capsys.readouterr().out.splitlines()
    words = next(line for line in printed if line.startswith("python -m flwr_hpc.run")).split()
    wanted = [w for w in words if w.startswith("train.")]
    config = planned(*LEONARDO)
    assert len(wanted) == 5
    for word in wanted:
        name, value = word.removeprefix("train.").split("=")
        assert str(getattr(config.train, name)) == value
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.plan=auto: ")
    assert all(word in line for word in wanted)
    assert config.train.micro_batch != compose_config(LEONARDO).train.micro_batch


def test_settings_of_the_user_win_with_words(capsys: pytest.CaptureFixture[str]) -> None:
    """The plan is the best of those that have them, and says what they cost."""
    config = planned(*LEONARDO, "train.micro_batch=1", "train.activation_checkpointing=full")
    train = config.train
    assert (train.micro_batch, train.activation_checkpointing) == (1, "full")
    assert train.micro_batch * train.accumulation * 4 * 256 == 2**20
    line = capsys.readouterr().err
    assert "train.micro_batch=1 train.activation_checkpointing=full is yours" in line
    assert "faster" in line


def test_the_batch_of_the_user_stays() -> None:
    """Whether as a size, which the ranks share themselves, or as micro batch and accumulation."""
    train = planned(*LEONARDO, "train.batch_size=32").train
    assert (train.batch_size, train.accumulation) == (32, 1)
    assert train.micro_batch == 8
    train = planned(*LEONARDO, "train.micro_batch=2", "train.accumulation=4").train
    assert (train.micro_batch, train.accumulation) == (2, 4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=tiny_llama"], r"as in: \+facility=local_a facilities.local_a.gpu_memory_gb="),
        ([*LOCAL, "facilities.local_b.ranks_per_node=1"], r"their plans differ: local_a .*local_b"),
        ([*LEONARDO, "train.replicate=3"], r"train.replicate=3 replicas cannot share"),
        ([*LEONARDO, "train.micro_batch=3"], r"no plan with train.micro_batch=3 fits at leonardo"),
        ([*LEONARDO, "model=llama3_70b"], r"no plan that the trainer can execute fits at leon"),
        (["train.plan=always"], r"train.plan"),
    ],
)
def test_what_cannot_be_planned_is_explained(overrides: list[str], message: str) -> None:
    """No run starts by a plan that would run out of memory, or that nobody made."""
    with pytest.raises(UserError, match=message):
        configure([AUTO, *overrides], None)


def test_a_resumed_run_keeps_its_plan(tmp_path: Path) -> None:
    """Protects the schedule and the place in the data: the settings are in the run's folder."""
    config = planned(*LEONARDO)
    saved = tmp_path / "config.yaml"
    saved.write_text(shown(config))
    assert resume_config(saved, ["rounds=20"]).train == config.train
    with pytest.raises(UserError, match=r"train.plan"):
        resume_config(saved, ["train.plan=none"])


def test_a_dry_run_shows_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything starts, one line says what was chosen."""
    assert run.main(["dry_run=true", AUTO, *LOCAL, "train.batch_size=64"]) == 0
    err = capsys.readouterr().err
    assert err.count("train.plan=auto: train.micro_batch=") == 1
