"""The lab for a person: ``python -m tests.lab up|down|status|exec|kill|start|link``, as root."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import subprocess
import sys
from dataclasses import fields, replace

from .centres import CENTRES, Centres
from .cluster import Cluster
from .host import HOME, LabError, alive, missing, python, sweep
from .plan import Shape
from .remote import Host

WAN = "wan"  # the name of the hosts that are brought up by hand
PORT = 8443
ONE_MODEL = "Train one model, line by line"
CONF = HOME / "conf"  # a folder for --config-dir, with a facility of every cluster's name


def up(args: argparse.Namespace) -> None:
    """Bring clusters up and say what to type next."""
    typed = f"{python()} -m tests.lab {shlex.join(sys.argv[1:])}"
    if reason := missing("make lab" if os.environ.get("MAKELEVEL") else typed):
        raise LabError(reason)
    if not args.centres and not args.names:
        raise LabError("name a cluster: up lab_a; or: up --centres")
    given = {f.name: getattr(args, f.name) for f in fields(Shape) if f.name in args}
    if args.centres:
        up_centres(Shape(**given))
        return
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


def up_centres(shape: Shape) -> None:
    """Bring a server and two Slurm centres up, and say what to type at each."""
    if alive(HOME / WAN):
        centres = Centres.named(WAN)
    else:
        sites = [CENTRES[0], *(replace(site, slurm=shape) for site in CENTRES[1:])]
        centres = Centres.up(WAN, sites, keep=True)
    me = f"{python()} -m tests.lab"
    print("Three hosts that share nothing; only SSH comes in at a centre. Enter them with:")
    for host in centres.hosts.values():
        print(f"  {me} exec {host.name} bash    # {host.user}@{host.address}, python has flwr-hpc")
        if host.cluster:
            print(f"    sinfo; python -m flwr_hpc.doctor --config-dir conf +facility={host.name}")
    first, *others = centres.hosts.values()
    print(f"{ONE_MODEL} (what goes on takes a terminal of its own):")
    for host, words in one_model(centres):
        print(f"  {me} exec {host.name} {shlex.join(words)}")
    print(
        f"""Further:
  {me} exec --user stranger {first.name} bash
  {me} exec {first.name} ssh {others[0].name}
  {me} link {others[0].name} --rate-mbit 20 --rtt-ms 80 --loss 0.01
  {me} link {others[0].name} down    # up, half-open
  {me} kill {others[0].name} all    # a reboot
  {me} down {WAN}"""
    )


def one_model(centres: Centres) -> list[tuple[Host, list[str]]]:
    """Return what to type at which host: `serve`, its invitations on their way, `join`s."""
    server, *sites = centres.hosts.values()
    names = ",".join(site.name for site in sites)
    where = [f"serve.address={server.name}:{PORT}", f"serve.sites=[{names}]", "run_dir=run"]
    module = ["python", "-m"]
    typed = [(server, [*module, "flwr_hpc.serve", *where, "rounds=2", "train.steps=50"])]
    for site, package in zip(sites, ("json", "logging"), strict=True):
        letter = f"run/invitations/{site.name}.json"
        typed.append((server, ["scp", "-p", letter, f"{site.name}:"]))
        own = ["--config-dir=conf", f"+facility={site.name}", f"data.paths=[{package}]"]
        typed.append((site, [*module, "flwr_hpc.join", f"{site.name}.json", *own]))
    return typed


def link(args: argparse.Namespace) -> None:
    """Change a host's line to the wide-area network, and show what it carried."""
    line = Centres.named(WAN)[args.name].link
    actions = {"up": line.up, "down": line.down, "half-open": line.half_open}
    if args.state:
        actions[args.state]()
    else:
        line.set(rate_mbit=args.rate_mbit, rtt_ms=args.rtt_ms, loss=args.loss)
    print(line.traffic())


def host_named(name: str) -> Host | None:
    """Return the host of that name, if there is one."""
    return Centres.named(WAN).hosts.get(name) if alive(HOME / WAN) else None


def down(args: argparse.Namespace) -> None:
    """Take clusters down; if none is named, all that were brought up by hand, hosts too."""
    if alive(HOME / WAN) and (not args.names or WAN in args.names):
        Centres.named(WAN).down()
        print(f"{WAN}: gone")
    for name in args.names or sorted(p.stem for p in CONF.glob("facility/*.yaml")):
        if name != WAN and alive(HOME / name):
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
    for folder in sorted(p.parent for p in HOME.glob("*/layout.json") if alive(p.parent)):
        cluster = Cluster.named(folder.name)
        print(f"{cluster.name}: SLURM_CONF={cluster.conf}")
        with contextlib.suppress(LabError):
            print(cluster.slurm("sinfo", "-N", "-p", "main") + cluster.slurm("squeue"))


def execute(args: argparse.Namespace) -> None:
    """Run a command on a host, as its user; or, as root, on a login node or compute node."""
    if not args.node and (host := host_named(args.name)):
        argv = host.command(*args.command, user=args.user)
        sys.exit(subprocess.run(argv, check=False).returncode)
    argv = Cluster.named(args.name).inside(*args.command, node=args.node)
    sys.exit(subprocess.run(argv, check=False).returncode)


def kill(args: argparse.Namespace) -> None:
    """Kill -9 a daemon, or a node; `all` that runs on a host."""
    if args.daemon == "all" and (host := host_named(args.name)):
        host.kill_all()
        return
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
        command.add_argument("names", nargs="*", metavar="NAME")
        if function is up:
            command.add_argument("--centres", action="store_true", help=up_centres.__doc__)
            for name in ("nodes", "cpus", "memory_mb", "gpus", "grace_s"):
                flag = f"--{name.replace('_', '-')}"
                command.add_argument(flag, type=int, default=argparse.SUPPRESS)
            command.add_argument("--ssh", action="store_true", help="run sshd")
            command.add_argument("--no-accounting", dest="accounting", action="store_false")
    commands.add_parser("status", help=status.__doc__).set_defaults(function=status)
    command = commands.add_parser("exec", help=execute.__doc__)
    command.set_defaults(function=execute)
    command.add_argument("--node", default="")
    command.add_argument("--user", default="", help="of a host: stranger, root")
    command.add_argument("name", metavar="NAME")
    command.add_argument("command", nargs=argparse.REMAINDER)
    command = commands.add_parser("link", help=link.__doc__)
    command.set_defaults(function=link)
    command.add_argument("name", metavar="HOST")
    command.add_argument("state", nargs="?", choices=["up", "down", "half-open"])
    command.add_argument("--rate-mbit", type=float)
    command.add_argument("--rtt-ms", type=float, default=0.0)
    command.add_argument("--loss", type=float, default=0.0)
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
