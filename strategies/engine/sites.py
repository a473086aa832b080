"""Which node speaks for which site: they come, go, and come back as other nodes."""

from __future__ import annotations

import logging
from collections.abc import Callable

from flwr.app import Message

from flwr_hpc.protocol import DESCRIBE
from strategies.engine import messages
from strategies.engine.runtime import Runtime
from strategies.engine.state import Memory, SiteState

TURNED_AWAY_S = 600.0

log = logging.getLogger("strategies")


class SiteRegistry:
    """Asks every new node what it is and keeps the facilities' newest nodes.

    Parameters
    ----------
    moved : callable
        ``moved(facility, old node)``: told when a facility speaks through another node.

    Attributes
    ----------
    sites : dict of str to SiteState
        By facility.
    facility_of : dict of int to str
        Of every node that was ever described.
    num_reachable : int
        Sites that are online or were so within the grace, by the last roll call.
    """

    def __init__(self, runtime: Runtime, memory: Memory, moved: Callable[[str, int], None]) -> None:
        self.sites: dict[str, SiteState] = {}
        self.facility_of: dict[int, str] = {}
        self.num_reachable = 0
        self._runtime = runtime
        self._memory = memory
        self._moved = moved
        self._ask_after: dict[int, float] = {}
        self._failures: dict[int, int] = {}

    def roll_call(self, online: set[int]) -> None:
        """Note who comes and goes."""
        now, grace_s = self._runtime.clock.now(), self._runtime.settings.offline_grace_s
        reachable = 0
        for facility, site in sorted(self.sites.items()):
            if site.node_id not in online:
                self._rebind(site, online)
            is_online = site.node_id in online
            if site.online != is_online:
                site.offline_since = None if is_online else now
                if not site.refusal:
                    event = "site_online" if is_online else "site_offline"
                    self._runtime.emit(event, facility=facility)
            reachable += not site.refusal and (is_online or site.reachable(now, grace_s))
        self.num_reachable = reachable

    def question(self, node_id: int) -> Message | None:
        """Return what an unknown node is asked now, if anything."""
        if self._runtime.clock.now() < self._ask_after.get(node_id, 0.0):
            return None
        return messages.query(DESCRIBE, node_id, self._runtime.settings.ttl_s)

    def described(self, node_id: int, reply: Message) -> None:
        """Take a node's answer: a launcher names its facility, an ordinary ClientApp fails."""
        status = messages.read_status(reply)
        if status is not None and status.facility:
            self._admit(status.facility, True, node_id)
            if status.versions:
                versions = {k[:40]: v[:40] for k, v in sorted(status.versions.items())[:10]}
                self._runtime.emit("site_versions", facility=status.facility, versions=versions)
            return
        failures = self._failures[node_id] = self._failures.get(node_id, 0) + 1
        settings = self._runtime.settings
        if reply.has_error() and failures <= settings.retries and not _no_handler(reply):
            self._ask_after[node_id] = self._runtime.clock.now() + settings.retry_delay_s
            return
        self._admit(f"node-{node_id}", False, node_id)

    def _admit(self, facility: str, launcher: bool, node_id: int) -> None:
        """Welcome a node, unless it poses as another site: that one waits, and it is told."""
        if self._runtime.may_speak_for(node_id, facility):
            self._welcome(facility, launcher, node_id)
            return
        self._ask_after[node_id] = self._runtime.clock.now() + TURNED_AWAY_S
        reason = f"node {node_id} says that it is {facility}, which is not what it was invited as"
        log.warning("%s", reason)
        self._runtime.emit("site_refused", facility=facility, reason=reason)

    def _welcome(self, facility: str, launcher: bool, node_id: int) -> None:
        self.facility_of[node_id] = facility
        site = self.sites.get(facility)
        if site is None:
            evaluated = self._memory.evaluated.get(facility, -1)
            self.sites[facility] = SiteState(facility, launcher, node_id, evaluated=evaluated)
            self.num_reachable += 1
            self._runtime.emit("site_online", facility=facility)
        elif site.node_id != node_id:
            log.info("%s: its SuperNode is back as another node", facility)
            self._move(site, node_id)

    def _rebind(self, site: SiteState, online: set[int]) -> None:
        """Move to another node of the same facility, if one is online."""
        for node_id in sorted(online, reverse=True):
            if self.facility_of.get(node_id) == site.facility:
                self._move(site, node_id)
                return

    def take_back(self, node_id: int) -> None:
        """Count again on a site that was left out, now that it was started anew."""
        site = self.sites.get(self.facility_of.get(node_id, ""))
        if site is None:
            return
        if site.refusal and site.online:  # else the roll call will tell
            self._runtime.emit("site_online", facility=site.facility)
        site.refusal = ""

    def _move(self, site: SiteState, node_id: int) -> None:
        old, site.node_id = site.node_id, node_id
        self.take_back(node_id)
        self._moved(site.facility, old)


def _no_handler(reply: Message) -> bool:
    """Return whether a ClientApp says that it knows no such message."""
    return "registered" in (reply.error.reason or "")
