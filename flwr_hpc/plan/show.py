"""The ranking as a table, and the winner as settings to paste."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from flwr_hpc.plan.machine import Machine
from flwr_hpc.plan.search import Candidate, best_of_each_kind
from flwr_hpc.plan.shape import ModelShape

NOT_YET = "planned, not yet executable"


@dataclass(frozen=True)
class Ranking:
    """What is planned for one facility."""

    facility: str
    model: str
    shape: ModelShape
    machine: Machine
    seq_len: int
    tokens: float  # To be trained on
    ranked: list[Candidate]
    assumed: list[str]
    bandwidths: str  # Where those of collectives come from

    @property
    def winner(self) -> Candidate | None:
        """The fastest plan that today's trainer can execute."""
        return next((c for c in self.ranked if c.executable), None)

    def hours(self, candidate: Candidate) -> float:
        """Return the hours that the tokens take."""
        return self.tokens / candidate.tokens_per_s / 3600


def show(ranking: Ranking, console: Console, rows: int) -> None:
    """Print the table and what it rests on."""
    shape, machine = ranking.shape, ranking.machine
    console.print(
        f"[bold]{ranking.model} at {ranking.facility}[/bold]: {shape.parameters / 1e9:.3g} B "
        f"parameters on {machine.nodes} x {machine.per_node} ranks, "
        f"{ranking.ranked[0].plan.sequences} sequences of {ranking.seq_len} tokens per step, "
        f"{'bf16' if machine.compute_bytes == 2 else 'fp32'}"
    )
    console.print(_table(ranking, rows))
    assumed = [
        f"{machine.efficiency:.0%} of the peak in matrix products",
        f"{machine.overlap:.0%} of the computing time hides communication",
        *ranking.assumed,
    ]
    text = f"today = no: {NOT_YET} by the trainer. Assumed: {'; '.join(assumed)}."
    console.print(text, style="dim")
    text = f"Bandwidths of collectives: {ranking.bandwidths}."
    console.print(text, style="dim", highlight=False, markup=False)


def _table(ranking: Ranking, rows: int) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("replicate x shard x tensor")
    for name in ("micro", "acc", "checkp.", "GB", "step s", "tokens/s", "MFU", "node-h", "kWh"):
        table.add_column(name, justify="right")
    table.add_column("today")
    table.add_column("why")
    kinds = best_of_each_kind(ranking.ranked)
    fits, rest = [c for c in kinds if c.fits], [c for c in kinds if not c.fits]
    first = ranking.winner
    for candidate in fits[:rows]:
        table.add_row(*_cells(ranking, candidate), style="green" if candidate is first else None)
    if first is not None and first not in fits[:rows]:
        table.add_row(*_cells(ranking, first), style="green")
    for candidate in rest[: max(3, rows - len(fits))]:
        table.add_row(*_cells(ranking, candidate), style="dim")
    return table


def _cells(ranking: Ranking, c: Candidate) -> list[str]:
    machine, plan = ranking.machine, c.plan
    hours = ranking.hours(c)
    flops = ranking.shape.flops_per_token(ranking.seq_len) * c.tokens_per_s
    energy = machine.ranks * machine.power_w * hours / 1000 if machine.power_w else None
    mfu = flops / machine.ranks / machine.peak_flops
    speed = [
        f"{c.time.total:.3g}", f"{c.tokens_per_s:,.0f}", f"{mfu:.0%}",
        f"{hours * machine.nodes:,.3g}", "?" if energy is None else f"{energy:,.3g}",
    ]  # fmt: skip
    return [
        plan.mesh, str(plan.micro_batch), str(plan.accumulation), plan.checkpointing,
        f"{c.memory.total / 1e9:.1f}", *(speed if c.fits else ["-"] * 5),
        f"no: {c.missing}" if c.missing else "yes", c.reason,
    ]  # fmt: skip
