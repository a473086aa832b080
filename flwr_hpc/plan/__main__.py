"""``python -m flwr_hpc.plan``: which parallel plan trains a model best at a facility.

Predicts memory and step time of every plan by a performance model; downloads nothing, starts
nothing. Settings are those of a run, e.g.

  python -m flwr_hpc.plan model=llama3_8b +facility=leonardo nodes=4
  python -m flwr_hpc.plan model=llama3_70b +facility=lumi nodes=16 data.seq_len=8192
  python -m flwr_hpc.plan model=mixtral_8x7b '+facility=[jupiter,alps]' nodes=8 plan.tokens=1e11

The most used: model facility nodes data.seq_len train.precision plan.tokens plan.batch_tokens.
What it rests on: docs/plan.md.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from rich.console import Console

from flwr_hpc.config.command_line import add_settings, command_parser
from flwr_hpc.config.validate import NEXT_TOKEN, SPAN_CORRUPTION
from flwr_hpc.errors import UserError, exit_code
from flwr_hpc.plan.config import PlanConfig, compose_plan
from flwr_hpc.plan.ranking import rank
from flwr_hpc.plan.settings import plan_overrides
from flwr_hpc.plan.show import NOT_YET, Ranking, show

PLANNING = ("nodes=", "plan.", "data.seq_len=", "train.micro_batch=", "train.accumulation=",
            "train.activation_checkpointing=", "train.replicate=", "train.tensor=",
            "train.batch_size=", "train.plan=")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code (0, 1 nothing fits, 2 user error)."""
    parser = add_settings(command_parser("plan", __doc__), cfg=False)
    args = parser.parse_intermixed_args(argv)
    return exit_code(lambda: _run(args.overrides, args.config_dir))


def _run(overrides: list[str], config_dir: str | None) -> int:
    config = compose_plan(overrides, config_dir)
    console = Console(soft_wrap=False, width=None if sys.stdout.isatty() else 200)
    winners = True
    for name in config.facilities:
        ranking = rank(config, name, overrides)
        show(ranking, console, config.plan.rows)
        winners &= _show_winner(config, ranking, overrides, console)
    return 0 if winners else 1


def _show_winner(
    config: PlanConfig, ranking: Ranking, overrides: list[str], console: Console
) -> bool:
    best, winner = ranking.ranked[0], ranking.winner
    if winner is None:
        console.print(f"No plan that today's trainer can execute fits. {_fix(ranking)}\n")
        return False
    if best.tokens_per_s > 1.01 * winner.tokens_per_s:
        gain = best.tokens_per_s / winner.tokens_per_s - 1
        kind = f"{best.plan.mesh}, {best.plan.checkpointing}"
        console.print(f"{gain:+.0%} would bring {kind} ({NOT_YET}: {best.missing}).")
    facility = config.facilities[ranking.facility]
    others = tuple(f"facilities.{n}." for n in config.facilities if n != ranking.facility)
    kept = [o for o in overrides if not o.startswith((*PLANNING, "+facility=", *others))]
    wanted = plan_overrides(
        ranking.facility, facility, ranking.machine.nodes, winner.plan, ranking.seq_len
    )
    if ranking.shape.encoder_decoder and config.data.objective == NEXT_TOKEN:
        kept = [o for o in kept if not o.startswith("data.objective=")]
        wanted.append(f"data.objective={SPAN_CORRUPTION}")
    command = shlex.join(
        ["python", "-m", "flwr_hpc.run", f"+facility={ranking.facility}", *kept, *wanted]
    )
    console.print(f"{command}\n", soft_wrap=True, highlight=False, markup=False)
    return True


def _fix(ranking: Ranking) -> str:
    nearest = next((c for c in ranking.ranked if not c.missing), None)
    if nearest is None:
        raise UserError(f"no plan at {ranking.facility} can be executed by today's trainer")
    return (
        f"The nearest ({nearest.plan.mesh}, {nearest.plan.checkpointing}) needs "
        f"{nearest.over_bytes / 1e9:.1f} GB more per device. Try: "
        f"nodes={2 * ranking.machine.nodes}, or data.seq_len={ranking.seq_len // 2}"
    )


if __name__ == "__main__":
    sys.exit(main())
