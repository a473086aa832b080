"""What a site learns of its server while it works: there, away, or no longer letting it in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr_hpc.clock import Clock, SystemClock
from flwr_hpc.config.invitation import check_versions
from flwr_hpc.join.server_door import Away

ASK_S = 60.0  # between two questions
DOUBT_S = 5.0  # at least, where there is a reason to ask sooner


class ServerWatch:
    """Asks the server now and then, and tells the site's people what is new.

    Parameters
    ----------
    ask : callable
        Returns what the server says; raises `Away`, or a UserError if this site is out.
    at_rest : callable
        Returns what was spent, in words, once none of the site's jobs is left; else nothing.
    say : callable
    clock : Clock or None
    """

    def __init__(
        self,
        ask: Callable[[], dict[str, Any]],
        at_rest: Callable[[], str],
        say: Callable[[str], object],
        clock: Clock | None = None,
    ) -> None:
        self._ask, self._at_rest, self._say = ask, at_rest, say
        self._clock = clock or SystemClock()
        self._asked_at = self._clock.now()
        self._doubts = False
        self._away_at: float | None = None
        self._rests = False  # and that was told

    def poll(self, in_doubt: bool = False) -> None:
        """Ask if it is time to; `in_doubt`: the SuperNode has ended, which may be the server's no.

        Raises
        ------
        UserError
            If the server does not let this site in any more.
        """
        now, self._doubts = self._clock.now(), self._doubts or in_doubt
        if now - self._asked_at < (DOUBT_S if self._doubts else ASK_S):
            return
        self._asked_at, self._doubts = now, False
        try:
            check_versions(self._ask()["versions"])
        except Away as exc:
            self._is_away(now, str(exc))
            return
        if self._away_at is not None:
            self._say(f"the server is back after {(now - self._away_at) / 60:.0f} min")
            self._away_at, self._rests = None, False

    def _is_away(self, now: float, reason: str) -> None:
        if self._away_at is None:
            self._away_at = now
            self._say(
                f"the server cannot be reached ({reason}). What is at work goes on, its result is "
                "kept for the server, and jobs without work end (allocation.idle_timeout_s)"
            )
        if not self._rests and (words := self._at_rest()):
            self._rests = True
            self._say(f"no job is left while the server is away: {words}")
