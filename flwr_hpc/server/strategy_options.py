"""The arguments of a strategy of ours against the annotations of its ``__init__``."""

from __future__ import annotations

import inspect
import json
import pkgutil
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from flwr_hpc.errors import UserError, closest
from strategies import HpcStrategy

KINDS: dict[Any, tuple[str, Any]] = {  # what a type is called, and an example of it
    int: ("a whole number", 1),
    float: ("a number", 1.0),
    bool: ("true or false", True),
    str: ("a text", "name"),
    NoneType: ("null", None),
}


def check_options(spec: Mapping[str, Any], key: str = "strategy") -> None:
    """Refuse arguments whose type is not that of the parameter.

    Only subclasses of `HpcStrategy` are looked at, and of their parameters those annotated
    with numbers, bool, str, Literal, None and unions of them.

    Parameters
    ----------
    spec : mapping
        ``_target_`` and keyword arguments.
    key : str
        Where the configuration has them, for the message.
    """
    try:
        cls = pkgutil.resolve_name(str(spec.get("_target_")))
    except Exception:  # whatever a module of the user's raises: making the strategy explains it
        return
    if not (isinstance(cls, type) and issubclass(cls, HpcStrategy)):
        return
    parameters = _parameters(cls)
    for name, value in spec.items():
        made = isinstance(value, dict) and "_target_" in value  # an object, by Hydra
        if name in parameters and not made:
            _check(f"{key}.{name}", value, *parameters[name])


def _check(key: str, value: Any, hint: Any, default: Any) -> None:
    allowed = _allowed(hint)
    if allowed is None or _same(value, default) or any(_fits(value, one) for one in allowed):
        return
    words = [_words(one) for one in allowed]
    example = next((_example(one) for one in allowed if one is not NoneType), "null")
    if isinstance(default, int | float | str):
        example = _shown(default)
    near = closest(str(value), [word for word in words if word.isidentifier()])
    valid = " or ".join(words)
    raise UserError(f"{key}={_shown(value)} must be {valid}, e.g. {key}={example}.{near}")


def _parameters(cls: type) -> dict[str, tuple[Any, Any]]:
    """Return annotation and default by name, up the bases as far as ``**kwargs`` hands on."""
    found: dict[str, tuple[Any, Any]] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        init = inspect.unwrap(vars(base)["__init__"])
        parameters = inspect.signature(init).parameters.values()
        for p in parameters:
            found.setdefault(p.name, (_hint(init, p.annotation), p.default))
        if base is HpcStrategy or all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return found


def _hint(init: Callable[..., Any], annotation: Any) -> Any:
    """Return an annotation, which may be a string, as a type; Any if it has none."""

    def holder() -> None: ...

    holder.__annotations__ = {"hint": annotation}
    try:
        return get_type_hints(holder, globalns=getattr(init, "__globals__", {}))["hint"]
    except Exception:  # e.g. a name that is imported for type checkers only
        return Any


def _allowed(hint: Any) -> list[Any] | None:
    """Return the alternatives of an annotation, a Literal's as (value,); None: not known."""
    if get_origin(hint) is Literal:
        return [(choice,) for choice in get_args(hint)]
    if get_origin(hint) in (Union, UnionType):
        parts = [_allowed(one) for one in get_args(hint)]
        return None if None in parts else [one for part in parts for one in part or ()]
    return [hint] if isinstance(hint, type) and hint in KINDS else None


def _fits(value: Any, allowed: Any) -> bool:
    if isinstance(allowed, tuple):
        return _same(value, allowed[0])
    if allowed in (int, float):  # a bool is an int to Python, and an int no float
        return isinstance(value, int | allowed) and not isinstance(value, bool)
    return isinstance(value, allowed)


def _same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and bool(value == other)


def _words(allowed: Any) -> str:
    return _shown(allowed[0]) if isinstance(allowed, tuple) else KINDS[allowed][0]


def _example(allowed: Any) -> str:
    return _shown(allowed[0] if isinstance(allowed, tuple) else KINDS[allowed][1])


def _shown(value: Any) -> str:
    """Return a value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
