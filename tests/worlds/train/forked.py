"""Processes forked from one that has read torch and transformers, which takes seconds of CPU."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path

# Others' packages alone: what programs change of ours is not read yet.
READ = (
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor.parallel",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "peft",
)


def context(fresh: bool = False) -> ForkServerContext | SpawnContext:
    """Return the way to start such processes; `fresh` ones read all of it themselves."""
    if fresh:
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(list(READ))
    return found


class Forked:
    """A process that runs a program's text, with what `subprocess.Popen` has of such.

    Parameters
    ----------
    program : str
    argument : str
    env : mapping
        Its environment; torch computes in one thread.
    log : Path
        Where its output and errors are appended.
    fresh : bool
        See `context`.
    """

    def __init__(
        self, program: str, argument: str, env: Mapping[str, str], log: Path, fresh: bool = False
    ) -> None:
        args = program, argument, dict(env), log
        self._process = context(fresh).Process(target=_be, args=args)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        self._process.join()


def _be(program: str, argument: str, env: dict[str, str], log: Path) -> None:
    os.environ.clear()
    os.environ.update(env)
    with open(log, "ab") as out:
        for number in (1, 2):
            os.dup2(out.fileno(), number)
    if torch := sys.modules.get("torch"):  # which has read the environment of before
        torch.set_num_threads(1)
    sys.argv = ["-c", argument]
    exec(program, {"__name__": "__main__"})
