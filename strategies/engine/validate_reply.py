"""What a reply is held to before a strategy sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Message

from flwr_hpc.protocol import GRADIENT, WEIGHT_KEY, Status
from strategies.engine import messages
from strategies.engine.state import Request

MOST = 1e15  # examples, tokens or steps of one order

Check = Callable[[Mapping[str, Any], Mapping[str, Any]], str | None]


def fault(
    work: Request,
    message: Message,
    arrays: object,
    status: Status | None,
    launcher: bool,
    check: Check | None,
) -> str | None:
    """Return what is wrong with the reply to a request, or None.

    Parameters
    ----------
    work : Request
    message : Message
    arrays : object
        The weights in it.
    status : Status or None
        Of a launcher's reply.
    launcher : bool
        Whether it comes from one.
    check : callable or None
        Compares arrays with those they are to look like; see `strategies.engine.runtime.Runtime`.
    """
    return (
        _claims(work, message, status)
        or _weights(work, arrays, launcher, check)
        or _gradient(work, message, check)
    )


def _claims(work: Request, message: Message, status: Status | None) -> str | None:
    """How much a reply claims to count is its weight: a number, not negative and not absurd."""
    records = message.content.metric_records.values()
    claims: list[Any] = [r[key] for r in records for key in (WEIGHT_KEY, "steps") if key in r]
    result = status.result if status else None
    if result is not None:
        claims += [result.examples, result.tokens, result.steps]
        if work.order is not None and 0 < work.order.steps < result.steps:
            return f"it claims {result.steps} steps of {work.order.steps}"
    for claim in claims:
        if not (isinstance(claim, int | float) and 0 <= claim <= MOST):
            return f"it claims to count {claim}"
    return None


def _weights(work: Request, arrays: object, launcher: bool, check: Check | None) -> str | None:
    if work.kind == "evaluate" or not (launcher or work.checked):
        return None
    if not isinstance(arrays, Mapping):
        return "no weights in the reply"
    if check is None:
        return None
    if work.base is None or work.order is None:
        return check(arrays, arrays)
    names = work.order.returns if launcher else None
    return check(messages.part_of(work.base, names), arrays)


def _gradient(work: Request, message: Message, check: Check | None) -> str | None:
    """A gradient has the names and shapes of the weights."""
    gradient = message.content.get(GRADIENT)
    if gradient is None or check is None or work.base is None:
        return None
    if not isinstance(gradient, Mapping):
        return "the gradient is not a record of arrays"
    return check(work.base, gradient)
