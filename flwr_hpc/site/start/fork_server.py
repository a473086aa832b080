"""A process that has imported Flower's ``flwr-clientapp`` and our ClientApp, and forks for each.

Run as ``python -m flwr_hpc.site.start.fork_server SOCKET``. Importing takes more than a second of
CPU and 110 MB; on a busy machine longer than Flower waits for a ClientApp to say that it lives. A
fork takes milliseconds and shares that memory. No thread runs here, so forking is safe.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import selectors
import shutil
import signal
import socket
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

from flwr_hpc.site.launcher import SESSION_MARK
from flwr_hpc.site.start.program import LENGTH

PROGRAM = "flwr-clientapp"
APP = "flwr_hpc.site.client_app"
READ_S = 10.0  # for a request to come whole


@dataclass(frozen=True)
class Request:
    """What the program that SuperExec started was given."""

    arguments: list[str]
    folder: str
    env: dict[str, str]
    files: list[int]  # Descriptors of its input, output and errors

    @classmethod
    def read(cls, connection: socket.socket) -> Request:
        """Read what `flwr_hpc.site.start.program` sends; OSError or ValueError if it does not."""
        connection.settimeout(READ_S)
        head, files, _, _ = socket.recv_fds(connection, LENGTH.size, 3)
        (size,) = LENGTH.unpack(head)
        body = b""
        while len(body) < size:
            if not (more := connection.recv(size - len(body))):
                raise ValueError("the request ends early")
            body += more
        return cls(**json.loads(body.decode("utf-8", "surrogateescape")), files=list(files))

    def become(self) -> None:
        """Make this process what the program would have been."""
        for number, file in enumerate(self.files):
            os.dup2(file, number)
            os.close(file)
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.env)
        os.environ.pop(SESSION_MARK, None)  # as our ClientApp does when it is imported
        sys.argv = [PROGRAM, *self.arguments]


class ForkServer:
    """Forks for each request that comes in at a socket.

    Parameters
    ----------
    door : socket
        Listens.
    """

    def __init__(self, door: socket.socket) -> None:
        self._door = door
        self._programs: dict[int, socket.socket] = {}  # that wait for a fork, by its pid
        self._ended, self._wake = socket.socketpair()  # something to read: a fork has ended
        self._wake.setblocking(False)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._events = selectors.DefaultSelector()
        for readable in (door, self._ended):
            self._events.register(readable, selectors.EVENT_READ)

    def serve(self) -> Request:
        """Go on for ever; returns in the forks alone."""
        while True:
            for key, _ in self._events.select():
                if key.fileobj is self._ended:
                    self._ended.recv(4096)
                    self._report()
                elif key.fileobj is not self._door:
                    self._end(key.data)
                elif request := self._fork():
                    return request

    def _fork(self) -> Request | None:
        connection, _ = self._door.accept()
        try:
            request = Request.read(connection)
        except (OSError, ValueError) as exc:
            print(f"a request could not be read: {exc}", file=sys.stderr)
            connection.close()
            return None
        pid = os.fork()
        if pid == 0:
            self._leave(connection)
            return request
        for file in request.files:
            os.close(file)
        self._programs[pid] = connection
        self._events.register(connection, selectors.EVENT_READ, pid)
        return None

    def _leave(self, connection: socket.socket) -> None:
        """Let go of all that is the server's, in a fork."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        self._events.close()
        for held in (connection, self._ended, self._wake, *self._programs.values()):
            held.close()

    def _end(self, pid: int) -> None:
        """End a fork whose program has ended before it."""
        self._events.unregister(self._programs[pid])
        os.kill(pid, signal.SIGTERM)

    def _report(self) -> None:
        """Tell programs how their forks have ended."""
        while self._programs:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            connection, code = self._programs.pop(pid), os.waitstatus_to_exitcode(status)
            with contextlib.suppress(KeyError):  # it has ended itself
                self._events.unregister(connection)
            with contextlib.suppress(OSError):
                connection.sendall(bytes([code if code >= 0 else 128 - code]))
            connection.close()


def main(path: Path) -> None:
    """Import, listen, and run the program in every fork."""
    (program,) = entry_points(group="console_scripts", name=PROGRAM)
    run = program.load()
    import_module(APP)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy the memory that it shares
    owner = os.getpid()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        with socket.socket(socket.AF_UNIX) as door:
            door.bind(str(path))
            door.listen(64)
            request = ForkServer(door).serve()
    finally:
        if os.getpid() == owner:
            shutil.rmtree(path.parent, ignore_errors=True)
    request.become()
    sys.exit(run())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
