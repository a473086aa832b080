"""What the commands' lines of arguments share."""

from __future__ import annotations

import argparse

from flwr_hpc import __version__


def command_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of ``python -m flwr_hpc.NAME``, described as it is written."""
    parser = argparse.ArgumentParser(
        prog=f"python -m flwr_hpc.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flwr-hpc {__version__}")
    return parser


def add_settings(
    parser: argparse.ArgumentParser, cfg: bool = True, words: str = "settings, see above"
) -> argparse.ArgumentParser:
    """Let a command take settings, with `cfg` also print them; `words` say what they are."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=words)
    parser.add_argument("--config-dir", metavar="DIR", help="folder with configuration of yours")
    if cfg:
        parser.add_argument("--cfg", choices=["job"], help="print the configuration and stop")
    return parser
