"""The one exception for everything a user can cause and fix, and the commands' exit codes."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """A mistake the user can fix; shown as one message without a traceback, exit code 2.

    The message says what was wrong, what was found, the valid choices and, where there is
    one, the corrected command.
    """


def exit_code(run: Callable[[], int]) -> int:
    """Return what `run` returns, 2 for a user's mistake, 1 for a failing disk, 130 for Ctrl-C.

    An error is one message on stderr.
    """
    try:
        return run()
    except UserError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except OSError as exc:  # a full or vanished file system
        print(f"error: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def closest(word: str, choices: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest of `choices`, or an empty string."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


def one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of `choices`."""
    if value not in choices:
        hint = closest(value, choices)
        raise UserError(f"{key}={value} is not known.{hint} Valid: {', '.join(choices)}.")


def positive(key: str, value: float) -> None:
    """Refuse a value that is not a finite number above zero."""
    if not 0 < value < math.inf:
        raise UserError(f"{key}={value} must be greater than zero")


def not_negative(key: str, value: float) -> None:
    """Refuse a value that is not zero or a finite number above it."""
    if not 0 <= value < math.inf:
        raise UserError(f"{key}={value} must be zero or greater")


def within(key: str, value: float, interval: str) -> None:
    """Refuse a value outside an interval written as in mathematics, e.g. ``[0, 1)``."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    inside = low < value < high
    inside |= (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")
    if not inside:
        ends = f"{low:g}{'' if interval[0] == '[' else ' (exclusive)'}"
        ends += f" and {high:g}{'' if interval[-1] == ']' else ' (exclusive)'}"
        raise UserError(f"{key}={value} must lie between {ends}")
