"""``python -m flwr_hpc.join INVITATION``: a centre's part in a run whose server is elsewhere.

On a login node; it makes outgoing connections only. The invitation brings what belongs to the run;
what belongs to this centre is set here and stays here. Settings are KEY=VALUE, e.g.

  python -m flwr_hpc.join lumi.json +facility=lumi data=jsonl 'data.paths=[/project/x/*.jsonl]'
  python -m flwr_hpc.join lumi.json +facility=lumi site.limits.node_hours=200 dry_run=true

Type the same again after it was ended: it goes on, with the jobs that still run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flwr_hpc.config.command_line import add_settings, command_parser
from flwr_hpc.config.compose import shown
from flwr_hpc.config.invitation import check_versions, read_invitation
from flwr_hpc.errors import exit_code
from flwr_hpc.join.configure import site_config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code (0, 1 failed, 2 user error, 130 Ctrl-C)."""
    args = _parser().parse_intermixed_args(argv)
    return exit_code(lambda: _join(args))


def _join(args: argparse.Namespace) -> int:
    invitation = read_invitation(Path(args.invitation))
    check_versions(invitation.versions)
    config = site_config(invitation, args.overrides, args.config_dir)
    if args.cfg:
        print(shown(config), end="")
        return 0
    from flwr_hpc.join import session

    if config.dry_run:
        return session.show_plan(invitation, config)
    return session.join(invitation, config)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("join", __doc__)
    parser.add_argument("invitation", metavar="INVITATION", help="the file that the server wrote")
    return add_settings(parser)


if __name__ == "__main__":
    sys.exit(main())
