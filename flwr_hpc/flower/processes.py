"""The processes a driver starts: their logs, their restarts, and their certain end."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from flwr_hpc.flower import reaper
from flwr_hpc.site.launcher import SESSION_MARK

RESTART_S = 3.0  # least time between two starts
STABLE_S = 30.0  # a process that lived so long did not fail to start
QUICK_ENDS = 5  # in a row, and it is given up
MOST_DOUBLINGS = 4  # of the time between the starts of a patient one
LOOK_S, LACKING_S = 2.0, 6.0  # for a helper that has ended, and is not there again by then
HELPER_START_S = 300.0  # for the first helper


@contextmanager
def reserve_port() -> Iterator[int]:
    """Keep a TCP port of the loopback interface for processes of this user.

    It is bound but not listened to. Another user cannot take it, not even when the server on it
    dies and its clients, which would run what they are sent, come back to it.
    """
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        s.bind(("127.0.0.1", 0))
        yield int(s.getsockname()[1])


@contextmanager
def ignore_signals() -> Iterator[None]:
    """Let a clean-up finish, however often Ctrl-C is pressed."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Child:
    """A long-lived process."""

    name: str
    command: Callable[[], Sequence[str]]  # Returns the command line; called at each start
    # Whether it is started again when it ends, unless it keeps ending at once.
    restartable: bool = False
    # Whether that is no reason to give it up: it comes back at ever longer intervals.
    patient: bool = False
    needed: bool = True  # Whether the session cannot go on without it
    # A program that it starts once and never looks at again; without it this one is of no use.
    helper: str = ""
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    started_at: float = 0.0
    quick_ends: int = 0
    present_helper: psutil.Process | None = field(default=None, repr=False)
    _helper_seen_at: float = 0.0  # 0: not since this start
    _looked_at: float = 0.0

    def pause_s(self) -> float:
        """Return the least time between its last start and the next."""
        return RESTART_S * (1 << min(self.quick_ends, MOST_DOUBLINGS) if self.patient else 1)

    def dead(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def lacks_helper(self, now: float) -> bool:
        """Whether its helper has ended, or never came; `now` in monotonic seconds."""
        if not self.helper or self.process is None or now - self._looked_at < LOOK_S:
            return False
        self._looked_at = now
        if self.present_helper is None or not _lives(self.present_helper):
            # Costs a look at every process of the host.
            family = _descendants(self.process.pid)
            self.present_helper = next((p for p in family if self.helper in _command_line(p)), None)
        if self.present_helper is not None:
            self._helper_seen_at = now
            return False
        if self._helper_seen_at > self.started_at:
            return now - self._helper_seen_at > LACKING_S
        return now - self.started_at > HELPER_START_S

    def listening(self) -> set[int]:
        """Return the TCP ports this process listens on."""
        if self.process is None:
            return set()
        try:
            found = psutil.Process(self.process.pid).net_connections("tcp")
        except psutil.Error:
            return set()
        return {int(c.laddr.port) for c in found if c.status == psutil.CONN_LISTEN}


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.Error:
        return []


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # gone, or a zombie
        return ""


class Processes:
    """Starts processes in a session of their own and ends them on every exit path.

    A small helper process watches this one through a pipe, so they end even when this
    process is killed.

    Parameters
    ----------
    logs : Path
        Folder of one log per process.
    env : mapping
        Added to this process's environment.
    lock : int
        File descriptor that the helper keeps open until the last process has ended.
    say : callable
        Told of restarts.

    Attributes
    ----------
    restarts : int
        How often one that had ended was started again.
    """

    def __init__(
        self, logs: Path, env: Mapping[str, str], lock: int, say: Callable[[str], None]
    ) -> None:
        self.logs = logs
        self._say = say
        token = secrets.token_hex(8)
        self._env = {**os.environ, **env, SESSION_MARK: token}
        self._children: list[Child] = []
        self.restarts = 0
        clean = {k: v for k, v in os.environ.items() if k != SESSION_MARK}
        self._reaper = subprocess.Popen(
            [sys.executable, "-S", str(Path(reaper.__file__)), f"{SESSION_MARK}={token}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=clean,
            pass_fds=(lock,),
            start_new_session=True,
        )

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, child: Child) -> None:
        """Start a process; its output is appended to ``logs/<name>.log``."""
        with open(self.logs / f"{child.name}.log", "ab") as log:
            child.process = subprocess.Popen(
                child.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,
            )
        child.started_at, child.present_helper = time.monotonic(), None
        if child not in self._children:
            self._children.append(child)

    def run(self, command: Sequence[str], timeout_s: float = 120.0) -> str:
        """Run a short command to its end and return its standard output.

        Raises
        ------
        RuntimeError
            With what it printed, if it fails.
        subprocess.TimeoutExpired
            If it takes longer than `timeout_s` seconds.
        """
        done = subprocess.run(
            command, env=self._env, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}".strip())
        return done.stdout

    def restart(self, name: str) -> None:
        """End a process that hangs; `tend` starts it again."""
        for child in self._children:
            if child.name == name and child.process is not None:
                child.process.kill()
                child.process.wait()

    def tend(self) -> list[Child]:
        """Restart what ended and may be restarted; return what ended for good."""
        gone = []
        for child in self._children:
            if not child.dead() and child.lacks_helper(time.monotonic()):
                self._say(f"the {child.helper} of {child.name} has ended")
                self.restart(child.name)
            if not child.dead() or not child.needed:
                continue
            lived = time.monotonic() - child.started_at
            if not child.restartable or (child.quick_ends >= QUICK_ENDS and not child.patient):
                gone.append(child)
            elif lived >= child.pause_s():  # a node that comes back sooner may be refused
                child.quick_ends = child.quick_ends + 1 if lived < STABLE_S else 0
                self._say(f"{child.name} ended (see logs/{child.name}.log); starting it again")
                self.start(child)
                self.restarts += 1
        return gone

    def wait(self, name: str, timeout_s: float) -> None:
        """Let a process end by itself, if there is one of that name."""
        for child in self._children:
            if child.name == name and child.process is not None:
                with suppress(subprocess.TimeoutExpired):
                    child.process.wait(timeout_s)

    def stop(self) -> None:
        """End every process, uninterrupted by Ctrl-C; returns when none is left."""
        with ignore_signals():
            if self._reaper.stdin and not self._reaper.stdin.closed:
                self._reaper.stdin.close()
            self._reaper.wait()
            for child in self._children:
                if child.process is not None:
                    child.process.wait()


def wait_until_up(superlink: Child, port: int, log: Path, start_s: float) -> None:
    """Wait until our SuperLink, and no other process, listens on the port."""
    deadline = time.monotonic() + start_s
    while time.monotonic() < deadline and not superlink.dead():
        if port in superlink.listening():
            return
        time.sleep(0.1)
    raise RuntimeError(f"SuperLink did not start:\n{tail(log)}")


def tail(log: Path, lines: int = 15) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
