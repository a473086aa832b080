"""Wrong arguments of a strategy: found before anything starts, and named."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf

from flwr_hpc import run
from flwr_hpc.errors import UserError
from flwr_hpc.server.strategy_factory import build_strategy
from flwr_hpc.simulate.__main__ import main as simulate
from strategies import HpcStrategy
from strategies.scaffold import Scaffold

OWN = """
from __future__ import annotations
from typing import TYPE_CHECKING
from strategies.fedavg import FedAvg
if TYPE_CHECKING:
    from nowhere import Odd
class Mine(FedAvg):
    def __init__(self, *, width: int, odd: Odd = None, deep: dict[str, int] = None,
                 free=3, none: int = None, nested: float = 1.0, **rest):
        super().__init__(**rest)
"""

TYPES = [
    ("Scaffold", "outer_lr", "abc", "a number, e.g. strategy.outer_lr=1.0"),
    ("Scaffold", "quorum", True, "a whole number, e.g. strategy.quorum=1"),
    ("Scaffold", "late", "mrge", "merge or drop, e.g. strategy.late=merge. Did you mean 'merge'?"),
    ("Scaffold", "forget_after", "abc", "a whole number, e.g. strategy.forget_after=10"),
    ("Scaffold", "grace_s", {"a": 1}, "a number or null"),
    ("StreamingDiLoCo", "momentum", "abc", "a number"),
    ("StreamingDiLoCo", "overlap", "abc", "true or false, e.g. strategy.overlap=true"),
    ("StreamingDiLoCo", "overlap", 1, "true or false"),
    ("StreamingDiLoCo", "fragments", "abc", "a whole number, e.g. strategy.fragments=4"),
    ("StreamingDiLoCo", "fragments", 2.5, "a whole number"),
    ("StreamingDiLoCo", "fragments", None, "a whole number"),
    ("FedBackfill", "outer_lr", None, "a number, e.g. strategy.outer_lr=2.0"),
    ("FedBackfill", "outer_lr", [1.0], "a number"),
    ("FedBackfill", "overlap", "maybe", "true or false, e.g. strategy.overlap=false"),
    ("FedBackfill", "round_s", "abc", "a number or null, e.g. strategy.round_s=1.0"),
    ("FedBackfillRounds", "grace", "abc", "a number, e.g. strategy.grace=0.33"),
    ("FedBuff", "staleness", 3, "a text, e.g. strategy.staleness=polynomial"),
]
RANGES = [
    ("FedBackfill", "average", -1, "zero or greater"),
    ("FedBackfill", "min_steps", -5, "at least 1"),
    ("FedBackfill", "max_steps", 3, "at least min_steps=10"),
    ("FedBackfill", "momentum", -1, "at least 0 and less than 1"),
    ("FedBackfill", "round_s", 0, "greater than zero"),
    ("FedBackfill", "exponent", -0.5, "zero or greater"),
    ("FedBackfillRounds", "grace", float("nan"), "zero or greater"),
    ("DiLoCo", "momentum", 1.0, "at least 0 and less than 1"),
    ("DiLoCo", "outer_lr", 0, "greater than zero"),
    ("StreamingDiLoCo", "outer_lr", float("inf"), "greater than zero"),
    ("AsyncDiLoCo", "staleness_exponent", -1, "zero or greater"),
    ("AsyncDiLoCo", "momentum", 1.5, "at least 0 and less than 1"),
    ("FedAvg", "sites_per_round", 0, "greater than zero"),
    ("FedAsync", "a", -1, "zero or greater"),
    ("FedBuff", "outer_lr", 0.0, "greater than zero"),
    ("FedCompass", "slack", 0, "greater than zero"),
    ("FedCompass", "min_steps", 0, "at least 1"),
    ("FedCompass", "momentum", 0, "greater than 0 and at most 1"),
    ("FedCompass", "alpha", 1.5, "greater than 0 and at most 1"),
    ("FedCompass", "a", -1, "zero or greater"),
    ("FedQueue", "q_init", -1, "zero or greater"),
    ("FedQueue", "timer", 0, "greater than zero"),
    ("FedQueue", "round_s", -1, "greater than zero"),
    ("FedQueue", "momentum", 0, "greater than 0 and at most 1"),
]

FILES = (Path(__file__).parents[3] / "conf" / "strategy").glob("*.yaml")
TARGETS = [str(OmegaConf.load(path)["_target_"]) for path in FILES]
OURS = {t.rpartition(".")[2]: t for t in TARGETS if t.startswith("strategies.")}


def refused(spec: dict[str, Any], key: str = "strategy") -> str:
    with pytest.raises(UserError) as caught:
        build_strategy(spec, key)
    return str(caught.value)


@pytest.mark.parametrize(("cls", "name", "value", "valid"), TYPES)
def test_a_wrong_type_is_named(cls: str, name: str, value: Any, valid: str) -> None:
    """Protects from a failure at the first aggregation, hours into the queue."""
    said = refused({"_target_": OURS[cls], name: value})
    assert re.match(rf"strategy\.{name}=.+ must be {re.escape(valid)}", said)


@pytest.mark.parametrize(("cls", "name", "value", "valid"), RANGES)
def test_a_value_out_of_range_is_named(cls: str, name: str, value: Any, valid: str) -> None:
    """Protects from powers of negative numbers and orders of no steps."""
    said = refused({"_target_": OURS[cls], name: value})
    assert f"{name}={value} must be {valid}" in said


@pytest.mark.parametrize("cls", ["AsyncDiLoCo", "DecoupledDiLoCo", "FedAsync", "FedBuff"])
def test_what_has_no_effect_is_refused(cls: str) -> None:
    """Protects from an option that changes nothing: these have weights of their own."""
    assert "weighted_by" in refused({"_target_": OURS[cls], "weighted_by": "uniform"})


def test_what_fits_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects whoever annotates as they like: only what is understood is looked at."""
    build_strategy(
        {"_target_": "strategies.fedbackfill.FedBackfill", "outer_lr": 1, "average": None}
    )
    monkeypatch.delitem(sys.modules, "own_options", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_options.py").write_text(OWN)
    spec = {"_target_": "own_options.Mine", "width": 3, "odd": "x", "deep": 1, "free": "y"}
    build_strategy({**spec, "none": None, "nested": {"_target_": "builtins.float"}})
    assert refused({**spec, "width": "x"}, "strategies.own").startswith("strategies.own.width=x")
    assert "strategy.quorum=x must be a whole number" in refused({**spec, "quorum": "x"})


class Stops(Scaffold):
    """Hands nothing on."""

    def __init__(self, mode: Literal[1, "x"] | None = None) -> None:
        super().__init__()


def test_only_parameters_that_are_passed_on_count() -> None:
    """Protects Python's own message for an argument that a subclass does not take."""
    module = f"{__name__}.Stops"
    assert "unexpected keyword" in refused({"_target_": module, "outer_lr": "abc"})
    assert "mode=y must be 1 or x or null" in refused({"_target_": module, "mode": "y"})
    assert issubclass(Stops, HpcStrategy)


COMMANDS = [
    (["strategy=scaffold", "strategy.outer_lr=abc"], "outer_lr=abc"),
    (["strategy=fedbackfill", "+strategy.min_steps=-5"], "min_steps=-5"),
    (["strategy=fedbackfill", "strategy.outer_lr=null"], "outer_lr=null"),
]


@pytest.mark.parametrize(("arguments", "found"), COMMANDS)
def test_a_dry_run_finds_them(
    arguments: list[str], found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects dry_run=true: what passes there does not fail for its options later."""
    assert run.main([*arguments, "dry_run=true"]) == 2
    _one_message(capsys.readouterr().err, found)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["strategy=scaffold", "strategies.scaffold.outer_lr=abc"], "strategies.scaffold.outer_lr"),
        (["strategy=fedbackfill", "strategies.fedbackfill.momentum=-1"], "momentum=-1"),
    ],
)
def test_a_simulation_finds_them(
    arguments: list[str],
    found: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Protects from a traceback of a process of the pool."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert simulate([*arguments, "scenario=calm", "seeds=1", f"out={tmp_path}"]) == 2
    _one_message(capsys.readouterr().err, found)


def _one_message(err: str, found: str) -> None:
    assert err.startswith("error: ")
    assert found in err
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("error")]) == 1
