"""The sites on other hosts while a run goes on: each has a thread that keeps the line to it.

A line that is lost is normal: the laptop slept, a certificate has expired, a login node was
restarted. The site goes on with what it has; here it is tried again and again, without asking, and
once it takes a person, the command to type is said.
"""

from __future__ import annotations

import json
import re
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from flwr_hpc.clock import Clock, SystemClock
from flwr_hpc.config.schema import Config
from flwr_hpc.errors import UserError
from flwr_hpc.ssh.host import SshHost, SshLostError, control_folder
from flwr_hpc.ssh.remote_site import RemoteSite

PAUSES_S = (2.0, 5.0, 10.0, 20.0, 40.0, 60.0)  # between two tries to connect; the last one stays
LOOK_S = 1.0  # whether a person has opened the connection
STABLE_S = 120.0  # a site that lived so long did not fail to start
LEAVE_S = 90.0  # for a site to end by itself when the run has finished
STOP_S = 10.0  # for the thread to leave what it does
USER_ERROR, OVER = 2, 0  # exit codes of `flwr_hpc.join`
# Of what a site writes its live view's lines are for the run's own; the rest is in the log.
NEWS = re.compile(r"\[ *[\d.]+ s\] (?P<news>.*)|(?P<error>error: .*)")


class Site(Protocol):
    """What an attendant needs of `RemoteSite`."""

    name: str
    host: SshHost

    def attach(self, port: int) -> dict[str, Any]: ...
    def follow(self) -> subprocess.Popen[bytes]: ...
    def read_to(self, offset: int) -> None: ...
    def end(self) -> str: ...


class Attendant:
    """Keeps the line to one site, in a thread of its own.

    Parameters
    ----------
    site : RemoteSite
    log : Path
        What the site writes is copied there.
    end_command : str
        What ends a site that cannot be reached now, later.
    clock : Clock or None
    """

    def __init__(self, site: Site, log: Path, end_command: str, clock: Clock | None = None) -> None:
        self.site, self.fault, self.over = site, "", False
        self._log, self._end_command, self._clock = log, end_command, clock or SystemClock()
        self._notes: deque[str] = deque()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._follower: subprocess.Popen[bytes] | None = None
        self._last = ""  # What was said of the line; each thing once
        self._error = ""  # The last that the site has written

    def start(self, port: int) -> None:
        """Begin, if that has not been done; `port` is the one here that the site is to reach."""
        if self._thread is None:
            name = f"ssh-{self.site.name}"
            self._thread = threading.Thread(
                target=self._attend, args=(port,), name=name, daemon=True
            )
            self._thread.start()

    def notes(self) -> list[str]:
        """Return what is new."""
        return [self._notes.popleft() for _ in range(len(self._notes))]

    def finish(self, finished: bool) -> str:
        """Let the site end by itself after a run that has finished, or end it; say how it went."""
        if self._thread is None:
            return ""
        if finished and self.site.host.is_open():
            self._thread.join(LEAVE_S)
        self._stop.set()
        self.site.host.abort()
        if self._follower is not None:
            self._follower.kill()
        self._thread.join(LEAVE_S if self.site.host.is_open() else STOP_S)
        if self.over:
            return ""
        return self._end()

    def _end(self) -> str:
        host = self.site.host
        try:
            if host.is_open():
                return self.site.end()
            why = f"{host.name} cannot be reached"
        except (SshLostError, UserError) as exc:
            why = str(exc)
        return f"{why}: its site, and its jobs, go on there. End them with: {self._end_command}"

    def _attend(self, port: int) -> None:
        tries = 0
        while not self._stop.is_set():
            began = self._clock.now()
            try:
                self.site.host.open(ask=False)
                if self._stop.is_set():
                    return
                found = self.site.attach(port)
                self._say_line(f"its site runs on {found['host']}, by ssh {self.site.host.name}")
                tries = 0
                code = self._listen()
            except (SshLostError, OSError) as exc:  # or the disk here is full
                self._say_line(str(exc))
            except UserError as exc:
                self.fault = f"{self.site.name}: {exc}"
                return
            else:
                self._conclude(code)
                if self.over or self.fault:
                    return
                tries = 0 if self._clock.now() - began > STABLE_S else tries + 1
            self._pause(PAUSES_S[min(tries, len(PAUSES_S) - 1)])
            tries += 1

    def _conclude(self, code: int) -> None:
        """Judge how the site has ended."""
        self.over = code == OVER
        if code == USER_ERROR:
            words = self._error.removeprefix("error: ") or f"see {self._log}"
            self.fault = f"{self.site.name}: its site could not be started: {words}"
        elif not self.over and not self._stop.is_set():
            self._say_line(f"its site has ended ({code}, see {self._log}); starting it again")

    def _listen(self) -> int:
        """Copy what the site writes; return its exit code, or raise when the line is lost."""
        self._follower = self.site.follow()
        assert self._follower.stdout is not None
        with self._follower, open(self._log, "a", encoding="utf-8") as log:
            for raw in self._follower.stdout:
                word = _parsed(raw)
                if "line" in word:
                    self._take(word["line"], log.write)
                if "offset" in word:
                    log.flush()
                    self.site.read_to(int(word["offset"]))
                if "code" in word:
                    return int(word["code"])
        if self._stop.is_set():
            return -1
        raise SshLostError("the line is lost; its jobs go on, and it is tried again")

    def _take(self, line: str, write: Callable[[str], object]) -> None:
        write(f"{line}\n")
        if found := NEWS.fullmatch(line):
            self._error = found["error"] or self._error
            self._notes.append(found["news"] or found["error"])

    def _pause(self, seconds: float) -> None:
        """Wait, or until a person has opened the connection."""
        until = self._clock.now() + seconds
        while self._clock.now() < until and not self._stop.is_set():
            self._clock.sleep(LOOK_S)
            if self.site.host.is_open():
                return

    def _say_line(self, words: str) -> None:
        if words != self._last:
            self._last = words
            self._notes.append(words)


class Attendants:
    """All of a run; without facilities on other hosts none, and nothing is done.

    Parameters
    ----------
    attendants : sequence of Attendant
    port : int
        Here, where sites are let in.
    """

    def __init__(self, attendants: Sequence[Attendant], port: int) -> None:
        self._all, self._port = list(attendants), port

    @property
    def fault(self) -> str:
        """Why the run cannot go on; empty if it can."""
        return "; ".join(one.fault for one in self._all if one.fault)

    def start(self) -> None:
        """Begin, when the server is up."""
        for one in self._all:
            one.start(self._port)

    def notes(self) -> Iterable[tuple[str, str]]:
        """Yield what is new, with the facility that it is of."""
        for one in self._all:
            for note in one.notes():
                yield one.site.name, note

    def finish(self, finished: bool) -> Iterable[tuple[str, str]]:
        """Bring all to their end; yield how it went."""
        for one in self._all:
            last = one.finish(finished)
            for note in [*one.notes(), *([last] if last else [])]:
                yield one.site.name, note
        for host in {one.site.host.name: one.site.host for one in self._all}.values():
            with suppress(OSError):
                host.close()


NOBODY = Attendants([], 0)  # of a run whose sites are all on this machine


def remote_sites(config: Config, run_key: str, invitations: Path, memory: Path) -> list[RemoteSite]:
    """Return the sites on other hosts; those of one host share its connection."""
    if not config.by_ssh:
        return []
    folder = control_folder(run_key)
    hosts: dict[str, SshHost] = {}
    for facility in config.by_ssh.values():
        name = str(facility.ssh)
        hosts[name] = hosts.get(name) or SshHost(name, folder, config.ssh_config)
    return [
        RemoteSite(
            name, hosts[str(facility.ssh)], config, invitations / f"{name}.json",
            memory / f"{name}.json",
        )
        for name, facility in config.by_ssh.items()
    ]  # fmt: skip


def _parsed(raw: bytes) -> dict[str, Any]:
    """Return a line of the keeper's; what a login shell writes is none."""
    try:
        value = json.loads(raw)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
