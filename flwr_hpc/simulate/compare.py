"""Many runs, side by side: strategies x seeds, their table, plots and records."""

from __future__ import annotations

import datetime as dt
import json
import logging
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.files import publish
from flwr_hpc.simulate.config import ScenarioConfig, SimulateConfig, SiteModel, check_site
from flwr_hpc.simulate.federation import RunOutcome, RunSettings, simulate
from flwr_hpc.simulate.pool import RENEWAL

SUCCESSORS = "max_successors"  # in a strategy's file: of its warm allocations, else the launcher's
POLICY = "policy"
REFERENCE_TFLOPS = 4 * 312.0  # of the node whose step takes `step_s` of the scenario


@dataclass(frozen=True)
class Job:
    """One run to do."""

    name: str
    strategy: dict[str, Any]
    policy: str
    max_successors: int
    seed: int


@dataclass(frozen=True)
class Row:
    """A strategy over its seeds: medians and quartiles of what was needed to reach the target.

    `hours` and `node_hours` are None if fewer than half of the runs reached it.
    """

    strategy: str
    policy: str
    runs: int
    reached: int
    hours: float | None
    hours_low: float | None
    hours_high: float | None
    node_hours: float | None
    loss: float | None
    versions: float


def compare(config: SimulateConfig) -> int:
    """Run the comparison, print the table and write everything into the output folder."""
    console = Console()
    scenario = scenario_of(config)
    out = _folder(config)
    outcomes = list(_with_progress(console, config, scenario))
    outcomes.sort(key=lambda o: (list(config.strategies).index(o.strategy), o.seed))
    found = rows(outcomes)
    console.print(table(found, outcomes[0].target, scenario.horizon_h))
    record = {
        "config": asdict(config),
        "rows": [asdict(row) for row in found],
        "runs": [o.to_json() for o in outcomes],
    }
    publish(out / "results.json", json.dumps(_plain(record), indent=1, allow_nan=False))
    drawn = _draw(out, outcomes)
    console.print(f"Results: {out / 'results.json'}{drawn}", soft_wrap=True)
    return 0


def run_all(
    config: SimulateConfig, scenario: ScenarioConfig, workers: int | None = None
) -> Iterator[RunOutcome]:
    """Yield the outcomes as they come, from several processes."""
    jobs = list(_jobs(config))
    workers = min(len(jobs), workers or os.cpu_count() or 1)
    if workers == 1:
        for job in jobs:
            yield _run(config, scenario, job)
        return
    with ProcessPoolExecutor(workers) as pool:
        futures = [pool.submit(_run, config, scenario, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def scenario_of(config: SimulateConfig) -> ScenarioConfig:
    """Return the scenario; facilities that were named take the place of its sites.

    A facility's steps are as fast as its peak says; the rest, its queue for one, is as that of
    the scenario's site in the same place. With ``queue.kind=history`` there, its waits are those
    that runs at the facility have kept.
    """
    scenario = config.scenario
    if not config.facilities:
        return scenario
    models = list(scenario.sites.values()) or [SiteModel()]
    sites = {
        name: _site(facility, models[k % len(models)])
        for k, (name, facility) in enumerate(config.facilities.items())
    }
    for name, site in sites.items():
        check_site(f"facilities.{name}", site)
    return ScenarioConfig(sites, scenario.target, scenario.horizon_h, scenario.own_share)


def _site(facility: FacilityConfig, like: SiteModel) -> SiteModel:
    step_s = like.step_s
    if facility.peak_tflops and facility.gpus_per_node:
        tflops = facility.peak_tflops * facility.gpus_per_node * facility.nodes
        step_s = 2.0 * REFERENCE_TFLOPS / tflops
    values = {k: v for k, v in vars(like).items() if k not in ("step_s", "nodes", "walltime")}
    return SiteModel(step_s=step_s, nodes=facility.nodes, walltime=facility.walltime, **values)


def rows(outcomes: Sequence[RunOutcome]) -> list[Row]:
    """Return a row per strategy, in the order they first appear."""
    names = dict.fromkeys(o.strategy for o in outcomes)
    return [_row([o for o in outcomes if o.strategy == name]) for name in names]


def _row(runs: Sequence[RunOutcome]) -> Row:
    # A run that did not reach the target took longer than any that did.
    hours = sorted(o.hours if o.reached else math.inf for o in runs)
    nodes = sorted(o.node_hours if o.reached else math.inf for o in runs)
    finals = [o.curve[-1][2] for o in runs if o.curve and math.isfinite(o.curve[-1][2])]
    return Row(
        strategy=runs[0].strategy,
        policy=runs[0].policy,
        runs=len(runs),
        reached=sum(o.reached for o in runs),
        hours=_finite(quantile(hours, 0.5)),
        hours_low=_finite(quantile(hours, 0.25)),
        hours_high=_finite(quantile(hours, 0.75)),
        node_hours=_finite(quantile(nodes, 0.5)),
        loss=statistics.median(finals) if finals else None,
        versions=statistics.median(o.versions for o in runs),
    )


def quantile(ordered: Sequence[float], q: float) -> float:
    """Return a quantile by linear interpolation; infinite if it touches an infinite value."""
    at = q * (len(ordered) - 1)
    low, high = math.floor(at), math.ceil(at)
    if low == high:
        return ordered[low]
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def table(found: Sequence[Row], target: float, horizon_h: float) -> Table:
    """Return the table that is printed."""
    best = min((r.hours for r in found if r.hours is not None), default=None)
    title = f"Time to a held-out loss of {target:g}"
    shown = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in ("strategy", "policy", "reached"):
        shown.add_column(name, no_wrap=True)
    for name in ("hours", "quartiles", "x best", "node-h", "made", "loss"):
        shown.add_column(name, justify="right", no_wrap=True)
    for r in sorted(found, key=_rank):
        times = "-" if r.hours is None or best is None else f"{r.hours / best:.2f}"
        shown.add_row(
            r.strategy,
            r.policy,
            f"{r.reached}/{r.runs}",
            _number(r.hours, f"> {horizon_h:g}"),
            f"{_number(r.hours_low)}-{_number(r.hours_high, '')}",
            times,
            _number(r.node_hours),
            f"{r.versions:.0f}",
            "-" if r.loss is None else f"{r.loss:.3f}",
        )
    return shown


def _rank(row: Row) -> tuple[bool, float, float]:
    """Order by time to the target, and those that did not reach it by their loss."""
    loss = math.inf if row.loss is None else row.loss
    return row.hours is None, row.hours or 0.0, loss


def _plain(value: Any) -> Any:
    """Return a value that is JSON: what is not finite (a run that diverged) becomes null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(x: float | None, missing: str = "-") -> str:
    return missing if x is None else f"{x:.1f}"


def _jobs(config: SimulateConfig) -> Iterator[Job]:
    for seed in range(config.seeds):
        for name, spec in config.strategies.items():
            strategy = dict(spec)
            own = str(strategy.pop(POLICY, "warm"))
            policy = own if config.policy == "own" else config.policy
            successors = int(strategy.pop(SUCCESSORS, RENEWAL.max_successors))
            yield Job(name, strategy, policy, successors, seed)


def _run(config: SimulateConfig, scenario: ScenarioConfig, job: Job) -> RunOutcome:
    logging.getLogger("flwr").setLevel(logging.ERROR)  # it tells of every round
    return simulate(
        scenario,
        job.name,
        job.strategy,
        RunSettings(
            policy=job.policy,
            max_successors=job.max_successors,
            seed=job.seed,
            steps=config.steps,
            learning=config.learning,
            evaluate_every_s=config.evaluate_every_s,
        ),
    )


def _with_progress(
    console: Console, config: SimulateConfig, scenario: ScenarioConfig
) -> Iterator[RunOutcome]:
    columns = (
        TextColumn("simulating"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[last]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        total = config.seeds * len(config.strategies)
        task = progress.add_task("", total=total, last="")
        for outcome in run_all(config, scenario):
            last = f"{outcome.strategy}, seed {outcome.seed}: {outcome.hours:.1f} h"
            progress.update(task, advance=1, last=last)
            yield outcome


def _folder(config: SimulateConfig) -> Path:
    stamp = dt.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    out = Path(config.out) if config.out else Path("simulations") / stamp
    out.mkdir(parents=True, exist_ok=True)
    return out


def _draw(out: Path, outcomes: Sequence[RunOutcome]) -> str:
    """Draw the plots if matplotlib is there; return what to say about them."""
    try:
        from flwr_hpc.simulate.plots import draw
    except ModuleNotFoundError:
        return "\nFor plots: pip install 'flwr-hpc[simulate]'"
    return "".join(f"\nPlot: {path}" for path in draw(out, outcomes))
