"""A server and the way to it, as the doctor of an invitation finds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flwr_hpc import __version__
from flwr_hpc.config.invitation import FORMAT, Invitation
from flwr_hpc.doctor.door import Door, Rates
from flwr_hpc.join.server_door import Answer

VERSIONS = {"flwr_hpc": __version__, "flwr": "1.41.0", "python": "3.12.1", "torch": "2.6"}
INVITATION = Invitation(
    format=FORMAT, site="lumi", address="vm.example.org:8443", certificate="PEM", token="secret",
    private_key="KEY", run_key="r1", sites=["lumi"], versions=VERSIONS, run={},
)  # fmt: skip


class FakeDoor(Door):
    """All is well until a test says otherwise."""

    def __init__(self) -> None:
        super().__init__(INVITATION)
        self.env: dict[str, str] = {}
        self.url = ""
        self.error: Exception | None = None
        self.status = 200
        self.says: dict[str, Any] = {
            "run_key": "r1", "site": "lumi", "folder": "node-7", "heard_s": None,
            "versions": VERSIONS,
        }  # fmt: skip
        self.ahead_s: float | None = 0.3
        self.installed = dict(VERSIONS)
        self.speed: Rates | Exception = Rates(20.0, 40.0)

    def environment(self) -> Mapping[str, str]:
        return self.env

    def proxy(self) -> str:
        return self.url

    def knock(self) -> Answer:
        if self.error:
            raise self.error
        return Answer(self.status, json.dumps(self.says).encode(), self.ahead_s)

    def versions(self) -> dict[str, str]:
        return self.installed

    def rates(self, folder: str) -> Rates:
        assert folder == "node-7"
        if isinstance(self.speed, Exception):
            raise self.speed
        return self.speed
