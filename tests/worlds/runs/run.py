"""Start real runs of the command, watch them, and kill parts of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
from worlds.files import paths_under
from worlds.jobs import command_line, until

from flwr_hpc.files import read_json
from flwr_hpc.tracking.events import read

T = TypeVar("T")
ROOT = Path(__file__).parents[3]

# A model and orders small enough for a test, long enough to be killed in the middle.
SMALL = [
    "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=2",
    "model.config.num_key_value_heads=2",
    "data.paths.local_a=[json]",
    "data.paths.local_b=[logging]",
    "data.seq_len=64",
    "data.held_out_sequences=16",
    "train.micro_batch=4",
    "train.steps=150",
    "train.warmup_steps=10",
    "federation.wait_s=10",
    "federation.offline_grace_s=120",
    "rounds=2",
    "+facility=[local_a,local_b]",
    "facilities.local_b.ranks_per_node=1",
]
# At one site of one rank, for tests of the command alone: half of the processes.
ONE_SITE = [
    *(setting for setting in SMALL if "local_" not in setting),
    *("data.paths.local_a=[json]", "+facility=local_a", "facilities.local_a.ranks_per_node=1"),
]


class Run:
    """One `python -m flwr_hpc.run` in a folder of its own."""

    def __init__(
        self,
        folder: Path,
        *overrides: str,
        resume: bool = False,
        settings: Sequence[str] = SMALL,
        output: Path | None = None,
    ) -> None:
        self.dir = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        quoted = "'" + str(folder).replace("'", r"\'") + "'"  # Hydra's grammar
        where = f"resume={folder}" if resume else f"run_dir={quoted}"
        settings = [] if resume else settings
        self.output = output or folder.parent / f"{folder.name}.out"
        command = [sys.executable, "-m", "flwr_hpc.run", where, *settings, *overrides]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with open(self.output, "ab") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, env=env, cwd=folder.parent, start_new_session=True
            )

    @classmethod
    def of(cls, folder: Path) -> Run:
        """Return a run that has ended."""
        run = cls.__new__(cls)
        run.dir, run.output = folder, folder.parent / f"{folder.name}.out"
        return run

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def end(self) -> int:
        """Wait for the command's exit code; kill it when nothing moves any more."""
        try:
            until(lambda: self.process.poll() is not None, self.dir, explain=self.said)
        except AssertionError:
            self.process.kill()
            raise
        return self.process.wait()

    def summary(self) -> dict[str, Any]:
        return self.summary_of(self.dir)

    @staticmethod
    def summary_of(run_dir: Path) -> dict[str, Any]:
        value = json.loads((run_dir / "summary.json").read_text())
        assert isinstance(value, dict)
        return value

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        path = self.dir / "events.jsonl"
        events = read(path) if path.exists() else []  # a torn line is none
        return [e for e in events if name in (None, e["event"])]

    def until(self, what: Callable[[], T]) -> T:
        """Poll until `what` returns something true, as long as the run moves."""

        def look() -> T:
            value = what()
            ended = self.process.poll() is not None
            assert value or not ended, f"the command ended early:\n{self.said()}"
            return value

        return until(look, self.dir, explain=self.said)

    def until_training(
        self, facility: str = "local_a", version: int = 0, workdir: Path | None = None
    ) -> str:
        """Wait until training from a version is under way; return the order's id."""

        def running() -> str | None:
            for path in paths_under(workdir or self.dir):
                folder = path.parent
                if path.name != "progress.json" or path.parents[2].name != facility:
                    continue
                if not (folder / "result.json").exists():
                    order = (read_json(folder / "order.json") or {}).get("order", {})  # or pruned
                    if (order.get("kind"), order.get("version")) == ("train", version):
                        return folder.name
            return None

        return str(self.until(running))

    def find(self, *words: str) -> list[psutil.Process]:
        """Return live processes whose command line holds all words."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            line = " ".join(process.info["cmdline"] or [])
            if all(w in line for w in words) and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def ranks(self, facility: str) -> list[psutil.Process]:
        return self.find("submitit", f"{self.dir}/facilities/{facility}/")

    def server_pid(self) -> int:
        return int(json.loads((self.dir / "flower" / "server.json").read_text())["pid"])

    def children(self, word: str) -> list[psutil.Process]:
        """Return the driver's descendants whose command line holds a word."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in family if word in command_line(p)]

    def left_behind(self) -> list[str]:
        """Return what of this run still lives."""
        mine = [p for p in self.find(str(self.dir)) if "pytest" not in command_line(p)]
        marked = [p for p in psutil.process_iter() if _in_environment(p, str(self.dir))]
        return [f"{p.pid} {command_line(p)}" for p in {*mine, *marked} if p.is_running()]


def trained_steps(folder: Path) -> int:
    """Return the trainer's own count of steps, by the newest checkpoint below a folder."""
    found = (path for path in paths_under(folder) if path.parent.name == "checkpoints")
    kept = (path.name for path in found if "@" in path.name and not path.name.startswith("."))
    return max((int(name.rpartition("@")[2]) for name in kept), default=0)


def _in_environment(process: psutil.Process, word: str) -> bool:
    if process.pid == os.getpid():
        return False
    try:
        return word in process.environ().get("FLWR_HOME", "")
    except psutil.Error:
        return False


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
