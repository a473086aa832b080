"""One node's part of a job that points share: as many at a time as it has room for."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from flwr_hpc.files import keep_files_private
from flwr_hpc.sweep.drive import command, run_points
from flwr_hpc.sweep.folder import Point, SweepDir
from flwr_hpc.worker.ranks import Ranks


def work(
    sweep: str, job: str, names: Sequence[str], per_node: int, gpus: int, changes: Sequence[str]
) -> None:
    """Run points until none is left that no other node has taken.

    Parameters
    ----------
    sweep : str
        The sweep's folder.
    job : str
        The job's.
    names : sequence of str
        Of the points that the job is for.
    per_node, gpus, changes
        See `flwr_hpc.sweep.room.Room`.
    """
    keep_files_private()
    if sys.platform == "linux":  # `launcher_args` may have bound this process as the first rank
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    folder = SweepDir(Path(sweep))
    points = [point for point in folder.points() if point.name in names and point.code is None]
    # A job that was put back in the queue begins anew.
    taken = Path(job) / f"taken-{Ranks.detect().attempt}"
    start = command(folder, gpus=gpus, changes=changes)
    run_points(folder, take(points, taken), per_node, start, _say)


def take(points: Sequence[Point], taken: Path) -> Iterator[Point]:
    """Yield the points that are not taken by another node when they are asked for."""
    taken.mkdir(parents=True, exist_ok=True)
    for point in points:
        try:
            (taken / point.name).touch(exist_ok=False)  # one of all that try succeeds, on NFS too
        except FileExistsError:
            continue
        yield point


def _say(what: str, point: Point) -> None:
    print(f"point {point.name} {what}", flush=True)
