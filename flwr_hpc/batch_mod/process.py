"""The process inside the job that holds the app: warm, and replaceable.

It is not the rank's own process, so an app that crashes, hangs on to the interpreter or leaves
its device in a bad state costs a message and not the allocation.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr_hpc.batch_mod.app import AppRef, call, import_app
from flwr_hpc.batch_mod.carry import Failure, check_versions, load, save
from flwr_hpc.batch_mod.randomness import ImportSeeds
from flwr_hpc.worker.entry import die_with

LOOK_S = 0.25  # how often a wait looks up
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(Exception):
    """The wait was given up; the app's process is gone."""


class AppProcess:
    """The app in a process of its own; messages go to it one at a time.

    Parameters
    ----------
    app : AppRef
    versions : dict
        Of the other side, see `flwr_hpc.batch_mod.carry.versions`.
    env : dict
        Added to its environment.
    """

    def __init__(
        self, app: AppRef, versions: dict[str, str], env: dict[str, str] | None = None
    ) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
        self._connection, theirs = context.Pipe()
        # Not a daemon: the app may start processes itself, such as those of a DataLoader.
        self._process = context.Process(
            target=_main, args=(theirs, os.getpid(), app, versions, env or {}), daemon=False
        )
        self._process.start()
        theirs.close()
        self._loaded = False

    def load(self, stop: Callable[[], bool]) -> Failure | None:
        """Wait until the app is imported; return why it cannot be.

        Raises
        ------
        Stopped
            If `stop` said so.
        """
        if self._loaded:
            return None
        failure = self._wait(stop)
        self._loaded = failure is None
        return failure

    def call(self, request: Path, reply: Path | None, stop: Callable[[], bool]) -> Failure | None:
        """Let the app answer `request` in the file `reply`; return what it raised.

        Raises
        ------
        Stopped
            If `stop` said so.
        """
        failure = self.load(stop)
        if failure is not None:
            return failure
        self._connection.send((request, reply))
        return self._wait(stop)

    def end(self) -> None:
        """Kill the process; again is harmless."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _wait(self, stop: Callable[[], bool]) -> Failure | None:
        while not self._connection.poll(0):
            if stop():
                self.end()
                raise Stopped
            multiprocessing.connection.wait((self._connection, self._process.sentinel), LOOK_S)
            if not self._process.is_alive() and not self._connection.poll(0):
                return self._crash(stop)
        try:
            failure: Failure | None = self._connection.recv()
        except EOFError:  # the process ended, and its end of the pipe with it
            return self._crash(stop)
        return failure

    def _crash(self, stop: Callable[[], bool]) -> Failure:
        self._process.join()
        time.sleep(LOOK_S)  # a signal to the whole job may reach this process last
        if stop():
            self.end()
            raise Stopped
        return Failure("flwr_hpc.batch", f"the app's process in the job {_how(self._process)}")


def _how(process: Any) -> str:
    code = process.exitcode
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = "; out of memory?" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


def _main(
    connection: Any, parent: int, app: AppRef, versions: dict[str, str], env: dict[str, str]
) -> None:
    """Import the app, say so, and answer message after message."""
    die_with(parent)
    for number in SIGNALS:  # the rank's process decides; a handler is not inherited, unlike SIG_IGN
        signal.signal(number, lambda *_: None)
    os.environ.update(env)
    seeds = ImportSeeds(app.folder, app.ref.partition(".")[0])
    seeds.watch()
    try:
        check_versions(versions)
        client_app = import_app(app)
    except BaseException as exc:
        connection.send(Failure.of(exc))
        return
    connection.send(None)
    while True:
        try:
            request, target = connection.recv()
        except EOFError:
            return
        seeds.restore()
        reply = call(client_app, *load(request))
        if target is not None:
            save(target, reply)
        connection.send(reply.failure)
