"""Runs the points of a sweep, as many at a time as was asked for; a point's end is only its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from flwr_hpc.clock import Clock, SystemClock
from flwr_hpc.files import private_folder, read_json
from flwr_hpc.sweep.folder import Point, SweepDir

POLL_S = 0.5
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # Of a batch system, ahead of a job's end
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *WARNINGS)

Process = subprocess.Popen[bytes]
Start = Callable[[Point, int], Process]
Say = Callable[[str, Point], None]


def run_points(
    folder: SweepDir,
    points: Iterable[Point],
    parallel: int,
    start: Start,
    say: Say,
    clock: Clock | None = None,
) -> int:
    """Run points to their ends; return the signal that ended the sweep, or 0.

    Parameters
    ----------
    folder : SweepDir
    points : iterable of Point
        Asked for the next one when there is a slot for it.
    parallel : int
        Points that run at the same time.
    start : callable
        Starts the command of a point in a slot, of which there are as many as points at a time.
    say : callable
        Called with ``started``, ``finished``, ``failed`` or ``interrupted``, and the point.
    clock : Clock, optional
    """
    clock = clock or SystemClock()
    waiting, running = iter(points), dict[int, tuple[Point, Process]]()
    passed_on = 0
    with noted_signals() as signals:
        while True:
            while not signals and len(running) < parallel and (point := next(waiting, None)):
                slot = min({*range(parallel)} - running.keys())
                running[slot] = point, start(point, slot)
                say("started", point)
            if not running:
                return signals[0] if signals else 0
            if signals and not passed_on:
                passed_on = signal.SIGTERM if signals[0] in WARNINGS else signals[0]
                for _, process in running.values():
                    process.send_signal(passed_on)
            for slot, (point, process) in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[slot]
                    say(*_ended(folder, point, code))
            if running:
                clock.sleep(POLL_S)


def command(
    folder: SweepDir, lock: int | None = None, gpus: int = 0, changes: Sequence[str] = ()
) -> Start:
    """Return what starts a point's run, or goes on with it, in a session of its own.

    Parameters
    ----------
    folder : SweepDir
    lock : int, optional
        File descriptor that points keep open until they have ended.
    gpus : int
        Of this machine, that each slot has for itself.
    changes : sequence of str
        Overrides after the point's own.
    """
    config_dir = folder.config_dir()

    def start(point: Point, slot: int) -> Process:
        run_dir = private_folder(folder.run_dir(point))
        words = [sys.executable, "-m", "flwr_hpc.run"]
        if (run_dir / "run.json").exists():
            words.append(f"resume={run_dir}")
        else:
            words += [*point.overrides, f"run_dir={run_dir}"]
            words += [f"--config-dir={config_dir}"] if config_dir else []
        words += changes
        with open(folder.log(point), "ab") as log:
            return subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=() if lock is None else (lock,),
                start_new_session=True, env=os.environ | _devices(slot, gpus) | {"COLUMNS": "200"},
            )  # fmt: skip

    return start


def visible_devices() -> list[str]:
    """Return the GPUs that this process is given, empty if nobody says which."""
    return [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]


def _devices(slot: int, gpus: int) -> dict[str, str]:
    """Return the environment that gives a slot its own of this machine's GPUs."""
    if not gpus:
        return {}
    mine = slice(slot * gpus, (slot + 1) * gpus)
    devices = visible_devices() or [str(k) for k in range(mine.stop)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices[mine])}


def failure(folder: SweepDir, point: Point, code: int) -> str:
    """Return why a point failed: its command's last word about it, else its summary's."""
    lines = folder.log(point).read_text(errors="replace").splitlines()
    for line in reversed(lines):
        kind, _, words = line.partition(": ")
        if kind in ("error", "failed") and words:
            return words.partition("   (see ")[0]
    error = (read_json(folder.run_dir(point) / "summary.json") or {}).get("error")
    return str(error or f"exit code {code}, see {folder.log(point)}")


def _ended(folder: SweepDir, point: Point, code: int) -> tuple[str, Point]:
    """Write down how a point ended; one that a signal ended is to go on."""
    if code < 0 or code >= 128:
        return "interrupted", folder.end(point, None)
    if code:
        return "failed", folder.end(point, code, failure(folder, point, code))
    return "finished", folder.end(point, 0)


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Note the signals that ask us to stop; points end cleanly, however often Ctrl-C is pressed."""
    noted: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        noted.append(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
