"""``python -m flwr_hpc.run -m``: the same run at every combination of values."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

from rich.console import Console
from rich.table import Table

from flwr_hpc.config.compose import compose_config
from flwr_hpc.config.facility import walltime_s
from flwr_hpc.config.overrides import read, split_resume
from flwr_hpc.config.schema import Config
from flwr_hpc.errors import UserError
from flwr_hpc.files import keep_files_private
from flwr_hpc.schedulers.accounts import settle_accounts
from flwr_hpc.schedulers.registry import check_facilities, make_scheduler
from flwr_hpc.server import preflight
from flwr_hpc.sweep.drive import Say, command, run_points, visible_devices
from flwr_hpc.sweep.folder import Point, SweepDir
from flwr_hpc.sweep.options import SweepOptions, split_options
from flwr_hpc.sweep.points import expand, varied
from flwr_hpc.sweep.room import Room, room_for
from flwr_hpc.sweep.show import report
from flwr_hpc.tracking.text import hours


class Drive(Protocol):
    """Runs points to their ends; returns the signal that ended the sweep, or 0."""

    def __call__(self, points: Sequence[Point], *, say: Say) -> int: ...


def run_sweep(overrides: Sequence[str], config_dir: str | None) -> int:
    """Run the points that have not ended, print the table, return the command's exit code."""
    options, rest = split_options(overrides)
    dry_run = any(read(o).value() is True for o in rest if o.startswith("dry_run="))
    rest = [o for o in rest if not o.startswith("dry_run=")]
    resumed, rest = split_resume(rest)
    folder = SweepDir.at(resumed or options.dir)
    if resumed:
        if rest:
            raise UserError(
                f"'{rest[0]}': a sweep that is resumed keeps its points. To add some, repeat the "
                f"whole command with sweep.dir={resumed}"
            )
        planned = [point.overrides for point in folder.points()]
        config_dir = config_dir or folder.config_dir()
    else:
        planned = expand(rest)
    _check_number(len(planned), options)
    ranks = _ranks_per_point(folder, options)
    configs = [_checked(point, config_dir) for point in planned]
    room = room_for(configs, ranks) if ranks else None
    gpus = max(_gpus_here(config) for config in configs)
    _check_room(gpus, options.parallel)
    _check_one_can_start(configs)
    console = Console()
    if dry_run:
        _show(console, planned, configs, room)
        return 0
    if room:
        settle_accounts({room.name: room.job})
    keep_files_private()
    with folder.lock() as lock:
        points = [p for p in folder.add(planned, config_dir, ranks) if p.overrides in planned]
        if room:
            drive = partial(_in_jobs, folder, room, console)
        else:
            start = command(folder, lock, gpus)
            drive = partial(run_points, folder, parallel=options.parallel, start=start)
        return _run(folder, points, options, drive, console)


def _run(
    folder: SweepDir, points: Sequence[Point], options: SweepOptions, drive: Drive, console: Console
) -> int:
    def say(what: str, point: Point) -> None:
        reason = f": {point.reason}" if point.reason else ""
        line = f"point {point.name}  {_settings(points, point)}  {what}{reason}"
        console.print(line, soft_wrap=True, highlight=False, markup=False)

    todo = [p for p in points if p.code is None or (p.code and options.retry_failed)]
    console.print(f"sweep directory: {folder.path}", soft_wrap=True, highlight=False)
    if ended := len(points) - len(todo):
        console.print(f"{ended} of {len(points)} points have ended before", highlight=False)
    number = drive(todo, say=say) if todo else 0
    with suppress(KeyboardInterrupt):
        report(folder, console)
    mine = {point.name for point in points}
    return _conclude(folder, [p for p in folder.points() if p.name in mine], number, console)


def _in_jobs(
    folder: SweepDir, room: Room, console: Console, points: Sequence[Point], say: Say
) -> int:
    from flwr_hpc.sweep.shared_jobs import SharedJobs  # later: submitit

    def tell(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False, markup=False)

    tell(str(room))
    return SharedJobs(folder, room, make_scheduler(room.job), say, tell).run(points)


def _ranks_per_point(folder: SweepDir, options: SweepOptions) -> int | None:
    """Return what a point takes of a job that it shares; a sweep that is there keeps it."""
    asked = options.ranks_per_point
    before = folder.ranks_per_point() if folder.exists else asked
    if asked not in (None, before):
        raise UserError(
            f"sweep.ranks_per_point={asked}: the sweep in {folder.path} began with "
            f"{before or 'jobs for each point'}, and its points keep it. Leave it out, or begin "
            "another one: sweep.dir=FOLDER"
        )
    return before


def _conclude(folder: SweepDir, points: Sequence[Point], number: int, console: Console) -> int:
    """Say what is left to do."""
    path = shlex.quote(str(folder.path))
    left = sum(p.code is None for p in points)
    failed = sum(bool(p.code) for p in points)
    go_on = f"python -m flwr_hpc.run resume={path}"
    lines = []
    if failed:
        lines.append(f"{failed} failed; to try them again: {go_on} sweep.retry_failed=true")
    if left:
        lines.append(f"{left} of {len(points)} points have not ended; go on with: {go_on}")
    lines.append(f"table and plots again: python -m flwr_hpc.report {path}")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if number:
        return 128 + number
    return 1 if left or failed == len(points) else 0


def _check_number(count: int, options: SweepOptions) -> None:
    if count > options.max_points:
        raise UserError(
            f"{count} points are more than sweep.max_points={options.max_points}. "
            f"If so many are meant, add to the command: sweep.max_points={count}"
        )


def _gpus_here(config: Config) -> int:
    """Return how many GPUs of this machine a point takes."""
    return sum(f.gpus_per_node for f in config.facilities.values() if f.local)


def _check_room(gpus: int, parallel: int) -> None:
    """Refuse more points at a time than there are GPUs for, as far as that is known."""
    here = len(visible_devices())
    if here and gpus * parallel > here:
        raise UserError(
            f"sweep.parallel={parallel} points of {gpus} GPUs each do not fit: this process has "
            f"{here} (CUDA_VISIBLE_DEVICES). Give sweep.parallel={max(1, here // gpus)}"
        )


def _checked(overrides: Sequence[str], config_dir: str | None) -> Config:
    """Compose a point's configuration, so that a mistake is found before anything runs."""
    config = compose_config(overrides, config_dir)
    if config.serve.address:
        raise UserError("a sweep runs at facilities of its own; leave serve.address out")
    check_facilities(config.facilities)
    return config


def _check_one_can_start(configs: Sequence[Config]) -> None:
    """Refuse a sweep of which no point could start; one that could not alone is a failed point."""
    errors = []
    for config in configs:
        try:
            return preflight.check(config)
        except UserError as exc:
            errors.append(exc)
    raise errors[0]


def _show(
    console: Console,
    planned: Sequence[Sequence[str]],
    configs: Sequence[Config],
    room: Room | None,
) -> None:
    settings = varied(planned)
    table = Table(title=f"{len(planned)} points")
    for name in ("point", *settings[0]):
        table.add_column(name)
    for i, one in enumerate(settings):
        table.add_row(f"{i:03d}", *one.values())
    console.print(table)
    for line in [str(room)] if room else node_hours(configs):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def node_hours(configs: Sequence[Config]) -> list[str]:
    """Return what the points' jobs can take at most, a line per facility."""
    lines = []
    for name in dict.fromkeys(name for c in configs for name in c.facilities):
        here = [(c, c.facilities[name]) for c in configs if name in c.facilities]
        if all(f.local for _, f in here):
            continue
        one_job = [f.nodes * walltime_s(f.walltime) / 3600 for _, f in here]
        limits = [c.site.limits.node_hours for c, _ in here]
        if None not in limits:
            most = sum(limit for limit in limits if limit is not None)
            lines.append(f"{name}: at most {hours(most)} node-hours (site.limits.node_hours)")
        else:
            lines.append(
                f"{name}: at most {hours(sum(one_job))} node-hours with one job per point; a point "
                "that outlives its job takes another one, unless site.limits.node_hours bounds it"
            )
    return lines or ["every point runs on this machine: no node-hours"]


def _settings(points: Sequence[Point], point: Point) -> str:
    settings = varied([p.overrides for p in points])
    mine = next(s for p, s in zip(points, settings, strict=True) if p.name == point.name)
    return " ".join(f"{key}={value}" for key, value in mine.items())
