"""When a successor is submitted: the rule, as pure functions."""

from __future__ import annotations

import pytest

from flwr_hpc.config.schema import AllocationConfig
from flwr_hpc.site.renewal import lead_s, next_successor_in_s, preparing_s

HOUR = 3600.0


@pytest.mark.parametrize(
    ("ahead", "wait", "preparing", "lead"),
    [
        ("forecast", None, None, 60.0),
        ("forecast", 0.0, 10.0, 60.0),
        ("forecast", 600.0, 100.0, 700.0),
        ("forecast", 5000.0, 100.0, 5100.0),
        ("forecast", None, HOUR, 0.25 * HOUR),
        ("00:30:00", 600.0, 100.0, 1800.0),
        ("off", 600.0, 100.0, None),
    ],
)
def test_lead(ahead: str, wait: float | None, preparing: float | None, lead: float | None) -> None:
    """Protects the moment of the submission: the expected start meets the end."""
    assert lead_s(AllocationConfig(renew_ahead=ahead), HOUR, wait, preparing) == lead
    config = AllocationConfig(policy="per_round", renew_ahead=ahead)
    assert lead_s(config, HOUR, wait, preparing) is None


def test_preparing_is_measured() -> None:
    """Protects the lead from one slow start, and from allocations that never got that far."""
    ledgers = [{"queue": 9.0}, *({"startup": s, "load": 10.0} for s in (5.0, 500.0, 7.0))]
    assert preparing_s(ledgers) == 17.0
    assert preparing_s([]) is None


@pytest.mark.parametrize(
    ("lead", "left_s", "starts_in_s", "due_in_s"),
    [
        (600.0, HOUR, [], 3000.0),
        (600.0, 600.0, [], 0.0),
        (600.0, 0.0, [0.0], 3000.0),  # one waits, and it lasts longer than the lead
        (3 * HOUR, HOUR, [], 0.25 * HOUR),  # a part of a walltime is used in any case
        (3 * HOUR, 0.5 * HOUR, [], 0.0),
        (3 * HOUR, 0.5 * HOUR, [3 * HOUR], HOUR),  # the next when that one is a walltime nearer
        (3 * HOUR, None, [2 * HOUR], 0.0),  # none runs: the first in the queue is no successor
        (3 * HOUR, None, [HOUR, 2 * HOUR], 0.0),
        (3 * HOUR, None, [0.5 * HOUR, 1.5 * HOUR, 2.5 * HOUR], 0.5 * HOUR),
        (3 * HOUR, None, [0.0, 0.0, 0.0, 0.0], None),  # three at most
        (3 * HOUR, 60.0, [0.0, 0.0, 0.0], None),
        (None, 60.0, [], None),
        (600.0, None, [], None),  # nothing is to be succeeded
    ],
)
def test_next_successor(
    lead: float | None, left_s: float | None, starts_in_s: list[float], due_in_s: float | None
) -> None:
    """Protects the chain where waits exceed walltimes: each is to start as another ends."""
    config = AllocationConfig()
    assert next_successor_in_s(config, HOUR, lead, left_s, starts_in_s) == due_in_s
