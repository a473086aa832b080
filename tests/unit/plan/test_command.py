"""``python -m flwr_hpc.plan``: every model at every facility, the ranking, and the winner."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from functools import cache

import pytest

from flwr_hpc import run
from flwr_hpc.config.compose import compose_config
from flwr_hpc.config.folder import conf_dir
from flwr_hpc.plan.__main__ import main
from flwr_hpc.plan.config import PlanConfig, compose_plan
from flwr_hpc.plan.ranking import rank

MODELS = sorted(p.stem for p in (conf_dir() / "model").glob("*.yaml"))
FACILITIES = sorted(p.stem for p in (conf_dir() / "facility").glob("*.yaml"))


@cache
def _everywhere() -> PlanConfig:
    return compose_plan([f"+facility=[{','.join(FACILITIES)}]", "nodes=2"])


@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_planned_at_every_facility(model: str) -> None:
    """Protects the promise: no facility lacks a fact, no model a shape that a plan needs."""
    shape = compose_plan([f"model={model}", "+facility=local_a"]).model
    config = replace(_everywhere(), model=shape)
    for facility in FACILITIES:
        ranking = rank(config, facility)
        assert ranking.ranked, facility
        for candidate in ranking.ranked:
            assert candidate.memory.total > 0
            assert candidate.time.total > 0
            assert candidate.plan.replicate * candidate.plan.shard * candidate.plan.tensor == (
                ranking.machine.ranks
            )


def test_the_winner_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    """Protects the last line: it is a run that is accepted, in a queue that takes the nodes."""
    assert main(["model=llama3_8b", "+facility=leonardo", "nodes=4"]) == 0
    out = capsys.readouterr().out
    command = next(line for line in out.splitlines() if line.startswith("python -m flwr_hpc.run"))
    config = compose_config(shlex.split(command)[3:])
    assert config.facilities["leonardo"].nodes == 4
    assert config.facilities["leonardo"].qos is None  # the debug queue takes two nodes
    assert config.train.activation_checkpointing in ("none", "selective", "full")
    train = config.train
    copies = 16 // train.tensor
    assert copies % train.replicate == 0
    assert train.micro_batch * train.accumulation * copies * config.data.seq_len == 2**20


def test_what_does_not_fit_says_by_how_much() -> None:
    """Protects users from jobs that run out of memory: 16 bytes per parameter, not sharded."""
    ranking = rank(compose_plan(["model=llama3_8b", "+facility=polaris"]), "polaris")
    alone = next(c for c in ranking.ranked if c.plan.shard == 1 and c.plan.tensor == 1)
    assert not alone.fits
    assert alone.memory.parameters + alone.memory.optimizer == 12 * ranking.shape.parameters
    assert alone.memory.gradients in (0, 4 * ranking.shape.parameters)
    assert re.match(r"\d+\.\d GB too much: optimizer 64\.2 GB, ", alone.reason)
    fitting = [c.tokens_per_s for c in ranking.ranked if c.fits]
    assert fitting == sorted(fitting, reverse=True)


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """Protects the exit code, and says what to try."""
    assert main(["model=llama3_70b", "+facility=polaris"]) == 1
    assert "GB more per device. Try: nodes=2" in capsys.readouterr().out


def test_plans_that_the_trainer_cannot_execute_do_not_win() -> None:
    """Protects from settings that are refused: the trainer does not split experts, or DoRA."""
    mixtral = ["model=mixtral_8x7b", "+facility=jupiter", "nodes=16"]
    dora = ["model=llama3_8b", "+facility=leonardo", "model.lora.dora=true"]
    for overrides in (mixtral, dora):
        config = compose_plan(overrides)
        ranking = rank(config, next(iter(config.facilities)))
        assert ranking.winner is None or ranking.winner.plan.tensor == 1
        split = [c for c in ranking.ranked if c.plan.tensor > 1]
        assert split
        assert {c.missing for c in split} == {"TP"}


def test_a_plan_with_tensor_ranks_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    """Protects batches of fewer sequences than ranks: groups of ranks share a sequence."""
    batch = ["nodes=16", "train.batch_size=32"]
    assert main(["model=llama3_70b", "+facility=leonardo", *batch, "data.seq_len=8192"]) == 0
    command = next(line for line in capsys.readouterr().out.splitlines() if "flwr_hpc.run" in line)
    train = compose_config(shlex.split(command)[3:]).train
    assert train.tensor > 1
    assert 64 // train.tensor * train.micro_batch * train.accumulation == 32


def test_the_plan_of_an_encoder_decoder_names_its_objective(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Protects the command that a plan prints: without it the run would be refused."""
    assert main(["model=t5_base", "+facility=frontier"]) == 0
    assert "data.objective=span_corruption" in capsys.readouterr().out
    assert run.main(["model=t5_base", "dry_run=true"]) == 2
    assert "Add to the command: data.objective=span_corruption" in capsys.readouterr().err


def test_what_a_decoder_writes_is_planned_for() -> None:
    """Protects plans of T5 from a decoder as long as its encoder: by hand, and as data say."""
    t5 = ["model=t5_base", "+facility=leonardo", "data.seq_len=512"]
    pairs = [*t5, "data.objective=seq2seq", "data=jsonl"]
    spans, long, short = (
        rank(compose_plan(o), "leonardo") for o in (t5, pairs, [*pairs, "data.target_len=32"])
    )
    # 568 tokens lose 85 in 28 runs: 483 + 28 + 1 are read, and 85 + 28 + 1 are to be written.
    assert [r.shape.target_len for r in (spans, long, short)] == [114, 512, 32]
    # 12 layers of queries, keys, values, output and MLP; the decoder's attend once more.
    layer, cross = 4 * 768**2 + 2 * 768 * 3072, 2 * 768**2
    halves = 12 * (512 * (layer + cross) + 32 * (layer + cross)) + 32 * 32128 * 768
    pairs_of_positions = 12 * 768 * (512 * 512 + 32 * 32 + 32 * 512)
    assert short.shape.flops_per_token(512) * 512 == 6 * halves + 12 * pairs_of_positions
    assert short.ranked[0].tokens_per_s > 1.5 * long.ranked[0].tokens_per_s
    most = {c.plan: c.memory.total for c in long.ranked}
    assert all(c.memory.total <= most[c.plan] for c in short.ranked)
    kept = [max(c.memory.activations for c in r.ranked) for r in (short, long)]
    assert kept[0] < 0.6 * kept[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=llama3_8b"], r"name the facility to plan for: \+facility=NAME. Known: alps,"),
        (["+facility=alps", "nodes=0"], "nodes=0 must be greater than zero"),
        (["+facility=alps", "plan.overlap=2"], r"plan\.overlap=2.0 must lie between 0 and 1"),
        (["+facility=alps", "plan.token=1"], r"'plan' has no key 'token'.*tokens"),
        (["+facility=alps", "model=gpt2", "data.seq_len=4096"], r"data\.seq_len=1024"),
        (["+facility=alps", "model.path=/nowhere"], "config.json of a local directory"),
    ],
)
def test_mistakes_are_answered(
    overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects users from tracebacks: what is wrong, and what is valid."""
    assert main(overrides) == 2
    assert re.search(message, capsys.readouterr().err)
