"""The folder of a sweep: its points, how each ended, and who works on it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from flwr_hpc.errors import UserError
from flwr_hpc.files import private_folder, publish, read_json, try_lock

POINTS, LOCK = "points.json", "lock"


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str  # Its folder in that of the sweep
    overrides: list[str]
    # The exit code of its run, None until it has ended; what was interrupted has not.
    code: int | None = None
    reason: str = ""  # Why it failed


@dataclass(frozen=True)
class SweepDir:
    """One sweep's folder.

    ::

        points.json     every point: its settings, how it ended     lock
        NNN/            a run directory per point, and its run.log
        sweep.json, sweep.csv, sweep.png     the report
    """

    path: Path

    @classmethod
    def at(cls, folder: str | None) -> SweepDir:
        """Return the folder that is named, or a new one's."""
        now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        return cls(Path(folder or f"sweeps/{now}").expanduser().absolute())

    @property
    def exists(self) -> bool:
        """Whether a sweep has begun here."""
        return (self.path / POINTS).is_file()

    def points(self) -> list[Point]:
        """Return all points, in order."""
        raw = read_json(self.path / POINTS)
        if raw is None:
            raise UserError(f"{self.path} is not the folder of a sweep: it holds no {POINTS}")
        return [Point(**one) for one in raw["points"]]

    def config_dir(self) -> str | None:
        """Return the folder of further configuration that the sweep began with."""
        raw = read_json(self.path / POINTS) or {}
        return raw.get("config_dir")

    def run_dir(self, point: Point) -> Path:
        return self.path / point.name

    def log(self, point: Point) -> Path:
        """Where a point's command writes what it says."""
        return self.run_dir(point) / "run.log"

    def add(self, points: Sequence[Sequence[str]], config_dir: str | None) -> list[Point]:
        """Add the points that are not there yet; return all."""
        here = self.points() if self.exists else []
        known = [point.overrides for point in here]
        for overrides in points:
            if list(overrides) not in known:
                here.append(Point(f"{len(here):03d}", list(overrides)))
        private_folder(self.path)
        self._write(here, config_dir and str(Path(config_dir).expanduser().absolute()))
        return here

    def end(self, point: Point, code: int | None, reason: str = "") -> Point:
        """Write down how a point ended; None: it is to go on."""
        ended = dataclasses.replace(point, code=code, reason=reason)
        points = [ended if p.name == point.name else p for p in self.points()]
        self._write(points, self.config_dir())
        return ended

    @contextmanager
    def lock(self) -> Iterator[int]:
        """Hold the sweep for one command, and for the points that a killed one has left."""
        private_folder(self.path)
        with open(self.path / LOCK, "a+") as file:
            if not try_lock(file):
                raise UserError(
                    f"{self.path} is in use by another flwr_hpc.run -m, or by the points of one "
                    "that was killed, which go on to their ends. Try again after that"
                )
            yield file.fileno()

    def _write(self, points: Sequence[Point], config_dir: str | None) -> None:
        body = {"config_dir": config_dir, "points": [dataclasses.asdict(p) for p in points]}
        publish(self.path / POINTS, json.dumps(body, indent=2) + "\n")
