"""``python -m flwr_hpc.doctor``: find what keeps a facility from taking part, and the fix.

To be run on the facility's login node, with the settings of the run to come, or with an invitation
to look at the line to the server that wrote it, e.g.

  python -m flwr_hpc.doctor +facility=leonardo
  python -m flwr_hpc.doctor --config-dir my-conf +facility=mycluster --no-job
  python -m flwr_hpc.doctor +facility=local_a --json
  python -m flwr_hpc.doctor lumi.json

What collectives reach between its devices, for python -m flwr_hpc.plan to plan by:

  python -m flwr_hpc.doctor --bandwidth +facility=leonardo

Whether a host of your ~/.ssh/config could be a site of a run that is started here:

  python -m flwr_hpc.doctor ssh=HOST python=/path/there/bin/python

Of a facility it looks around here, then submits a job of at most ten minutes that looks around on
the compute nodes. The job is cancelled when this command ends, however it ends. To a server it
sends up to 50 MB and fetches them again. Nothing else is changed, but that measured bandwidths are
kept in ~/.config/flwr-hpc.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from flwr_hpc.clock import Clock, SystemClock
from flwr_hpc.config.command_line import add_settings, command_parser
from flwr_hpc.config.compose import compose_config
from flwr_hpc.config.facility import walltime_s
from flwr_hpc.config.folder import conf_dir
from flwr_hpc.config.schema import Config
from flwr_hpc.doctor import line, ssh
from flwr_hpc.doctor.examine import FacilityExam, Stopped, patient, probing, settled
from flwr_hpc.doctor.findings import Finding, skipped
from flwr_hpc.doctor.nodes import JOB, NODES
from flwr_hpc.doctor.show import as_json, show, show_bandwidths, verdict
from flwr_hpc.errors import UserError, exit_code
from flwr_hpc.files import keep_files_private
from flwr_hpc.plan.bandwidth import keep
from flwr_hpc.schedulers.accounts import settle_accounts
from flwr_hpc.schedulers.registry import check_facilities


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    0 nothing failed, 1 some check failed, 2 bad usage, 128 + n ended by signal n.
    """
    args = _parser().parse_intermixed_args(argv)
    return exit_code(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    keep_files_private()
    _check_bandwidth(args)
    if ssh.wants_ssh(args.overrides):
        return _show_found(ssh.examine(args.overrides), args.json)
    if line.names_invitation(args.overrides):
        return _show_found(line.examine(args.overrides), args.json)
    config = _configure(args)
    queue_s = _timeout_s(args.timeout)
    clock = SystemClock()
    patients = [
        patient(config, n, clock, queue_s, args.nodes, args.bandwidth) for n in config.facilities
    ]
    if config.dry_run:
        return _show_scripts(patients)
    return _examine(patients, args, clock)


def _check_bandwidth(args: argparse.Namespace) -> None:
    if args.bandwidth and args.no_job:
        raise UserError("--bandwidth is measured in a job: leave out --no-job")
    if args.bandwidth and (ssh.wants_ssh(args.overrides) or line.names_invitation(args.overrides)):
        raise UserError(
            "--bandwidth is measured at a facility, from its login node: "
            "python -m flwr_hpc.doctor --bandwidth +facility=NAME"
        )


def _configure(args: argparse.Namespace) -> Config:
    if not any(o.lstrip("+~").startswith("facilit") for o in args.overrides):
        known = sorted(p.stem for p in (conf_dir() / "facility").glob("*.yaml"))
        raise UserError(
            f"name the facility to look at, e.g. +facility=local_a. Known: {', '.join(known)}; "
            "one of your own: --config-dir DIR +facility=NAME. The line to a server: name its "
            "invitation"
        )
    if args.nodes < 1:
        raise UserError(f"--nodes {args.nodes} must be at least 1")
    config = compose_config(args.overrides, args.config_dir)
    for name, facility in config.by_ssh.items():
        raise UserError(
            f"facility '{name}' is on {facility.ssh}: look at it there, with "
            f"python -m flwr_hpc.doctor +facility=NAME; at the way to it from here, with "
            f"python -m flwr_hpc.doctor ssh={facility.ssh}"
        )
    check_facilities(config.facilities)
    settle_accounts(config.facilities)
    return config


def _timeout_s(text: str) -> float:
    try:
        seconds = walltime_s(text)
    except UserError:
        raise UserError(f"--timeout {text} is neither minutes nor HH:MM:SS") from None
    if seconds <= 0:
        raise UserError(f"--timeout {text} must be longer than zero; without a job: --no-job")
    return seconds


def _show_scripts(patients: Sequence[FacilityExam]) -> int:
    for one in patients:
        print(f"# probe job of {one.here.name}")
        print(one.here.scheduler.script(one.probe.spec))
    return 0


def _examine(patients: list[FacilityExam], args: argparse.Namespace, clock: Clock) -> int:
    console = Console(quiet=args.json)
    for one in patients:
        show(console, one.here.name, one.look_here())
    chosen = [one for one in patients if one.probeable and not args.no_job]
    for one in patients:
        if one not in chosen:
            why = "--no-job" if args.no_job else "a check above failed that it depends on"
            left_out = replace(skipped(why), name=JOB, where=NODES)
            one.findings.append(left_out)
            show(console, one.here.name, [left_out])
    code = _probe(chosen, console, clock) if chosen else 0
    for one in patients:
        if measured := one.bandwidths:
            show_bandwidths(console, measured, keep(measured))
    failed = _conclude(console, {one.here.name: one.findings for one in patients}, args.json)
    return code or failed


def _show_found(found: Mapping[str, Sequence[Finding]], json: bool) -> int:
    console = Console(quiet=json)
    for name, findings in found.items():
        show(console, name, findings)
    return _conclude(console, found, json)


def _conclude(console: Console, found: Mapping[str, Sequence[Finding]], json: bool) -> int:
    if json:
        print(as_json(found))
    console.print(verdict(found), highlight=False)
    return int(any(f.status == "fail" for findings in found.values() for f in findings))


def _probe(patients: Sequence[FacilityExam], console: Console, clock: Clock) -> int:
    """Run the probe jobs and show what they found; returns 0, or the code of a signal."""
    progress = Console(stderr=True)
    try:
        with probing(patients), _Progress(progress) as tell:
            settled(patients, clock, tell)
    except Stopped as exc:
        ended = ", ".join(one.probe.result.job_id or "none yet" for one in patients)
        print(f"stopped; probe job cancelled: {ended}", file=sys.stderr)
        for one in patients:
            one.look_there()  # counts as not passed
        return 128 + exc.signum
    finally:
        for one in patients:
            if one.probe.left:
                print(f"warning: {one.probe.left}", file=sys.stderr)
    for one in patients:
        show(console, one.here.name, one.look_there())
    return 0


class _Progress:
    """Shows what is waited for: a status line, or a line for every change."""

    def __init__(self, console: Console) -> None:
        self._console, self._said = console, ""
        self._status = console.status("submitting") if console.is_terminal else None

    def __enter__(self) -> _Progress:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._status:
            self._status.stop()

    def __call__(self, text: str) -> None:
        if text == self._said:
            return
        self._said = text
        if self._status:
            self._status.update(text)
        else:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    words = "as of flwr_hpc.run; or an INVITATION"
    parser = add_settings(command_parser("doctor", __doc__), cfg=False, words=words)
    parser.add_argument("--no-job", action="store_true", help="look at this host alone")
    of_nodes = "nodes of the probe job, if the facility has as many (default: 2)"
    parser.add_argument("--nodes", type=int, default=2, metavar="N", help=of_nodes)
    of_timeout = "how long the probe job may wait in the queue (default: 30)"
    parser.add_argument("--timeout", default="30", metavar="MINUTES", help=of_timeout)
    of_bandwidth = "also measure collectives between the job's devices, for flwr_hpc.plan"
    parser.add_argument("--bandwidth", action="store_true", help=of_bandwidth)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
