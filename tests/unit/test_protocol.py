"""What a site says of itself: every field of its type, or it is not read."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import pytest

from flwr_hpc import protocol
from flwr_hpc.protocol import Forecast, Result, Status, read_status, to_json

WHOLE = Status(
    "done",
    "leonardo",
    "run-leonardo-000001",
    allocation="a0001",
    walltime_left_s=3600,
    queue_wait_s=1.5,
    loss=2.5,
    result=Result(
        "run-leonardo-000001", "done", 10, 100, 40, {"train_loss": 1.0}, files={"a": "b"}
    ),
    ledger={"a0001": {"train": 1.5}},
    jobs={"a0001": {"id": "7", "nodes": 1, "outcome": None}},
    forecast=Forecast(1.0, 2.0),
)


def test_what_a_site_writes_is_read_as_it_was():
    """Nested records included, and what a newer version adds is ignored."""
    assert read_status(to_json(WHOLE)) == WHOLE
    assert read_status(json.dumps({**dataclasses.asdict(WHOLE), "new": 1})) == WHOLE


@pytest.mark.parametrize(
    "change",
    [
        {"state": "asleep"},
        {"state": ["done"]},
        {"facility": 3},
        {"walltime_left_s": "soon"},
        {"walltime_left_s": True},
        {"step": 1.5},
        {"step": 10**400},
        {"loss": math.nan},
        {"loss": -math.inf},
        {"queued_s": 1e308},
        {"fatal": 1},
        {"ledger": {"a": {"train": "long"}}},
        {"ledger": []},
        {"jobs": {"a": "b"}},
        {"jobs": {"a": {"nodes": [math.inf]}}},
        {"result": 5},
        {"result": {"order_id": "x"}},
        {"result": {"order_id": "x", "state": "done", "metrics": {"loss": math.nan}}},
        {"result": {"order_id": "x", "state": "done", "files": {"config.json": {}}}},
        {"forecast": {"quantile": None}},
    ],
    ids=lambda change: str(change)[:60],
)
def test_a_field_of_another_type_is_refused(change):
    """Each of them would end the run where it is calculated with, or saved."""
    text = json.dumps({**dataclasses.asdict(WHOLE), **change})
    with pytest.raises(ValueError, match=r"^status\.|^not a Result"):
        read_status(text)


@pytest.mark.parametrize(
    "text", ["", "3", "[]", "null", "{}", "{", "[" * 100_000, '{"state": ' + "[" * 100_000]
)
def test_what_is_no_status_is_refused(text):
    """However deeply it is nested."""
    with pytest.raises(ValueError, match=r"xpect|nested|not a Status"):
        read_status(text)


def test_a_status_that_is_too_long_is_not_parsed(monkeypatch):
    """A tokenizer's files fit; a site must not fill the server's memory twice over."""
    monkeypatch.setattr(protocol, "MAX_STATUS", 100)
    with pytest.raises(ValueError, match="characters"):
        read_status(to_json(WHOLE))


def test_random_changes_are_refused_or_right():
    """1,000 of them: whatever is read has the types it should have."""
    odd = [0, -1, 1.5, "x", None, True, [], {}, [[]], {"a": {}}, 10**400, 1e999, {"b": 1e999}]
    for seed in range(1000):
        rng, raw = random.Random(seed), dataclasses.asdict(WHOLE)
        for _ in range(rng.choice([1, 2])):
            target = rng.choice([raw, raw, raw["result"], raw["forecast"], raw["jobs"]])
            if isinstance(target, dict) and target:
                target[rng.choice(sorted(target))] = rng.choice(odd)
        try:
            status = read_status(json.dumps(raw))
        except ValueError:
            continue
        again = read_status(to_json(status))  # which no NaN survives
        assert again == status, seed
