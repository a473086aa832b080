"""Who takes part, and the settings that are searched: twelve for everybody."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

from case_runs import STEPS

QUIET = {"fraction_evaluate": 0.0, "min_evaluate_nodes": 0}  # evaluation rounds would cost jobs


@dataclass(frozen=True)
class Contestant:
    """A strategy, how its jobs are had, and the grid of its settings."""

    target: str  # Its class
    search: dict[str, list[Any]]  # Settings whose product is searched
    fixed: dict[str, Any] = field(default_factory=dict)  # Settings that are not
    # ``warm``: an allocation is kept between orders, its successors submitted ahead (both are
    # the launcher's, whatever the strategy); ``per_round``: a job per order.
    policy: str = "warm"
    # What is searched on the second task, from the best of the first on; None: takes no part, as
    # a run costs more there.
    on_text: dict[str, list[Any]] | None = None


def grid(contestant: Contestant) -> list[dict[str, Any]]:
    """Return every combination of a contestant's settings."""
    names = list(contestant.search)
    values = product(*contestant.search.values())
    return [{**contestant.fixed, **dict(zip(names, v, strict=True))} for v in values]


_LONG = {STEPS: [100, 150, 200, 300, 400, 600, 800, 1200, 1600, 2400, 3200, 4800]}
_OUTER = {"outer_lr": [0.7, 1.0], "momentum": [0.8, 0.9]}
_BUFFER = {STEPS: [50, 100], "buffer_size": [2, 4], "outer_lr": [1.0, 2.0, 4.0]}
_QUEUE = {"tolerance": [0.2, 0.5], "scale_lr": [True, False]}
# What FedBackfill has of its own, switched on for others: larger steps are searched then, as
# the average takes out their noise, and shorter orders.
_SIZED = {"average": 8.0, "size_steps": True}
_TEXT = {"outer_lr": [1.0, 2.0, 4.0]}
_LARGER = {"outer_lr": [1.2, 2.0, 4.0], "round_s": [60.0, 100.0]}

CONTESTANTS: dict[str, Contestant] = {
    "fedavg, job per round": Contestant(
        "strategies.fedavg.FedAvg", _LONG, policy="per_round", on_text={STEPS: [800, 1600, 3200]}
    ),
    "fedavg": Contestant("strategies.fedavg.FedAvg", _LONG, on_text={STEPS: [800, 1600, 3200]}),
    "fedadam": Contestant(
        "flwr.serverapp.strategy.FedAdam",
        {STEPS: [25, 50, 100, 200], "eta": [0.01, 0.03, 0.1]},
        QUIET,
    ),
    "fedprox": Contestant(
        "strategies.fedavg.FedAvg",
        {STEPS: [100, 200, 400, 800], "proximal_mu": [0.0003, 0.001, 0.01]},
    ),
    "scaffold": Contestant(
        "strategies.scaffold.Scaffold", {STEPS: [100, 200, 400, 800], "outer_lr": [1.0, 2.0, 3.0]}
    ),
    "fedavg, quorum": Contestant(
        "strategies.fedavg.FedAvg",
        {STEPS: [50, 100, 200], "quorum": [2, 3], "grace_s": [60.0, 300.0]},
        on_text={STEPS: [100, 200, 400]},
    ),
    "diloco, job per round": Contestant(
        "strategies.diloco.DiLoCo", {STEPS: [200, 400, 800], **_OUTER}, policy="per_round"
    ),
    "diloco": Contestant(
        "strategies.diloco.DiLoCo",
        {STEPS: [100, 200, 400], **_OUTER},
        on_text={"outer_lr": [0.4, 0.7, 1.0]},
    ),
    "streaming_diloco": Contestant(
        "strategies.streaming_diloco.StreamingDiLoCo",
        {STEPS: [200, 400, 800], "alpha": [0.0, 0.5], "overlap": [True, False]},
    ),
    "decoupled_diloco": Contestant(
        "strategies.decoupled_diloco.DecoupledDiLoCo",
        {STEPS: [50, 100, 200], "quorum": [2, 3], "momentum": [0.5, 0.8]},
        on_text={"outer_lr": [0.4, 0.7, 1.0]},
    ),
    "decoupled_diloco, averaged and sized": Contestant(
        "strategies.decoupled_diloco.DecoupledDiLoCo",
        {"outer_lr": [0.7, 1.2, 2.0], "round_s": [60.0, 100.0], "quorum": [2, 3]},
        _SIZED | {"momentum": 0.5},
        on_text={"outer_lr": [0.7, 1.2, 2.0]},
    ),
    "async_diloco": Contestant(
        "strategies.async_diloco.AsyncDiLoCo",
        {STEPS: [25, 50, 100], "outer_lr": [0.7, 1.2], "momentum": [0.8, 0.9]},
        on_text={"outer_lr": [0.3, 0.7, 1.2]},
    ),
    "async_diloco, averaged and sized": Contestant(
        "strategies.async_diloco.AsyncDiLoCo",
        {**_LARGER, "momentum": [0.8, 0.9]},
        _SIZED,
        on_text=_TEXT,
    ),
    "fedasync": Contestant(
        "strategies.fedasync.FedAsync",
        {STEPS: [50, 100, 200], "alpha": [0.3, 0.6, 0.9, 1.0]},
        on_text={STEPS: [50, 100, 200]},
    ),
    "fedbuff": Contestant("strategies.fedbuff.FedBuff", _BUFFER, on_text=_TEXT),
    "fedbuff, debiased": Contestant(
        "strategies.fedbuff.FedBuff", _BUFFER, {"debias": True}, on_text=_TEXT
    ),
    "fedbuff, averaged and sized": Contestant(
        "strategies.fedbuff.FedBuff",
        {"outer_lr": [2.0, 4.0, 8.0], "round_s": [60.0, 100.0], "buffer_size": [2, 4]},
        _SIZED,
        on_text=_TEXT,
    ),
    "fedcompass": Contestant(
        "strategies.fedcompass.FedCompass",
        {"min_steps": [10, 20, 40], "max_steps": [50, 100], "slack": [1.2, 1.5]},
        on_text={"max_steps": [50, 100, 200]},
    ),
    "fedqueue, job per round": Contestant(
        "strategies.fedqueue.FedQueue",
        {"round_s": [1800.0, 3600.0, 7200.0], **_QUEUE},
        policy="per_round",
        on_text={"round_s": [1800.0, 3600.0, 7200.0]},
    ),
    "fedqueue": Contestant(
        "strategies.fedqueue.FedQueue",
        {"round_s": [300.0, 600.0, 1800.0], **_QUEUE},
        on_text={"round_s": [300.0, 600.0, 1800.0]},
    ),
    "fedbackfill": Contestant(
        "strategies.fedbackfill.FedBackfill",
        {"outer_lr": [1.0, 2.0, 4.0], "round_s": [60.0, 100.0], "overlap": [True, False]},
        on_text=_TEXT,
    ),
    "fedbackfill_rounds": Contestant(
        "strategies.fedbackfill_rounds.FedBackfillRounds",
        {"outer_lr": [1.0, 2.0, 3.0, 4.0], "round_s": [100.0, 200.0, 300.0]},
        on_text=_TEXT,
    ),
    # Not tuned: what was found before. Larger steps are soonest in the scenario that is tuned
    # in, and unstable where all sites report at once.
    "fedbackfill_rounds, eta 3": Contestant(
        "strategies.fedbackfill_rounds.FedBackfillRounds",
        {},
        {"outer_lr": 3.0, "round_s": 200.0},
    ),
}

# FedBackfill without one of its parts, or with one that is optional: its settings, the
# facility's.
ABLATION: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "whole": ({}, {}),
    "a job per order": ({}, {"policy": "per_round"}),
    "no successor ahead": ({}, {"max_successors": 0}),
    "one successor ahead": ({}, {"max_successors": 1}),
    "no partial work": ({}, {"partial_work": False}),
    "no back-off": ({}, {"back_off": False}),
    "early binding": ({"late_binding": False}, {}),
    "fixed steps": ({"size_steps": False}, {}),
    "balance by steps": ({"balance": True}, {}),
    "balance by arrivals": ({"balance_arrivals": True}, {}),
    "no staleness weight": ({"exponent": 0.0}, {}),
    "no average": ({"average": None}, {}),
    "no momentum, eta 8": ({"momentum": 0.0, "outer_lr": 8.0}, {}),
    "with overlap": ({"overlap": True}, {}),
    "without overlap": ({"overlap": False}, {}),
}
