"""A facility's waits as this user's jobs met them, kept across runs.

One file per facility, ``<state>/waits/<facility>.jsonl``, outside any run directory. Each line
is a JSON object with a job's name and what has become known of it; a job's lines add up. So a
line that was cut short costs only itself, and to say a thing twice is harmless.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flwr_hpc.config.facility import FacilityConfig, walltime_s
from flwr_hpc.files import lock, publish

KEPT = 300  # jobs
LONGEST_BYTES = 400_000  # of a file, before the oldest jobs are dropped

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shape:
    """What of a job decides how long it waits."""

    nodes: int
    walltime_s: float
    partition: str = ""
    qos: str = ""


@dataclass(frozen=True)
class Wait:
    """One job's wait, and what had been forecast when it was submitted; in seconds."""

    job: str  # Its name, unique
    submitted_s: float  # Unix seconds
    nodes: int = 1
    walltime_s: float = 0.0
    partition: str = ""
    qos: str = ""
    scheduler: str = ""
    # How long it waited, or is known to have waited so far; None if that is not known.
    waited_s: float | None = None
    # Whether it has started. If not, it may wait still, or it was cancelled: all that is
    # known is that the wait would have been longer.
    over: bool = False
    closed: bool = False  # Nothing more will become known
    # Tells nothing of the queue: the job was held or put back, or could not have run.
    void: bool = False
    plan_s: float | None = None  # The scheduler's own plan at the time
    median_s: float | None = None  # Forecast: median and upper quantile, both of the whole wait
    high_s: float | None = None
    quantile: float = 0.9  # Which one `high_s` is
    source: str = "none"  # As in `flwr_hpc.protocol.Forecast`
    # `high_s` before it was corrected by the record of earlier ones.
    unstretched_s: float | None = None
    by_history_s: float | None = None  # The median that each source alone would have given
    by_plan_s: float | None = None

    @property
    def shape(self) -> Shape:
        return Shape(self.nodes, self.walltime_s, self.partition, self.qos)


def shape_of(facility: FacilityConfig) -> Shape:
    """Return the shape of a facility's jobs."""
    seconds = walltime_s(facility.walltime)
    return Shape(facility.nodes, seconds, facility.partition or "", facility.qos or "")


def waits_folder() -> Path:
    """Return ``$FLWR_HPC_STATE/waits``, by default the user's folder for state."""
    own = os.environ.get("FLWR_HPC_STATE")
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return (Path(own) if own else Path(state) / "flwr-hpc") / "waits"


class History:
    """One facility's file of waits; any number of processes may write to it.

    A forecast is a convenience: a file that cannot be read or written is as good as none.

    Parameters
    ----------
    facility_name : str
    folder : Path or None
        Default: `waits_folder`.
    """

    def __init__(self, facility_name: str, folder: Path | None = None) -> None:
        self.folder = folder or waits_folder()
        self.path = self.folder / f"{quote(facility_name, safe='')}.jsonl"
        self._read: tuple[Any, list[Wait]] = ((), [])  # by the file's version

    def waits(self) -> list[Wait]:
        """Return what is known of every job, in the order of submission."""
        try:
            stat = self.path.stat()
            version = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if self._read[0] != version:
                self._read = version, merge(self._lines())
        except FileNotFoundError:
            return []
        except OSError as exc:
            log.warning("no history of waits: %s", exc)
            return []
        return self._read[1]

    def note(self, job: str, **fields: Any) -> None:
        """Add to what is known of a job; the fields are `Wait`'s."""
        line = json.dumps({"job": job, **fields}, allow_nan=False) + "\n"
        try:
            with lock(self.folder):
                self._append(line)
                if self.path.stat().st_size > LONGEST_BYTES:
                    self._shorten()
        except OSError as exc:
            log.warning("the wait of job %s goes unrecorded: %s", job, exc)

    def _lines(self) -> list[str]:
        return self.path.read_text(errors="replace").splitlines()

    def _append(self, line: str) -> None:
        with open(self.path, "ab+") as f:
            if f.tell() > 0:
                f.seek(-1, os.SEEK_END)
                if f.read(1) != b"\n":  # whoever wrote before was killed amid its line
                    line = "\n" + line
            f.write(line.encode())

    def _shorten(self) -> None:
        kept = merge(self._lines())[-KEPT:]
        publish(self.path, "".join(json.dumps(dataclasses.asdict(w)) + "\n" for w in kept))


def merge(lines: Iterable[str]) -> list[Wait]:
    """Add the lines up to waits, by time of submission; a line that makes no sense is skipped."""
    jobs: dict[str, dict[str, Any]] = {}
    for line in _objects(lines):
        fields = jobs.setdefault(line["job"], {})
        if not fields.get("closed"):
            fields.update(line)
    waits = [Wait(**fields) for fields in jobs.values() if "submitted_s" in fields]
    return sorted(waits, key=lambda wait: wait.submitted_s)


def _objects(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("job"), str):
            yield {key: field for key, field in value.items() if _fits(key, field)}


def _fits(key: str, value: Any) -> bool:
    kind = KINDS.get(key, "")  # annotations are strings here
    if value is None:
        return "None" in kind
    if isinstance(value, bool):
        return kind == "bool"
    if isinstance(value, int | float):
        sound = 0 <= value < 1e15  # which NaN is not
        return sound and (kind.startswith("float") or (kind == "int" and isinstance(value, int)))
    return isinstance(value, str) and kind == "str"


KINDS = {field.name: str(field.type) for field in dataclasses.fields(Wait)}
