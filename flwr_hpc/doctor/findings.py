"""What a check says, and the lists of checks: to add one is to write one function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

NEEDS = "needs: "  # begins what is told of a check that another one stopped
Status = Literal["pass", "warn", "fail", "skipped"]
Context = TypeVar("Context")


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    status: Status  # ``pass``, ``warn`` (runs go on, but not as well), ``fail`` or ``skipped``
    observed: str  # What there is, in the system's own words where it has some
    fix: str = ""  # What to do about it; empty when there is nothing to do
    name: str = ""  # Set by `Checks.run`
    where: str = ""


def passed(found: str) -> Finding:
    """Return a finding that all is well."""
    return Finding("pass", found)


def warned(found: str, fix: str) -> Finding:
    """Return a finding that does not stop a run."""
    return Finding("warn", found, fix)


def failed(found: str, fix: str) -> Finding:
    """Return a finding that stops a run."""
    return Finding("fail", found, fix)


def skipped(found: str) -> Finding:
    """Return why there is nothing to say."""
    return Finding("skipped", found)


class Checks(Generic[Context]):
    """An ordered list of checks; to be used as a decorator.

    Parameters
    ----------
    where : str
        Where these checks look, e.g. ``login node``.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._checks: list[tuple[str, tuple[str, ...], Callable[[Context], Finding]]] = []

    def __call__(
        self, name: str, needs: Iterable[str] = ()
    ) -> Callable[[Callable[[Context], Finding]], Callable[[Context], Finding]]:
        """Add a check that is skipped unless those it `needs` passed."""

        def add(check: Callable[[Context], Finding]) -> Callable[[Context], Finding]:
            self._checks.append((name, tuple(needs), check))
            return check

        return add

    def run(self, context: Context, before: Iterable[Finding] = ()) -> list[Finding]:
        """Make all checks in order; those in `before` count for what a check needs."""
        good = {f.name for f in before if f.status in ("pass", "warn")}
        findings = []
        for name, needs, check in self._checks:
            unmet = [need for need in needs if need not in good]
            found = skipped(NEEDS + ", ".join(unmet)) if unmet else _made(check, context)
            findings.append(replace(found, name=name, where=self.where))
            if found.status in ("pass", "warn"):
                good.add(name)
        return findings


def _made(check: Callable[[Context], Finding], context: Context) -> Finding:
    """Make one check; one that breaks must not keep the others from being made."""
    try:
        return check(context)
    except Exception as exc:
        return failed(f"this could not be checked: {type(exc).__name__}: {exc}", "")
