"""How far each payload is on its way, how fast it goes, and what had to be sent again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from flwr_hpc.clock import Clock
from flwr_hpc.exchange.store import Reference

EVERY_S = 5.0  # between two reports of one payload
LEAST_BYTES = 1_000_000  # a smaller payload is there before anybody looks
MOST_MOVES = 64  # remembered; the oldest is forgotten, and counted anew if it goes on

Way = Literal["to_site", "from_site"]


@dataclass
class Move:
    """One payload on its way between the server and a site."""

    site: str  # its folder
    way: Way
    sha256: str
    total: int
    bytes: int = 0  # over the line so far: above `total` when a cut had some sent again
    moved: int = 0  # of these, what this server has moved
    seconds: float = 0.0  # in which at least one request for it was open
    requests: int = 0  # open now
    since: float = 0.0
    reported_at: float = 0.0

    @property
    def done(self) -> bool:
        """Whether all of it has been sent, so far as the sender can tell."""
        return self.bytes >= self.total


class Meter:
    """Counts what the requests of an exchange move; for one thread.

    Parameters
    ----------
    report : callable
        Called now and then with a `Move`, and at its end.
    clock : Clock
    """

    def __init__(self, report: Callable[[Move], object], clock: Clock) -> None:
        self._report, self._clock = report, clock
        self._moves: dict[tuple[str, Way, str], Move] = {}

    @contextmanager
    def request(
        self, site: str, way: Way, ref: Reference, begins_at: int
    ) -> Iterator[Callable[[int], None]]:
        """Yield what counts a request's bytes; `begins_at` had come before this server began."""
        key, now = (site, way, ref.sha256), self._clock.now()
        new = Move(site, way, ref.sha256, ref.bytes, begins_at, reported_at=now)
        move = self._moves.setdefault(key, new)
        while len(self._moves) > MOST_MOVES:
            del self._moves[next(iter(self._moves))]
        if not move.requests:
            move.since = now
        move.requests += 1
        try:
            yield lambda count: self._count(move, count)
        finally:
            self._pause(move)
            if move.done and not move.requests and self._moves.get(key) is move:
                del self._moves[key]

    def _count(self, move: Move, count: int) -> None:
        move.bytes += count
        move.moved += count
        now = self._clock.now()
        if not move.done and now - move.reported_at >= EVERY_S:
            self._tell(move, now)

    def _pause(self, move: Move) -> None:
        move.requests -= 1
        if not move.requests:
            now = self._clock.now()
            move.seconds += now - move.since
            move.since = now
            if move.done:
                self._tell(move, now)

    def _tell(self, move: Move, now: float) -> None:
        if move.total < LEAST_BYTES:
            return
        if move.requests:
            move.seconds, move.since = move.seconds + now - move.since, now
        move.reported_at = now
        self._report(move)
