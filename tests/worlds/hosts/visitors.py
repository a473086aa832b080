"""Who comes to a host's ports without belonging there, and what is answered."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from lab.place import STRANGER
from lab.remote import Host, Listener

Requests = Sequence[tuple[str, str, dict[str, str]]]
Address = tuple[str, str, int]  # with http or https

LOOPBACK = "127.0.0.1"
KNOCK = (sys.executable, "-I", str(Path(__file__).with_name("knock.py")))
FLOWER = ("/v1/control/start-run", "/v1/runtime/pull-app-inputs", "/v1/fleet/pull-messages", "/")
EVERYTHING: Requests = [
    *(("POST", path, {}) for path in FLOWER),
    *(("GET", path, {}) for path in ("/v1/exchange/own", "/v1/join")),
]
# What that is answered by a public socket, and by one for processes of its user.
PUBLIC, PRIVATE = [404, 404, 401, 404, 401, 401], [403] * 6


def knock(
    host: Host, where: Address, requests: Requests, user: str = STRANGER, wait_s: float = 120.0
) -> list[int]:
    """Return what a user of a host is answered."""
    found = host.run(*KNOCK, *map(str, (*where, wait_s)), user=user, stdin=json.dumps(requests))
    statuses: list[int] = json.loads(found)
    return statuses


class Opened:
    """What hosts listen at, beyond what they did before."""

    def __init__(self, hosts: Iterable[Host]) -> None:
        self._before = {host.name: (host, set(host.listening())) for host in hosts}

    def now(self) -> dict[str, set[Listener]]:
        """Return it by host."""
        return {n: set(h.listening()) - before for n, (h, before) in self._before.items()}
