"""What the live view shows beside the events of a run.

Progress of running orders, read from the spools: sites report it too, but only as often as they
answer a message. And what only the driver can see: a disk that is full, and ClientApps that die
before a line of ours runs in them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from flwr_hpc.clock import Clock, SystemClock
from flwr_hpc.files import disk_trouble
from flwr_hpc.spool import Spool
from flwr_hpc.tracking.events import Event

EVERY_S = 1.0
DISK_EVERY_S = 15.0
# What a SuperNode logs of a ClientApp whose token has expired before it asked for its message.
EXPIRED = re.compile(rb"/runtime/pull-task-input.*(authentication failed|401)")


class SpoolProgress:
    """Looks at the newest allocation of each facility about once a second.

    Parameters
    ----------
    sites : mapping of str to Path
        Folder of each facility's site.
    clock : Clock or None
    """

    def __init__(self, sites: Mapping[str, Path], clock: Clock | None = None) -> None:
        self._spools = {facility: Spool(root) for facility, root in sites.items()}
        self._clock = clock or SystemClock()
        self._next = self._clock.now()
        self._last: dict[str, tuple[str, int]] = {}

    @property
    def sites(self) -> list[str]:
        """The facilities."""
        return list(self._spools)

    def poll(self) -> list[Event]:
        """Return an ``order_progress`` for every order that has got on."""
        if self._clock.now() < self._next:
            return []
        self._next = self._clock.now() + EVERY_S
        found = [self._look(facility, spool) for facility, spool in self._spools.items()]
        return [event for event in found if event is not None]

    def _look(self, facility: str, spool: Spool) -> Event | None:
        try:
            allocations = spool.allocations()
            state = allocations[-1].state() if allocations else None
            order_id = state.order_id if state and state.state == "running" else ""
            progress = spool.order(order_id).progress() if order_id else {}
        except (OSError, ValueError):
            return None  # the file system is away for a moment
        now = (order_id, int(progress.get("step", 0)))
        if not progress or self._last.get(facility) == now:
            return None
        self._last[facility] = now
        return {"event": "order_progress", "facility": facility, "order_id": order_id, **progress}


class DiskWatch:
    """Tries now and then; tells what is new.

    Parameters
    ----------
    folder : Path
    clock : Clock or None
    """

    def __init__(self, folder: Path, clock: Clock | None = None) -> None:
        self._folder, self._clock = folder, clock or SystemClock()
        self._next, self._trouble = self._clock.now(), ""

    def poll(self) -> str:
        """Return what to tell the user, if anything."""
        now = self._clock.now()
        if now < self._next:
            return ""
        self._next = now + DISK_EVERY_S
        before = self._trouble
        with suppress(OSError):  # away for a moment: nothing is learnt by this look
            self._trouble = disk_trouble(self._folder)
        if self._trouble == before:
            return ""
        return self._trouble or f"{self._folder} can be written again"


class SlowStarts:
    """Counts the ClientApps that took longer to start than Flower waits for them.

    Parameters
    ----------
    logs : mapping of str to Path
        Of each facility's SuperNode.
    """

    def __init__(self, logs: Mapping[str, Path]) -> None:
        self._logs = dict(logs)
        self._read = {facility: _size(path) for facility, path in self._logs.items()}
        self._count = dict.fromkeys(self._logs, 0)

    def poll(self) -> list[Event]:
        """Return a ``client_app_lost`` for what is new, each time that it has doubled."""
        return [event for facility in self._logs if (event := self._look(facility))]

    def _look(self, facility: str) -> Event | None:
        path, before = self._logs[facility], self._count[facility]
        if _size(path) <= self._read[facility]:
            return None
        with open(path, "rb") as log:
            log.seek(self._read[facility])
            lines = log.read().rpartition(b"\n")[0]
        self._read[facility] += len(lines) + bool(lines)
        count = self._count[facility] = before + len(EXPIRED.findall(lines))
        if count.bit_length() == before.bit_length():
            return None
        reason = (
            f"ClientApps took longer to start than Flower waits for them, 30 s ({count} so far): "
            "this machine is too busy. Flower starts them again"
        )
        return {"event": "client_app_lost", "facility": facility, "count": count, "reason": reason}


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
