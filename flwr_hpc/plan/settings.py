"""The winner as settings of a run: printed, or taken by the run itself (``train.plan=auto``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from flwr_hpc.config.facility import FacilityConfig, queue_of, walltime_s
from flwr_hpc.config.overrides import read
from flwr_hpc.config.schema import Config
from flwr_hpc.config.validate import check_values
from flwr_hpc.errors import UserError
from flwr_hpc.plan.config import PlanConfig
from flwr_hpc.plan.parallel import ParallelPlan
from flwr_hpc.plan.ranking import rank
from flwr_hpc.plan.search import Candidate
from flwr_hpc.plan.show import Ranking

AUTO = "auto"

Settings = Mapping[str, Any]


def plan_overrides(
    name: str, f: FacilityConfig, nodes: int, plan: ParallelPlan, seq_len: int
) -> list[str]:
    """Return what a run needs to follow a plan that the trainer can execute."""
    return [
        *_allocation(name, f, nodes),
        f"data.seq_len={seq_len}",
        *(f"train.{name}={value}" for name, value in training_settings(plan).items()),
    ]


def training_settings(plan: ParallelPlan) -> Mapping[str, int | str]:
    """Return the fields of ``train`` by which the trainer follows a plan."""
    return {
        "micro_batch": plan.micro_batch,
        "accumulation": plan.accumulation,
        "activation_checkpointing": plan.checkpointing,
        "replicate": plan.replicate,
        "tensor": plan.tensor,
    }


def with_plan(config: Config, overrides: Sequence[str]) -> tuple[Config, str]:
    """Return the configuration with the winner's settings, and a line that says which they are.

    Settings that the overrides name stay as they are: the winner is the best of the plans that
    have them.
    """
    if not config.facilities:
        raise UserError(
            "train.plan=auto plans for facilities of this command, and it has none: each centre "
            "gives its own settings, see python -m flwr_hpc.plan"
        )
    given = _given(config, overrides)
    rankings = {name: _ranking(config, name, given) for name in config.facilities}
    chosen = {name: _choice(ranking, given) for name, ranking in rankings.items()}
    settings = _settings_of_all({n: training_settings(c.plan) for n, c in chosen.items()})
    if config.train.batch_size is not None:  # which the ranks share by themselves
        settings = {k: v for k, v in settings.items() if k != "accumulation"}
    planned = replace(config, train=replace(config.train, **settings))
    check_values(planned)
    first = next(iter(chosen))
    return planned, _line(settings, given, rankings[first], chosen[first])


def _given(config: Config, overrides: Sequence[str]) -> Settings:
    """Return the settings of a plan that the user has decided."""
    keys = {read(override).key_or_group for override in overrides}
    names = ("micro_batch", "accumulation", "activation_checkpointing", "replicate", "tensor")
    return {n: getattr(config.train, n) for n in names if f"train.{n}" in keys}


def _ranking(config: Config, name: str, given: Settings) -> Ranking:
    facility, train = config.facilities[name], config.train
    if facility.gpu_memory_gb is None:
        raise UserError(
            f"train.plan=auto must know what fits into the memory of a device of {name}. "
            f"Give it, as in: +facility={name} facilities.{name}.gpu_memory_gb=16"
        )
    if train.batch_size is None and {"micro_batch", "accumulation"} <= given.keys():
        copies = facility.nodes * facility.ranks_per_node // given.get("tensor", 1)
        train = replace(train, batch_size=train.micro_batch * train.accumulation * copies)
    run = {f.name: getattr(config, f.name) for f in fields(Config)}
    return rank(PlanConfig(**run | {"train": train}), name)


def _choice(ranking: Ranking, given: Settings) -> Candidate:
    for candidate in ranking.ranked:
        if candidate.executable and given.items() <= training_settings(candidate.plan).items():
            return candidate
    if ranking.winner is None or not given:
        raise UserError(
            f"train.plan=auto: no plan that the trainer can execute fits at {ranking.facility}. "
            "Give more nodes or a shorter data.seq_len; what each plan lacks: "
            "python -m flwr_hpc.plan"
        )
    raise UserError(
        f"train.plan=auto: no plan with {_words(given)} fits at {ranking.facility}; the best "
        f"without has {_words(training_settings(ranking.winner.plan))}. Leave yours out, or give "
        "train.plan=none"
    )


def _settings_of_all(chosen: Mapping[str, Settings]) -> Settings:
    (first, settings), *others = chosen.items()
    for name, other in others:
        if other != settings:
            raise UserError(
                "train.plan=auto: one setting holds for all facilities, and their plans differ: "
                f"{first} {_words(settings)}; {name} {_words(other)}. Give those that differ, "
                "or train.plan=none"
            )
    return settings


def _words(settings: Settings) -> str:
    return " ".join(f"train.{name}={value}" for name, value in settings.items())


def _line(settings: Settings, given: Settings, ranking: Ranking, chosen: Candidate) -> str:
    line = (
        f"train.plan=auto: {_words(settings)} ({chosen.plan.mesh}, "
        f"{chosen.memory.total / 1e9:.1f} GB, {chosen.tokens_per_s:,.0f} tokens/s predicted)"
    )
    best = ranking.winner
    if best is None or best is chosen:
        return line
    other = training_settings(best.plan)
    yours = {name: value for name, value in given.items() if other[name] != value}
    gain = best.tokens_per_s / chosen.tokens_per_s - 1
    return f"{line}; {_words(yours)} is yours: {_words(other)} would be {gain:.0%} faster"


def _allocation(name: str, f: FacilityConfig, nodes: int) -> list[str]:
    """The node count, and a queue that takes so many where the facility's default does not."""
    key = f"facilities.{name}"
    given = [f"{key}.nodes={nodes}"] if nodes != f.nodes else []
    wanted = replace(f, nodes=nodes)
    if queue_of(wanted) is not None or not f.queues:
        return given
    for queue in f.queues:
        there = replace(wanted, partition=queue.partition, qos=queue.qos)
        limit = queue.walltime
        if queue_of(there) is queue and (not limit or walltime_s(f.walltime) <= walltime_s(limit)):
            changed = [n for n in ("partition", "qos") if getattr(queue, n) != getattr(f, n)]
            return [*given, *(f"{key}.{n}={getattr(queue, n) or 'null'}" for n in changed)]
    return given
