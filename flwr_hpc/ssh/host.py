"""One control connection to a host, over which everything else goes without asking again.

Who the host is, how it is reached and who the user is there says the user's ``~/.ssh/config``;
OpenSSH asks on the terminal for what it needs, once. A connection that was lost is opened again
without asking, or, where that takes a person, by the command in the message, in any terminal.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from flwr_hpc.errors import UserError
from flwr_hpc.files import private_folder

PROGRAM = "ssh"
LOST = 255  # what ssh itself ends with when it fails; a remote command may, too
CONNECT_S = 30
# A line that is dead but not closed is noticed within 45 s.
OPTIONS = (
    *("-o", f"ConnectTimeout={CONNECT_S}", "-o", "ServerAliveInterval=15"),
    *("-o", "ServerAliveCountMax=3", "-o", "ExitOnForwardFailure=yes"),
    *("-o", "ForwardAgent=no", "-o", "ForwardX11=no", "-o", "ClearAllForwardings=yes"),
    *("-o", "RemoteCommand=none"),
)
# Where the control connection is gone no other is opened in its place.
OVER_CONTROL = (
    *("-o", "ControlMaster=no", "-o", "BatchMode=yes", "-o", "ProxyCommand=false"),
    *("-o", "RemoteCommand=none", "-o", "RequestTTY=no"),
)
PUBLISH = 'umask 077; mkdir -p "$(dirname "$1")" && cat > "$1.tmp" && mv -f "$1.tmp" "$1"'
# What passes by itself; for anything else OpenSSH wants a person.
NETWORK = re.compile(
    r"timed out|timeout|refused|unreachable|no route|could not resolve|reset|closed by|broken pipe",
    re.IGNORECASE,
)


class SshLostError(Exception):
    """The host cannot be reached now; the message says why and, where there is one, the command."""


class PortTakenError(SshLostError):
    """A port there cannot be listened at."""


def control_folder(key: str) -> Path:
    """Return where the control sockets of a run lie, also after a resume; in few letters."""
    mine = Path(tempfile.gettempdir()) / f"flwr-hpc-ssh-{os.getuid()}"
    try:
        return private_folder(private_folder(mine) / _short(key))
    except OSError as exc:
        raise UserError(
            f"the folder of the control connections, {mine}, cannot be used: {exc}. "
            "Name another place for it: TMPDIR=/path"
        ) from None


class SshHost:
    """A host of the user's, by its name in ``~/.ssh/config``.

    Parameters
    ----------
    name : str
    folder : Path
        Of this user alone, for the control socket; of few letters, as socket names are limited.
    config : str or None
        A file in place of ``~/.ssh/config``.
    """

    def __init__(self, name: str, folder: Path, config: str | None = None) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@:%-]*", name):  # no option of ssh's
            raise UserError(f"ssh: {name!r} is no name of a host in ~/.ssh/config")
        if shutil.which(PROGRAM) is None:
            raise UserError("the program 'ssh' is not installed. It comes with OpenSSH's client")
        self.name = name
        self._socket = folder / _short(name)
        self._opening = threading.Lock()
        self._connecting: subprocess.Popen[bytes] | None = None
        self._config = ("-F", str(Path(config).expanduser().absolute())) if config else ()

    def open(self, ask: bool) -> None:
        """Open the control connection unless it is open; `SshLostError` if that fails.

        Parameters
        ----------
        ask : bool
            Whether OpenSSH may ask for passwords and codes on the terminal.
        """
        with self._opening:
            if not self.is_open():
                self._open(ask)

    def _open(self, ask: bool) -> None:
        private_folder(self._socket.parent)  # `close` takes it away
        self._socket.unlink(missing_ok=True)  # of one that was killed
        batch = () if ask else ("-o", "BatchMode=yes")
        words = self._words("-M", "-N", "-f", *OPTIONS, *batch)
        # What a second factor asks to be done is written to stderr: a person has to see it. Else
        # it is read. ssh stays as the connection: it must hold no pipe of ours open.
        seen = ask and sys.stderr.isatty()
        with open(self._log, "w+") as log:
            self._connecting = subprocess.Popen(
                words, stdin=None if ask else subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=None if seen else log, start_new_session=not ask,
            )  # fmt: skip
            code = self._connecting.wait()
            log.seek(0)
            output = log.read().strip()
        if code:
            last = output.splitlines()[-1].strip() if output else f"ssh has ended with {code}"
            passing = "trying again" if NETWORK.search(last) else self.hint
            raise SshLostError(f"{self.name} cannot be reached: {last.rstrip('.')}. {passing}")

    def is_open(self) -> bool:
        """Return whether the control connection stands, as far as this end knows."""
        return self._socket.exists() and self._control("check").returncode == 0

    @property
    def hint(self) -> str:
        """What a person types to open the connection, with whatever the host asks for."""
        return f"To connect, type: {shlex.join(self._words('-M', '-N', '-f', *OPTIONS))}"

    def run(self, command: Sequence[str], data: bytes = b"", timeout_s: float = 120.0) -> str:
        """Run a program there and return what it writes.

        `SshLostError` if the connection is lost; then nobody knows whether it ran. A UserError with
        its last words if it fails.
        """
        try:
            done = subprocess.run(
                self._over(command), input=data, capture_output=True, timeout=timeout_s,
                start_new_session=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise SshLostError(f"{self.name} has not answered for {timeout_s:g} s") from None
        if done.returncode == LOST and not self.is_open():
            raise SshLostError(f"the connection to {self.name} is lost")
        if done.returncode:
            words_there = done.stderr.decode(errors="replace").strip() or "no word"
            raise UserError(f"{self.name}: {shlex.join(command)[:200]} failed: {words_there}")
        return done.stdout.decode(errors="replace")

    def ask(
        self, command: Sequence[str], data: bytes = b"", timeout_s: float = 120.0
    ) -> dict[str, Any]:
        """Run a program there that writes a JSON object in its last line; return that.

        What a login shell's own files write before it is passed over.
        """
        output = self.run(command, data, timeout_s).strip()
        try:
            answer = json.loads(output.splitlines()[-1])
        except (IndexError, ValueError):
            answer = None
        if not isinstance(answer, dict):
            raise UserError(f"{self.name}: {shlex.join(command)[:200]} gave no answer: {output!r}")
        return answer

    def follow(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a program there and return the process that hands on what it writes."""
        return subprocess.Popen(
            self._over(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def show(self, command: Sequence[str]) -> int:
        """Run a program there on this terminal; return its exit code.

        It ends with this process, also where no terminal is: then its own there is a plain one.
        """
        plain = {} if sys.stdout.isatty() else {"TERM": "dumb"}
        over = self._words(*OVER_CONTROL, "-tt")
        return subprocess.run(
            [*over, "--", shlex.join(command)], env={**os.environ, **plain}
        ).returncode

    def put(self, data: bytes, path: str) -> None:
        """Write a file there, for its user alone; it appears whole or not at all."""
        self.run(["sh", "-c", PUBLISH, "sh", path], data)

    def expose(self, port: int, there: int = 0) -> int:
        """Let a port of this host be reached there, on the loopback interface; return its port.

        Parameters
        ----------
        port : int
            Here.
        there : int
            The port to have there; 0: any that is free.
        """
        done = self._control("forward", "-R", f"127.0.0.1:{there}:127.0.0.1:{port}")
        if done.returncode:
            why = " ".join(done.stderr.split()) or f"ssh ended with {done.returncode}"
            raise PortTakenError(f"{self.name} does not forward its port {there or ''}: {why}")
        found = re.search(r"\d+", done.stdout)
        return there or int(found[0] if found else 0)

    def hide(self, port: int, there: int) -> None:
        """Take back what `expose` did, if this connection did it."""
        self._control("cancel", "-R", f"127.0.0.1:{there}:127.0.0.1:{port}")

    def abort(self) -> None:
        """Let another thread's `open` fail now; a connection that stands is left alone."""
        if self._connecting is not None and self._connecting.poll() is None:
            self._connecting.kill()

    def close(self) -> None:
        """Close the connection; what was detached goes on."""
        if self._socket.exists():
            self._control("exit")
        with suppress(OSError):  # another host's may lie beside it
            self._log.unlink(missing_ok=True)
            self._socket.parent.rmdir()

    @property
    def _log(self) -> Path:
        return self._socket.with_suffix(".log")

    def _over(self, command: Sequence[str]) -> list[str]:
        return [*self._words(*OVER_CONTROL), "--", shlex.join(command)]

    def _control(self, verb: str, *options: str) -> subprocess.CompletedProcess[str]:
        words = self._words("-O", verb, *options)
        try:
            return subprocess.run(words, capture_output=True, text=True, timeout=CONNECT_S)
        except subprocess.TimeoutExpired:  # a connection that hangs
            return subprocess.CompletedProcess(words, LOST, "", "no answer")

    def _words(self, *options: str) -> list[str]:
        return [PROGRAM, *self._config, "-S", str(self._socket), *options, self.name]


def _short(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:8]
