"""A site on a host that is reached by SSH: started there once, met again, followed, ended."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flwr_hpc.clock import Clock, SystemClock
from flwr_hpc.config.invitation import Invitation, read_invitation
from flwr_hpc.config.schema import Config
from flwr_hpc.errors import UserError
from flwr_hpc.files import private_folder, publish, read_json
from flwr_hpc.ssh.host import PortTakenError, SshHost, SshLostError
from flwr_hpc.ssh.python_there import PythonThere, install, look
from flwr_hpc.ssh.settings import CONF, FACILITY, INVITATION, facility_file, join_words

KEEPER = ("-m", "flwr_hpc.join.keeper")
PORT_TRIES, PORT_PAUSE_S = 5, 1.0
END_S = 120.0


@dataclass(frozen=True)
class Memory:
    """What is known of a site there; it outlives this process."""

    program: str = ""  # The Python there
    folder: str = ""
    port: int = 0  # There, by which the site reaches the server
    local: int = 0  # The port here that it leads to
    offset: int = 0  # Of its log, as far as it was read


class RemoteSite:
    """One facility's site.

    Parameters
    ----------
    name : str
        The facility's.
    host : SshHost
    config : Config
        The run's.
    invitation : Path
        The site's.
    memory : Path
        A file of the run directory.
    clock : Clock or None
    """

    def __init__(
        self,
        name: str,
        host: SshHost,
        config: Config,
        invitation: Path,
        memory: Path,
        clock: Clock | None = None,
    ) -> None:
        self.name, self.host, self._clock = name, host, clock or SystemClock()
        self._config, self._invitation, self._memory = config, invitation, memory
        self._met = False  # Whether it was there since this process began
        self.known = Memory(**(read_json(memory) or {}))

    def check(self) -> PythonThere:
        """Return its Python there, made to fit if that may be; a UserError says what to do."""
        facility = self._config.facilities[self.name]
        inside = facility.container is not None  # then `python` is the image's
        program = facility.ssh_python or (None if inside else facility.python)
        key = f"facilities.{self.name}.{'ssh_python' if inside else 'python'}"
        try:
            found = look(self.host, program)
        except UserError as exc:
            raise UserError(f"{exc}: {key}=/path/there/bin/python") from None
        by_itself = f"facilities.{self.name}.ssh_install=true"
        if found.lacks_package and facility.ssh_install:
            found = install(self.host, found)
        if fault := found.fault(self.host.name):
            or_so = f". Or let the run install it: {by_itself}" if found.lacks_package else ""
            raise UserError(
                f"{self.name}: {fault}{or_so}. Or name another Python there: {key}=PATH"
            )
        return found

    def attach(self, port: int) -> dict[str, Any]:
        """Lead the site to a port here, starting it unless it runs; return how it is.

        The port there stays the same as long as the site lives, which knows no other.
        """
        there, invitation = self.check(), read_invitation(self._invitation)
        folder = f"{there.home}/flwr-hpc/{invitation.run_key}-{self.name}"
        if (folder, there.program) != (self.known.folder, self.known.program):
            self._remember(Memory(there.program, folder))
        found = self._keep("look")
        if found["state"] == "elsewhere":
            raise SshLostError(
                f"the site of {self.name} runs on {found['host']}, and {self.host.name} has led to "
                f"{there.host}: let HostName in ~/.ssh/config name {found['host']} alone"
            )
        running = found["state"] == "running"
        if self._met and found["code"] == 0:  # it has ended well while the line was down
            return found
        if self.known.port:
            self.host.hide(self.known.local, self.known.port)
        there_port = self._expose(port, must=running)
        self._remember(replace(self.known, port=there_port, local=port))
        found = found if running else self._start(invitation)
        self._met = True
        return found

    def follow(self) -> subprocess.Popen[bytes]:
        """Return the process that hands on what the site writes."""
        words = ("follow", self.known.folder, str(self.known.offset))
        return self.host.follow([self.known.program, *KEEPER, *words])

    def read_to(self, offset: int) -> None:
        """Remember how far its log was read."""
        self._remember(replace(self.known, offset=offset))

    def end(self) -> str:
        """End the site and its jobs; return what came of it, for people."""
        if not self.known.folder:
            return "nothing was started there"
        found = self._keep("end", timeout_s=END_S)
        if found["state"] == "elsewhere":
            return f"its site runs on {found['host']}: end it there, with {self.by_hand}"
        if found["left"]:
            return f"could not cancel every job; look for them yourself: {found['left']}"
        return {"none": "nothing is left there"}.get(found["state"], "its site and jobs are ended")

    @property
    def by_hand(self) -> str:
        """What a person types on the host to end the site."""
        return shlex.join([self.known.program, *KEEPER, "end", self.known.folder])

    def _start(self, invitation: Invitation) -> dict[str, Any]:
        """Send what it needs, and start it."""
        folder, config = self.known.folder, self._config
        address = f"127.0.0.1:{self.known.port}"
        mine = replace(invitation, address=address, sites=list(config.facilities))
        self.host.put(json.dumps(asdict(mine)).encode(), f"{folder}/{INVITATION}")
        facility = facility_file(config, self.name).encode()
        self.host.put(facility, f"{folder}/{CONF}/facility/{FACILITY}.yaml")
        return self._keep("start", join_words(config, self.name, folder))

    def _expose(self, port: int, must: bool) -> int:
        """Forward the port there that it had before, if it had one and that can be had.

        It may be held by the host's end of a connection whose other end has slept, or was cut off.
        """
        before = self.known.port
        for _ in range(PORT_TRIES if before else 0):
            try:
                return self.host.expose(port, before)
            except PortTakenError:
                self._keep("release")
                self._clock.sleep(PORT_PAUSE_S)
        return self.host.expose(port, before if must else 0)

    def _keep(self, action: str, words: Sequence[str] = (), **options: float) -> dict[str, Any]:
        command = [self.known.program, *KEEPER, action, self.known.folder, *words]
        return self.host.ask(command, **options)  # type: ignore[arg-type]

    def _remember(self, known: Memory) -> None:
        self.known = known
        with suppress(OSError):  # a full disk: it is written next time
            private_folder(self._memory.parent)
            publish(self._memory, json.dumps(asdict(known)))
