"""``python -m flwr_hpc.gate flower-superlink ...``: a server of Flower's, for this user alone.

Flower's SuperLink and SuperNode do what anybody says who reaches their port, and every user of a
host reaches its ports. Behind the gate they serve processes of the user who started them; any
other gets 403. The rest of the command line is the program's own, e.g.

  python -m flwr_hpc.gate flower-superlink --insecure
  python -m flwr_hpc.gate flower-supernode --insecure --superlink 127.0.0.1:8000
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any

from flwr_hpc.errors import UserError, exit_code
from flwr_hpc.files import keep_files_private
from flwr_hpc.gate import peers

PROGRAMS = ("flower-superlink", "flower-supernode")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program to its end; exit code 2 if owners cannot be told here."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    if peers.check(args.shared_host):
        from flwr_hpc.gate.door import install

        install(args.reserved_port)
    else:
        print(
            "no gate (--shared-host): other users of this host can run code as you", file=sys.stderr
        )
    keep_files_private()
    program = _program(args.program)
    sys.argv = [args.program, *args.arguments]
    program()
    return 0


def _program(name: str) -> Callable[[], Any]:
    """Return the function behind a console script of Flower's."""
    for script in entry_points(group="console_scripts", name=name):
        if script.dist and script.dist.name == "flwr":
            program: Callable[[], Any] = script.load()
            return program
    raise UserError(f"the program '{name}' is not installed. Fix it with: pip install flwr")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flwr_hpc.gate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shared-host",
        action="store_true",
        help="start even where this system does not say whose a connection is: every user of "
        "this host can then run code as you",
    )
    parser.add_argument("--reserved-port", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the program")
    return parser


if __name__ == "__main__":
    sys.exit(main())
