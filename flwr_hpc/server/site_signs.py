"""Whether a reply is lost, by what its site or the gate shows, long before the time is up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr_hpc.clock import Clock
from flwr_hpc.files import disk_trouble
from flwr_hpc.gate.credentials import read_credentials
from flwr_hpc.spool import Answering, Spool
from flwr_hpc.tracking.events import follow

LOOK_S = 2.0
ANSWERED_S = 120.0  # for a reply to travel, on a machine with much else to do
SILENT_S = 90.0  # a ClientApp writes every 5 s
UNBEGUN_S = 300.0  # for a ClientApp to start


@dataclass
class _Seen:
    """A site's last sign, and when it came on our clock."""

    record: Answering
    at: float


class SiteSigns:
    """Looks into the folders of the sites that can be seen from here.

    Parameters
    ----------
    sites : mapping of str to Path
        Folder of each facility's site.
    clock : Clock
    """

    def __init__(self, sites: Mapping[str, Path], clock: Clock) -> None:
        self._roots, self._clock = dict(sites), clock
        self._seen: dict[str, _Seen] = {}
        self._looked_at: dict[str, float] = {}

    def lost(self, facility: str, message_id: str, sent_at: float) -> str:
        """Say why the reply to a message will not come; empty: it may, or nobody can tell."""
        seen, now = self._look(facility), self._clock.now()
        if seen is None:
            return ""
        silent_s = now - seen.at
        if seen.record.message != message_id:
            if min(silent_s, now - sent_at) > UNBEGUN_S:
                return self._unless_full(facility, f"no ClientApp began in {UNBEGUN_S:.0f} s")
        elif seen.record.answered:
            if silent_s > ANSWERED_S:
                return f"the site answered {silent_s:.0f} s ago, and the reply was lost"
        elif silent_s > SILENT_S:
            words = f"its ClientApp died, or hangs: no sign of life for {silent_s:.0f} s"
            return self._unless_full(facility, words)
        return ""

    def _look(self, facility: str) -> _Seen | None:
        now = self._clock.now()
        seen = self._seen.get(facility)
        if facility not in self._roots or now - self._looked_at.get(facility, -LOOK_S) < LOOK_S:
            return seen
        self._looked_at[facility] = now
        try:
            record = Spool(self._roots[facility]).answering.read()
        except (OSError, ValueError):  # the file system is away for a moment
            return None
        if record is not None and (seen is None or seen.record != record):
            seen = self._seen[facility] = _Seen(record, now)
        return seen

    def _unless_full(self, facility: str, words: str) -> str:
        """A site that cannot write gives no sign."""
        try:
            return "" if disk_trouble(self._roots[facility]) else words
        except OSError:
            return ""


class SuperNodeStarts:
    """Which SuperNodes of joined sites began anew; Flower calls them what it called those before.

    Parameters
    ----------
    events : Path
        Of the run, where the gate reports.
    credentials : Path
        Which node each site is.
    """

    def __init__(self, events: Path, credentials: Path) -> None:
        self._events, self._credentials = follow(events), credentials
        self._events.poll()  # nothing was sent yet to those that have started by now

    def nodes(self) -> set[int]:
        """Return those that have started since the last call."""
        try:
            started = [e for e in self._events.poll() if e["event"] == "supernode_started"]
            sites = {str(e.get("facility")) for e in started}
            known = read_credentials(self._credentials) if sites else {}
        except (OSError, ValueError):  # the file system is away for a moment: then time tells
            return set()
        return {credential.node_id for site, credential in known.items() if site in sites}
