"""Whether Flower still runs a run: asked by its own command, for nothing tells a ClientApp.

After ``flwr stop`` the SuperNode drops the reply, but the ClientApp that works on it goes on, and
neither message nor context say so. ``flwr list`` can tell, where SuperLink lets this host ask.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import psutil

FINISHED = "finished"  # begins the state of a run that has ended, as in ``finished:stopped``
MOST_S = 900.0  # between two questions that were not answered
TIMEOUT_S = 30.0
NAME = "superlink"

Ask = Callable[[int], str]


class RunWatch:
    """Asks from time to time whether a run has ended; more rarely where there is no answer.

    Parameters
    ----------
    run_id : int
    every_s : float
        Between two questions; 0: never asks.
    ask : callable
        Returns the state of a run, ``""`` if it cannot be had.
    now : callable
    """

    def __init__(
        self, run_id: int, every_s: float, ask: Ask, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._run_id, self._every_s, self._ask, self._now = run_id, every_s, ask, now
        self._pause_s, self._due_s = every_s, now() + every_s

    def ended(self) -> str:
        """Return the state of a run that has ended, ``""`` as long as that is not known."""
        if not self._every_s or self._now() < self._due_s:
            return ""
        state = self._ask(self._run_id)
        self._pause_s = self._every_s if state else min(2 * self._pause_s, MOST_S)
        self._due_s = self._now() + self._pause_s
        return state if state.startswith(FINISHED) else ""


def flower_says(run_id: int) -> str:
    """Return what ``flwr list`` says of a run of this SuperNode's SuperLink, ``""`` if nothing."""
    connection = next(filter(None, map(_connection, _commands_above())), "")
    program = shutil.which("flwr", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not connection or program is None:
        return ""
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "config.toml").write_text(connection)
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        try:
            done = subprocess.run(
                [program, "list", NAME, f"--run-id={run_id}", "--format=json"],
                stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S,
                check=False, env={**os.environ, **quiet, "FLWR_HOME": home},
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return ""
    return read_state(done.stdout, run_id)


def read_state(text: str, run_id: int) -> str:
    """Return a run's state from what ``flwr list --format=json`` printed."""
    try:
        answer = json.loads(text)
        runs = answer["runs"]
        return next((str(r["status"]) for r in runs if r["run-id"] == str(run_id)), "")
    except (ValueError, KeyError, TypeError):
        return ""


def _commands_above() -> list[list[str]]:
    """Return the command lines of the processes that this one descends from."""
    try:
        return [process.cmdline() for process in psutil.Process().parents()]
    except psutil.Error:
        return []


def _connection(command: Sequence[str]) -> str:
    """Return how a SuperNode started so reaches its SuperLink, as Flower's configuration."""
    words = [part for w in command for part in (w.split("=", 1) if w.startswith("--") else [w])]
    values = dict(pairwise(words))
    address, certificates = values.get("--superlink"), values.get("--root-certificates")
    if not address:
        return ""
    lines = [f"[superlink.{NAME}]", f"address = {json.dumps(address)}"]
    if "--insecure" in words:
        lines.append("insecure = true")
    elif certificates:
        lines.append(f"root-certificates = {json.dumps(str(Path(certificates).absolute()))}")
    return "\n".join(lines) + "\n"
