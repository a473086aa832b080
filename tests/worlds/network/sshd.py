"""A host that is reached by SSH: a throw-away sshd of this user, on a port of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from worlds.jobs import until
from worlds.network.ports import reserve_port

PROGRAM = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
needs_sshd = pytest.mark.skipif(
    PROGRAM is None or shutil.which("ssh") is None,
    reason="needs OpenSSH's server and client: apt-get install openssh-server",
)


class Sshd:
    """The server; `config` is what stands in a user's ``~/.ssh/config``, the host is ``far``."""

    def __init__(self, folder: Path, *options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.config, self.home = folder, folder / "config", folder / "home"
        self.home.mkdir(exist_ok=True)
        for name in ("host_key", "user_key"):
            if not (folder / name).exists():
                command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
                subprocess.run(command, check=True)
        shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
        self._reserved = reserve_port()
        self.port = self._reserved.getsockname()[1]
        public = (folder / "host_key.pub").read_text()
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {public}")
        _private(self.config, _client(folder, self.port))
        _private(folder / "sshd_config", _server(folder, self.port, options))
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start the server, or start it again."""
        assert PROGRAM is not None
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        command = [PROGRAM, "-D", "-e", "-f", str(self.folder / "sshd_config")]
        with open(self.folder / "sshd.log", "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        until(self._answers, self.folder, explain=self.log)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log()
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", self.port)) == 0

    def log(self) -> str:
        return (self.folder / "sshd.log").read_text(errors="replace")

    def refuse(self) -> None:
        """Take no connection any more, and end those that there are: the line is down."""
        assert self._process is not None
        family = psutil.Process(self._process.pid).children(recursive=True)
        self._process.kill()
        self._process.wait()
        for process in family:
            with suppress(psutil.NoSuchProcess):  # it has seen the other's end
                if process.name().startswith("sshd"):
                    process.kill()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.refuse()
        self._reserved.close()


@contextmanager
def sshd(folder: Path, *options: str) -> Iterator[Sshd]:
    """Run a server for a while."""
    server = Sshd(folder, *options)
    try:
        yield server
    finally:
        server.stop()


def _client(folder: Path, port: int) -> str:
    return (
        f"Host far\n  HostName 127.0.0.1\n  Port {port}\n  IdentitiesOnly yes\n"
        f'  IdentityFile "{folder}/user_key"\n  UserKnownHostsFile "{folder}/known_hosts"\n'
        "  StrictHostKeyChecking yes\n"
    )


def _server(folder: Path, port: int, options: tuple[str, ...]) -> str:
    lines = (
        *(f"Port {port}", "ListenAddress 127.0.0.1", f'HostKey "{folder}/host_key"'),
        *(f'AuthorizedKeysFile "{folder}/authorized_keys"', "StrictModes no", "PidFile none"),
        *("PasswordAuthentication no", "KbdInteractiveAuthentication no", "UsePAM no"),
        *("PermitRootLogin yes", "MaxStartups 100", *options),
        f'SetEnv OMP_NUM_THREADS=1 "HOME={folder}/home"',
    )
    return "".join(f"{line}\n" for line in lines)


def _private(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o600)
