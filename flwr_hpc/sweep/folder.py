"""The folder of a sweep: its points, how each ended, and who works on it."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from flwr_hpc.errors import UserError
from flwr_hpc.files import private_folder, publish, read_json, try_lock

POINTS, LOCK, END = "points.json", "lock", "end.json"


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

        points.json     every point's settings     lock
        NNN/            a run directory per point, its run.log and, once it has ended, end.json
        jobs/NNN/       the jobs that points share
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
        return [self._with_end(Point(**one)) for one in raw["points"]]

    def config_dir(self) -> str | None:
        """Return the folder of further configuration that the sweep began with."""
        config_dir: str | None = self._head().get("config_dir")
        return config_dir

    def ranks_per_point(self) -> int | None:
        """Return what a point takes of a node where points share jobs; None: they do not."""
        ranks: int | None = self._head().get("ranks_per_point")
        return ranks

    @property
    def token(self) -> str:
        """Names the sweep in its jobs."""
        return str(self._head()["token"])

    @property
    def jobs(self) -> Path:
        """Where the jobs that points share have their folders."""
        return self.path / "jobs"

    def run_dir(self, point: Point) -> Path:
        return self.path / point.name

    def log(self, point: Point) -> Path:
        """Where a point's command writes what it says."""
        return self.run_dir(point) / "run.log"

    def add(
        self,
        points: Sequence[Sequence[str]],
        config_dir: str | None,
        ranks_per_point: int | None = None,
    ) -> list[Point]:
        """Add the points that are not there yet; return all."""
        here = self.points() if self.exists else []
        known = [point.overrides for point in here]
        for overrides in points:
            if list(overrides) not in known:
                here.append(Point(f"{len(here):03d}", list(overrides)))
        private_folder(self.path)
        head = {
            "token": self._head().get("token") or secrets.token_hex(3),
            "config_dir": config_dir and str(Path(config_dir).expanduser().absolute()),
            "ranks_per_point": ranks_per_point,
        }
        body = head | {"points": [{"name": p.name, "overrides": p.overrides} for p in here]}
        publish(self.path / POINTS, json.dumps(body, indent=2) + "\n")
        return here

    def end(self, point: Point, code: int | None, reason: str = "") -> Point:
        """Write down how a point ended; None: it is to go on."""
        path = private_folder(self.run_dir(point)) / END
        if code is None:
            path.unlink(missing_ok=True)
        else:
            publish(path, json.dumps({"code": code, "reason": reason}) + "\n")
        return self._with_end(point)

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

    def _head(self) -> dict[str, Any]:
        return read_json(self.path / POINTS) or {}

    def _with_end(self, point: Point) -> Point:
        end = read_json(self.run_dir(point) / END) or {"code": None, "reason": ""}
        return dataclasses.replace(point, **end)
