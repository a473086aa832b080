"""A site behind SSH whose Python has another flwr-hpc: said, or mended where that is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from flwr_hpc import __version__
from flwr_hpc.config.compose import compose_config
from flwr_hpc.errors import UserError
from flwr_hpc.ssh.host import SshHost
from flwr_hpc.ssh.remote_site import RemoteSite


class FakeHost:
    """Has an older flwr-hpc until a wheel is installed."""

    name = "far"

    def __init__(self, python: str) -> None:
        self.python, self.flwr_hpc = python, "0.0.9"
        self.files: dict[str, bytes] = {}
        self.installed: list[str] = []

    def ask(self, command: Sequence[str]) -> dict[str, Any]:
        found = {"program": command[0], "python": self.python, "host": "uan01", "home": "/home/me"}
        return {**found, "flwr_hpc": self.flwr_hpc}

    def put(self, data: bytes, path: str) -> None:
        self.files[path] = data

    def run(self, command: Sequence[str], timeout_s: float) -> str:
        assert list(command[1:4]) == ["-m", "pip", "install"]
        assert self.files[command[-1]].startswith(b"PK")
        self.installed.append(command[-1])
        self.flwr_hpc = __version__
        return ""


def _site(host: FakeHost, folder: Path, *words: str) -> RemoteSite:
    config = compose_config(["+facility=local_a", "facilities.local_a.ssh=far", *words])
    files = folder / "invitation.json", folder / "memory.json"
    return RemoteSite("local_a", cast(SshHost, host), config, *files)


def test_nothing_is_installed_unasked(tmp_path: Path) -> None:
    """Protects a user's environments: a run says what is missing and which word mends it."""
    host = FakeHost("3.12.1")
    with pytest.raises(UserError, match=r"has flwr-hpc 0\.0\.9.*local_a\.ssh_install=true"):
        _site(host, tmp_path).check()
    assert host.files == {}


def test_the_same_version_is_installed_once(tmp_path: Path) -> None:
    """Protects whoever asks for it: the wheel is sent where it is needed, and only there."""
    host = FakeHost("3.12.1")
    site = _site(host, tmp_path, "facilities.local_a.ssh_install=true")
    assert [site.check().flwr_hpc, site.check().flwr_hpc] == [__version__, __version__]
    assert host.installed == list(host.files)
    assert len(host.installed) == 1


def test_too_old_a_python_is_left_alone(tmp_path: Path) -> None:
    """Protects from an installation that cannot work, and from advice for one."""
    host = FakeHost("3.9.2")
    with pytest.raises(UserError, match=r"is Python 3\.9\.2") as caught:
        _site(host, tmp_path, "facilities.local_a.ssh_install=true").check()
    assert "ssh_install" not in str(caught.value)
    assert host.files == {}
