"""``python -m flwr_hpc.run``: train one language model across facilities.

Settings are KEY=VALUE, e.g.

  python -m flwr_hpc.run                                  two facilities on this machine
  python -m flwr_hpc.run +facility=leonardo               a centre, from its login node
  python -m flwr_hpc.run strategy=fedbuff rounds=20 train.steps=100
  python -m flwr_hpc.run '+facility=[leonardo,lumi]' facilities.lumi.ssh=HOST   by ssh
  python -m flwr_hpc.run detach=true                      start, and return
  python -m flwr_hpc.run resume=runs/2026-01-31_12-00-00
  python -m flwr_hpc.run end=runs/2026-01-31_12-00-00     end it, and what it has left anywhere
  python -m flwr_hpc.run -m train.lr=1e-4,3e-4 train.batch_size=8,16    a sweep: every combination

The most used: rounds seed strategy model data train.* run_dir resume detach dry_run tracking.
All of them, with their values: python -m flwr_hpc.run --cfg job
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from flwr_hpc.config.command_line import add_settings, command_parser
from flwr_hpc.config.compose import shown
from flwr_hpc.errors import UserError, exit_code
from flwr_hpc.schedulers.accounts import settle_accounts
from flwr_hpc.schedulers.registry import check_facilities
from flwr_hpc.server.run_dir import configure
from flwr_hpc.sweep.options import is_sweep


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code (0, 1 failed, 2 user error, 130 Ctrl-C)."""
    parser = add_settings(command_parser("run", __doc__))
    parser.add_argument("-m", "--multirun", action="store_true", help="run every combination")
    args = parser.parse_intermixed_args(argv)
    return exit_code(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    if folder := _folder_to_end(args.overrides):
        from flwr_hpc.detached.end import end

        return end(folder)
    if args.multirun or is_sweep(args.overrides):
        if args.cfg:
            raise UserError("--cfg shows one run's settings; leave -m out, and give one value each")
        from flwr_hpc.sweep.command import run_sweep  # later, so that a run starts at once

        return run_sweep(args.overrides, args.config_dir)
    config, resumed = configure(args.overrides, args.config_dir)
    if config.serve.address and not (resumed and config.by_ssh):
        raise UserError(
            "a server for sites of other centres is started, and resumed, with: "
            f"python -m flwr_hpc.serve {' '.join(args.overrides)}"
        )
    check_facilities(config.facilities)
    if args.cfg:
        print(shown(config), end="")
        return 0
    from flwr_hpc.server import session  # later, so that --cfg and errors answer at once

    accounts = settle_accounts(config.here)
    if config.dry_run:
        return session.show_plan(config, accounts)
    if config.detach:
        from flwr_hpc.detached.start import start

        return start(config, resumed)
    return session.run(config, resumed, accounts)


def _folder_to_end(overrides: list[str]) -> str:
    """Return what ``end=`` names, empty if nothing; it stands alone."""
    named = [o.partition("=")[2] for o in overrides if o.startswith("end=")]
    if named and len(overrides) > 1:
        raise UserError(f"end= stands alone: python -m flwr_hpc.run end={named[-1]}")
    return named[-1] if named else ""


if __name__ == "__main__":
    sys.exit(main())
