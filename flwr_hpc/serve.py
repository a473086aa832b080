"""``python -m flwr_hpc.serve``: the server of a run whose sites join from other centres.

On a machine that the sites can reach, at one TCP port. Settings are KEY=VALUE, e.g.

  python -m flwr_hpc.serve serve.address=train.example.org:8443 'serve.sites=[leonardo,lumi]'
  python -m flwr_hpc.serve serve.address=... 'serve.sites=[a,b]' strategy=fedbuff rounds=20
  python -m flwr_hpc.serve resume=runs/2026-01-31_12-00-00

It writes an invitation for each site into the run directory. While it runs:

  python -m flwr_hpc.serve invite NAME RUN_DIR            a further site, or a new invitation
  python -m flwr_hpc.serve revoke NAME RUN_DIR            a site is out, at once
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from flwr_hpc.config.command_line import add_settings, command_parser
from flwr_hpc.config.compose import shown
from flwr_hpc.config.schema import Config
from flwr_hpc.errors import UserError, exit_code
from flwr_hpc.files import keep_files_private
from flwr_hpc.server.run_dir import RunDir, configure

EXAMPLE = "serve.address=train.example.org:8443 'serve.sites=[leonardo,lumi]'"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code (0, 1 failed, 2 user error, 130 Ctrl-C)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["invite"], ["revoke"]):
        return exit_code(lambda: _change(argv))
    args = add_settings(command_parser("serve", __doc__)).parse_intermixed_args(argv)
    return exit_code(lambda: _serve(args))


def _serve(args: argparse.Namespace) -> int:
    config, resumed = _configure(args.overrides, args.config_dir)
    if args.cfg:
        print(shown(config), end="")
        return 0
    from flwr_hpc.server import session

    if config.dry_run:
        return session.show_plan(config, {})
    return session.run(config, resumed, {})


def _configure(overrides: list[str], config_dir: str | None) -> tuple[Config, bool]:
    config, resumed = configure(overrides, config_dir, serve=True)
    if not config.serve.address or not config.serve.sites:
        raise UserError(f"where sites reach the server, and who they are. Add: {EXAMPLE}")
    if config.facilities:
        name = next(iter(config.facilities))
        raise UserError(
            f"facilities belong to the sites that join, also one of this machine ({name}): "
            f"leave +facility= away, and name it in serve.sites"
        )
    return config, resumed


def _change(argv: list[str]) -> int:
    """Invite a site, or revoke its invitation, while the server runs or not."""
    if len(argv) != 3:
        raise UserError(f"usage: python -m flwr_hpc.serve {argv[0]} NAME RUN_DIR")
    from flwr_hpc.server import invitations

    keep_files_private()
    action, site, folder = argv
    run = RunDir.open(folder)
    config = run.config()
    if not config.serve.address:
        raise UserError(f"{run.path} is no server's run directory: its sites are on this machine")
    runs = run.in_use()
    if action == "invite":
        path = invitations.invite(run, config, site)
        if runs:
            invitations.register(run, invitations.run_flower(run), anew=False)
        print(f"{site}: give {path} to its person alone")
        return 0
    credential = invitations.revoke(run, site)
    print(f"{site}: its invitation is worth nothing any more")
    if runs and credential.node_id:
        invitations.unregister(run, credential.node_id)
    return 0


if __name__ == "__main__":
    sys.exit(main())
