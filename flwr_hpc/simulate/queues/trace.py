"""Waits of a trace in the Standard Workload Format, replayed in the order of their times."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flwr_hpc.config.folder import conf_dir
from flwr_hpc.errors import UserError
from flwr_hpc.simulate.clock import VirtualClock
from flwr_hpc.simulate.queues.models import SampledQueue

ALIKE = 3.0  # a similar job has between a third and three times the processors and time


@dataclass(frozen=True)
class TraceJob:
    """A job of a trace; times in seconds, -1: not known."""

    submit_s: float
    wait_s: float
    processors: float  # Requested
    requested_s: float

    def similar(self, processors: int, walltime_s: float) -> bool:
        """Return whether a job of that size and length would have waited alike."""
        return _alike(self.processors, processors) and _alike(self.requested_s, walltime_s)


def _alike(found: float, wanted: float) -> bool:
    return found < 0 or wanted / ALIKE <= found <= wanted * ALIKE


def read_trace(path: Path) -> list[TraceJob]:
    """Return the jobs whose wait is known, by submission.

    Columns 2 (submission), 3 (wait), 8 (requested processors) and 9 (requested time) of
    https://www.cs.huji.ac.il/labs/parallel/workload/swf.html are read. A relative path that is
    not under the current folder is looked for among the shipped traces.
    """
    shipped = conf_dir() / "traces" / path
    try:
        text = (path if path.exists() or not shipped.exists() else shipped).read_text(
            errors="replace"
        )
    except OSError as exc:
        raise UserError(f"cannot read the trace {path}: {exc.strerror}") from None
    return sorted(_jobs(path, text), key=lambda job: job.submit_s)


def _jobs(path: Path, text: str) -> Iterator[TraceJob]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith(";"):
            continue
        fields = line.split()
        try:
            job = TraceJob(*(float(fields[column - 1]) for column in (2, 3, 8, 9)))
        except (IndexError, ValueError):
            raise UserError(
                f"{path}, line {number}: not a line of the Standard Workload Format (18 numbers): "
                f"{line[:60]!r}"
            ) from None
        if job.wait_s >= 0:
            yield job


def similar_jobs(path: Path, nodes: int, walltime_s: float) -> list[TraceJob]:
    """Return the jobs of a trace that are like ours in size and length."""
    jobs = [job for job in read_trace(path) if job.similar(nodes, walltime_s)]
    if not jobs:
        raise UserError(
            f"{path}: no job with about {nodes} processors and {walltime_s:.0f} s. Name another "
            "trace, nodes or walltime"
        )
    return jobs


class TraceQueue(SampledQueue):
    """A job waits as long as the next one of the trace did at that time.

    Busy hours stay busy, and two jobs submitted one after the other meet the same load.

    Parameters
    ----------
    clock : VirtualClock
    jobs : sequence of TraceJob
        By submission; after the last comes the first again.
    begin_s : float
        The time of the trace at the simulation's beginning.
    time_scale : float
        Simulated seconds of a second of the trace.
    """

    def __init__(
        self,
        clock: VirtualClock,
        jobs: Sequence[TraceJob],
        begin_s: float = 0.0,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__(clock)
        self._jobs, self._begin_s, self._time_scale = jobs, begin_s, time_scale
        self._times = [job.submit_s - jobs[0].submit_s for job in jobs]

    def wait_s(self) -> float:
        now = self._begin_s + self._clock.now() / self._time_scale
        k = bisect_left(self._times, now % (self._times[-1] or 1.0))
        return self._jobs[k].wait_s * self._time_scale
