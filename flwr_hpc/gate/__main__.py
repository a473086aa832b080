"""``python -m flwr_hpc.gate flower-superlink ...``: a server of Flower's, for this user alone.

Flower's SuperLink and SuperNode do what anybody says who reaches their port, and every user of a
host reaches its ports. Behind the gate they serve processes of the user who started them; any
other gets 403. The rest of the command line is the program's own, e.g.

  python -m flwr_hpc.gate flower-superlink --insecure
  python -m flwr_hpc.gate flower-supernode --insecure --superlink 127.0.0.1:8000
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from flwr_hpc.config.command_line import command_parser
from flwr_hpc.errors import UserError, exit_code
from flwr_hpc.files import keep_files_private
from flwr_hpc.gate import peers
from flwr_hpc.gate.credentials import Guests

if TYPE_CHECKING:
    from flwr_hpc.gate.door import Outside

PROGRAMS = ("flower-superlink", "flower-supernode")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program to its end; exit code 2 if owners cannot be told here."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    if peers.check(args.shared_host):
        from flwr_hpc.gate.door import install

        install(args.reserved_port, _outside(args))
    elif args.public:
        raise UserError("--public needs the gate, which this system cannot give: use Linux")
    else:
        print(
            "no gate (--shared-host): other users of this host can run code as you", file=sys.stderr
        )
    keep_files_private()
    program = _program(args.program)
    sys.argv = [args.program, *args.arguments]
    program()
    return 0


def leave(code: int) -> NoReturn:
    """End this process although a thread goes on.

    A SuperNode that gives its server up, as after a TLS handshake that took too long, ends its
    work; but the thread of its own server would keep it, and nobody would start it again.
    """
    if any(t is not threading.main_thread() and not t.daemon for t in threading.enumerate()):
        print("the program has ended its work, but not itself", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(code or 1)
    sys.exit(code)


def _outside(args: argparse.Namespace) -> Outside | None:
    """Return the public socket, if one is asked for."""
    if not args.public:
        return None
    from flwr_hpc.exchange.http_server import Limits, exchange_app
    from flwr_hpc.gate.door import Outside
    from flwr_hpc.gate.outside import App, PublicApp
    from flwr_hpc.gate.transfers import TransferReport, report_start

    host, _, port = args.public.rpartition(":")
    host = host.strip("[]")
    guests = Guests(Path(args.credentials))
    report = TransferReport(Path(args.events), Guests(Path(args.credentials)))

    def wrap(flower: App) -> App:
        limits = Limits(int(args.quota_gb * 1e9))
        exchange = exchange_app(Path(args.exchange), guests.folder_of_token, limits, report=report)
        started = partial(report_start, Path(args.events))
        return PublicApp(flower, guests, exchange, json.loads(args.welcome), started)

    every = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if every or ":" in host else socket.AF_INET
    try:
        door = socket.create_server((host, int(port)), family=family, dualstack_ipv6=every)
    except OSError as exc:
        raise UserError(f"serve.listen={args.public}: {exc.strerror or exc}") from None
    return Outside(door, wrap)


def _program(name: str) -> Callable[[], Any]:
    """Return the function behind a console script of Flower's."""
    for script in entry_points(group="console_scripts", name=name):
        if script.dist and script.dist.name == "flwr":
            program: Callable[[], Any] = script.load()
            return program
    raise UserError(f"the program '{name}' is not installed. Fix it with: pip install flwr")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("gate", __doc__)
    parser.add_argument(
        "--shared-host",
        action="store_true",
        help="start even where this system does not say whose a connection is: every user of "
        "this host can then run code as you",
    )
    parser.add_argument("--reserved-port", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--public", metavar="HOST:PORT", help="a second socket, for sites of a run")
    parser.add_argument("--credentials", metavar="FILE", help="who may come in there")
    parser.add_argument("--exchange", metavar="DIR", help="the run's store of payloads")
    parser.add_argument("--quota-gb", type=float, default=1000.0, help="of each site in there")
    parser.add_argument("--events", metavar="FILE", help="where it reports what it sees")
    parser.add_argument("--welcome", default="{}", help=argparse.SUPPRESS)
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the program")
    return parser


if __name__ == "__main__":
    leave(main())
