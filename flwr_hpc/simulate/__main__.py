"""``python -m flwr_hpc.simulate``: compare strategies on facilities in virtual time.

Settings are KEY=VALUE, e.g.

  python -m flwr_hpc.simulate                                   scenario congested, three strategies
  python -m flwr_hpc.simulate scenario=hostile 'strategy=[fedavg,diloco,fedbackfill]' seeds=5
  python -m flwr_hpc.simulate '+facility=[leonardo,lumi]' facilities.leonardo.account=A ...
  python -m flwr_hpc.simulate scenario.sites.a.queue.median_s=7200 strategies.diloco.outer_lr=0.5

The most used: scenario strategy policy steps seeds learning out.
All of them, with their values: python -m flwr_hpc.simulate --cfg job
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from omegaconf import OmegaConf

from flwr_hpc.config.command_line import add_settings, command_parser
from flwr_hpc.config.compose import composed
from flwr_hpc.errors import UserError, exit_code
from flwr_hpc.simulate.config import SimulateConfig, parse

DEFAULT_STRATEGIES = ["fedavg", "diloco", "fedbackfill"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code (0, 1 failed, 2 user error, 130 Ctrl-C)."""
    args = add_settings(command_parser("simulate", __doc__)).parse_intermixed_args(argv)
    return exit_code(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    config = compose(args.overrides, args.config_dir)
    if args.cfg:
        print(OmegaConf.to_yaml(OmegaConf.structured(config)), end="")
        return 0
    # A matrix here is too small to be shared: more threads only wait for each other.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from flwr_hpc.simulate.compare import compare  # later, so that errors answer at once

    return compare(config)


def compose(overrides: Sequence[str], config_dir: str | None = None) -> SimulateConfig:
    """Compose the configuration of a comparison."""
    names, rest = _strategies(overrides)
    chosen = [f"+strategy@strategies.{name}={name}" for name in names]
    return parse(composed([*chosen, *rest], config_dir, "simulate", SimulateConfig))


def _strategies(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take ``strategy=NAME`` or ``strategy=[A,B]`` out of the overrides."""
    names, rest = DEFAULT_STRATEGIES, []
    for override in overrides:
        key, _, value = override.partition("=")
        if key != "strategy":
            rest.append(override)
            continue
        names = [name.strip() for name in value.strip("[] ").split(",") if name.strip()]
        if not names:
            raise UserError("strategy= takes names. Example: 'strategy=[fedavg,fedbackfill]'")
    return list(dict.fromkeys(names)), rest


if __name__ == "__main__":
    sys.exit(main())
