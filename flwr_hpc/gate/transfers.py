"""What the gate sees of the run's sites, in the run's events: transfers, starts of SuperNodes."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from flwr_hpc.exchange.http_server.meter import Move
from flwr_hpc.gate.credentials import Guests
from flwr_hpc.tracking.events import EventLog

MB = 1_000_000


class TransferReport:
    """Writes a ``transfer`` for what has got on; may be called from any thread.

    Parameters
    ----------
    events : Path
        Of the run; other processes write there, too.
    guests : Guests
        Know which site a folder of the exchange is.
    """

    def __init__(self, events: Path, guests: Guests) -> None:
        self._events, self._guests = events, guests

    def __call__(self, move: Move) -> None:
        """Report how far a payload is."""
        again = max(0, move.bytes - move.total)
        with suppress(OSError), EventLog(self._events, join=True) as log:
            log.emit(
                "transfer",
                facility=self._guests.site_of_folder(move.site),
                way=move.way,
                payload=move.sha256[:12],
                bytes=move.bytes - again,
                total=move.total,
                again=again,  # sent a second time after a cut
                seconds=round(move.seconds, 3),
                mb_per_s=round(move.moved / MB / max(move.seconds, 1e-6), 3),
            )


def report_start(events: Path, site: str) -> None:
    """Write a ``supernode_started``: what the one before it held is lost."""
    with suppress(OSError), EventLog(events, join=True) as log:
        log.emit("supernode_started", facility=site)
