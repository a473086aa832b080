"""A real SFTP server: OpenSSH's, which a user's ``~/.ssh/config`` knows as ``far``."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from worlds.network.sshd import PROGRAM, sshd

MISSING = "" if PROGRAM else "needs sshd: apt-get install openssh-server"
if find_spec("sshfs") is None:
    MISSING = "needs sshfs: pip install -e '.[test]'"


def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """Run a server for a module's tests, with the user's files for it; a fixture."""
    folder = tmp_path_factory.mktemp("sftp")
    (folder / ".ssh").mkdir(mode=0o700)
    with sshd(folder / "sshd", "Subsystem sftp internal-sftp") as server:
        (folder / ".ssh" / "config").write_text(server.config.read_text())
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOME", str(folder))
            yield server
