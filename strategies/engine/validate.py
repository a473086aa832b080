"""What a reply is held to before a strategy sees it, and a strategy's weights before they count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from inspect import isgenerator
from typing import Any

import numpy as np
from flwr.app import Array, Message, MetricRecord

from flwr_hpc.protocol import GRADIENT, WEIGHT_KEY, Status
from strategies.engine import messages
from strategies.engine.runtime import RunFailed
from strategies.engine.state import Request
from strategies.parts.blocks import Blocks, Lazy, Tensor, Tensors, as_is
from strategies.parts.rules import Record

MOST = 1e15  # examples, tokens or steps of one order

Check = Callable[[Mapping[str, Any], Mapping[str, Any]], str | None]

# What `aggregate`, `on_result`, `on_wake` and `merge` may return: pairs or a mapping.
NewWeights = Iterable[tuple[str, Lazy]] | Mapping[str, Any]
Shapes = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]


# ---- replies --------------------------------------------------------------------------------


def reply_fault(
    request: Request,
    message: Message,
    arrays: object,
    status: Status | None,
    launcher: bool,
    check: Check | None,
) -> str | None:
    """Return what is wrong with the reply to a request, or None.

    Parameters
    ----------
    request : Request
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
        _claims(request, message, status)
        or _weights(request, arrays, launcher, check)
        or _gradient(request, message, check)
    )


def _claims(request: Request, message: Message, status: Status | None) -> str | None:
    """How much a reply claims to count is its weight: a number, not negative and not absurd."""
    metrics = messages.records(message.content, MetricRecord).values()
    claims: list[Any] = [r[key] for r in metrics for key in (WEIGHT_KEY, "steps") if key in r]
    result = status.result if status else None
    if result is not None:
        claims += [result.examples, result.tokens, result.steps]
        if request.order is not None and result.order_id != request.order.id:
            return f"it is the result of order '{result.order_id[:100]}'"
        if request.order is not None and 0 < request.order.steps < result.steps:
            return f"it claims {result.steps} steps of {request.order.steps}"
    for claim in claims:
        if not (isinstance(claim, int | float) and 0 <= claim <= MOST):
            return f"it claims to count {claim}"
    return None


def _weights(request: Request, arrays: object, launcher: bool, check: Check | None) -> str | None:
    if request.kind == "evaluate" or not (launcher or request.plan.checked):
        return None
    if not isinstance(arrays, Mapping):
        return "no weights in the reply"
    if check is None:
        return None
    if request.base is None or request.order is None:
        return check(arrays, arrays)
    names = request.order.returns if launcher else None
    return check(messages.part_of(request.base, names), arrays)


def _gradient(request: Request, message: Message, check: Check | None) -> str | None:
    """A gradient has the names and shapes of the weights."""
    gradient = message.content.get(GRADIENT)
    if gradient is None or check is None or request.base is None:
        return None
    if not isinstance(gradient, Mapping):
        return "the gradient is not a record of arrays"
    return check(request.base, gradient)


# ---- new weights ----------------------------------------------------------------------------


def shapes_of(model: Record) -> Shapes:
    """Return shape and dtype of every tensor."""
    return {name: (tuple(array.shape), np.dtype(array.dtype)) for name, array in model.items()}


def check_version(new: NewWeights, model: Shapes, source: str) -> Tensors:
    """Yield new weights in the model's dtypes, one tensor at a time.

    Parameters
    ----------
    new : iterable of (name, tensor), or mapping
    model : mapping
        What they are to look like; see `shapes_of`.
    source : str
        Who made them, for the message.

    Raises
    ------
    RunFailed
        If a tensor is missing, unknown or comes twice, has another shape or is not finite.
    """
    seen: set[str] = set()
    for pair in new.items() if isinstance(new, Mapping) else new:
        name, tensor = _pair(pair, source)
        if name not in model:
            raise _refusal(source, f"it has '{name}', which the model has not", model)
        if name in seen:
            raise _refusal(source, f"it has '{name}' twice", model)
        seen.add(name)
        shape, dtype = model[name]
        opaque = dtype == np.uint8 and len(shape) == 1  # bytes, for example trees of XGBoost
        if tuple(tensor.shape) != shape and not opaque:
            wrong = f"has the shape {tuple(tensor.shape)}; the model's is {shape}"
            raise _refusal(source, f"{name} {wrong}", model)

        def checked(numbers: Tensor, name: str = name, dtype: Any = dtype) -> Tensor:
            wrong, cast = _cast(numbers, dtype)
            if wrong:
                raise _refusal(source, f"{name} {wrong}", model)
            return cast

        yield name, Blocks(checked, tensor) if isinstance(tensor, Blocks) else checked(tensor)
    if not seen and isgenerator(new):
        raise RunFailed(
            f"{source} yielded nothing. A function with `yield` in it is a generator and never "
            "None, whatever it returns: where it has no new weights, let it return None, and "
            "put the `yield` into a function of its own whose generator it returns"
        )
    if missing := [name for name in model if name not in seen]:
        raise _refusal(source, f"{missing[0]} is missing ({len(missing)} in all)", model)


def _pair(pair: Any, source: str) -> tuple[str, Lazy]:
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):
        raise RunFailed(
            f"{source} yielded a {type(pair).__name__}, not a pair of a name and a tensor. "
            "Yield `name, tensor` for every tensor of the model, or return a dict of them"
        )
    name, tensor = pair
    if isinstance(tensor, Blocks):
        return name, tensor
    return name, as_is(tensor) if isinstance(tensor, Array) else np.asarray(tensor)


def _cast(tensor: Tensor, dtype: np.dtype[Any]) -> tuple[str, Tensor]:
    """Return what is wrong with numbers, or nothing, and they in the model's dtype."""
    if not _finite(tensor):
        return "is not finite (NaN or infinity)", tensor
    if tensor.dtype == dtype:
        return "", tensor
    if dtype.kind in "iu" and tensor.dtype.kind == "f":
        tensor = np.rint(tensor)
    with np.errstate(over="ignore"):
        cast = tensor.astype(dtype)
    return "" if _finite(cast) else f"is too large for the model's {dtype}", cast


def _finite(tensor: Tensor) -> bool:
    return tensor.dtype.kind in "biu" or bool(np.isfinite(tensor).all())


def _refusal(source: str, wrong: str, model: Shapes) -> RunFailed:
    names = ", ".join(list(model)[:3]) + (", …" if len(model) > 3 else "")
    return RunFailed(
        f"{source} made weights that cannot be a version of the model: {wrong}. A version has "
        f"every tensor of the model ({len(model)}: {names}) in its shape, all values finite; "
        "the version before it stays the newest"
    )
