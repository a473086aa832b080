"""Slurm clusters for a person: ``python -m tests.lab up|down|status|exec|kill|start``, as root."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import subprocess
import sys
from dataclasses import fields

from .cluster import Cluster
from .host import HOME, LabError, alive, missing, python, sweep
from .plan import Shape

CONF = HOME / "conf"  # a folder for --config-dir, with a facility of every cluster's name


def up(args: argparse.Namespace) -> None:
    """Bring clusters up and say what to type next."""
    typed = f"{python()} -m tests.lab {shlex.join(sys.argv[1:])}"
    if reason := missing("make lab" if os.environ.get("MAKELEVEL") else typed):
        raise LabError(reason)
    given = {f.name: getattr(args, f.name) for f in fields(Shape) if f.name in args}
    shape = Shape(**given, user=os.environ.get("SUDO_USER", "root"))
    (CONF / "facility").mkdir(parents=True, exist_ok=True)
    for name in args.names:
        there = alive(HOME / name)
        cluster = Cluster.named(name) if there else Cluster.up(name, shape, keep=True)
        (CONF / "facility" / f"{name}.yaml").write_text(cluster.layout.render("facility.yaml.j2"))
        print(f"{name}: SLURM_CONF={cluster.conf}")
    first, me = args.names[0], python()
    print(
        f"""
Try one of these:
  SLURM_CONF={HOME}/{first}/slurm.conf sinfo
  {me} -m flwr_hpc.run --config-dir {CONF} '+facility=[{",".join(args.names)}]'
  {me} -m tests.lab exec {first} bash           # on its login node
  {me} -m tests.lab kill {first} {first}-n1     # a power cut; `start` brings the node back
  {me} -m tests.lab down {" ".join(args.names)}"""
    )


def down(args: argparse.Namespace) -> None:
    """Take clusters down; if none is named, all that were brought up by hand."""
    for name in args.names or sorted(p.stem for p in CONF.glob("facility/*.yaml")):
        if alive(HOME / name):
            Cluster.named(name).down()
            print(f"{name}: gone")
        with contextlib.suppress(FileNotFoundError):
            (CONF / "facility" / f"{name}.yaml").unlink()
    for folder in (CONF / "facility", CONF):
        with contextlib.suppress(OSError):
            folder.rmdir()
    sweep()


def status(args: argparse.Namespace) -> None:
    """Show what every cluster says of its nodes and jobs."""
    for folder in sorted(p for p in HOME.glob("*") if alive(p)):
        cluster = Cluster.named(folder.name)
        print(f"{cluster.name}: SLURM_CONF={cluster.conf}")
        with contextlib.suppress(LabError):
            print(cluster.slurm("sinfo", "-N", "-p", "main") + cluster.slurm("squeue"))


def execute(args: argparse.Namespace) -> None:
    """Run a command on a login node or compute node."""
    argv = Cluster.named(args.name).inside(*args.command, node=args.node)
    sys.exit(subprocess.run(argv, check=False).returncode)


def kill(args: argparse.Namespace) -> None:
    """Kill -9 a daemon, or a node."""
    Cluster.named(args.name).kill(args.daemon, args.node)


def start(args: argparse.Namespace) -> None:
    """Start a daemon, or a node."""
    Cluster.named(args.name).start(args.daemon, args.node)


def arguments() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for function in (up, down):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(function=function)
        command.add_argument("names", nargs="+" if function is up else "*", metavar="NAME")
        if function is up:
            for name in ("nodes", "cpus", "memory_mb", "gpus", "grace_s"):
                flag = f"--{name.replace('_', '-')}"
                command.add_argument(flag, type=int, default=argparse.SUPPRESS)
            command.add_argument("--ssh", action="store_true", help="run sshd")
            command.add_argument("--no-accounting", dest="accounting", action="store_false")
    commands.add_parser("status", help=status.__doc__).set_defaults(function=status)
    command = commands.add_parser("exec", help=execute.__doc__)
    command.set_defaults(function=execute)
    command.add_argument("--node", default="")
    command.add_argument("name", metavar="NAME")
    command.add_argument("command", nargs=argparse.REMAINDER)
    for function in (kill, start):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(function=function)
        command.add_argument("name", metavar="NAME")
        command.add_argument("daemon", help="slurmctld, slurmdbd, a node; or, with --node, slurmd")
        command.add_argument("--node", default="")
    return parser


def main() -> None:
    """Do what the command line says."""
    args = arguments().parse_args()
    os.umask(0o022)  # under sudo the clusters are for another user
    try:
        args.function(args)
    except LabError as exc:
        sys.exit(f"error: {exc}")


if __name__ == "__main__":
    main()
