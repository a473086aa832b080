"""How far the simulator is from real batch systems.

Federations run on real, contended Slurm clusters (`_lab_runs`; as root). Then the simulator runs
the same strategy, fed with what was measured there: the waits, the speeds, start-up and the time
of messages. Compared are wall time, node time and loss,

- replayed: with each run's own waits, one after the other,
- predicted: with waits drawn at random from the other repetitions, and
- drawn: with waits drawn from all repetitions, the medians against each other.

    python benchmarks/clusters/faithfulness.py [repetitions [folder]]

A folder keeps the real runs; those that it has already are not made again. Writes
``benchmarks/results/faithfulness.json``. Hours of a centre are seconds here.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml
from _lab_runs import CASES, MEAN_RUN_S, NODES, PLACES, SEED, STEPS, Case, Place, make
from _measured import Figures, Speeds, figures, learner, speeds

from flwr_hpc.config.schema import FederationConfig
from flwr_hpc.simulate.config import QueueModel, ScenarioConfig, SiteModel
from flwr_hpc.simulate.federation import RunSettings, simulate
from flwr_hpc.simulate.pool import RENEWAL

sys.path.append(str(Path(__file__).parents[1]))
from _machine import record

Row = dict[str, float | None]
DRAWS = 15
POLL_S = 0.05  # of the simulated server: the real one's polls are in the measured latency


# ---- the simulated side --------------------------------------------------------------------------


def simulated(case: Case, strategy: dict[str, Any], fed: Mapping[str, Speeds]) -> Figures:
    """Run a federation in the simulator."""
    sites = {name: _site(PLACES[name], s) for name, s in fed.items()}
    found = simulate(
        ScenarioConfig(sites, target=0.0),
        case.strategy,
        strategy,
        RunSettings(
            policy=case.policy,
            max_successors=RENEWAL.max_successors,
            seed=SEED,
            steps=STEPS,
            evaluate_every_s=0.0,
            versions=case.versions,
            wait_s=FederationConfig().wait_s,
            poll_s=POLL_S,
            initialize=True,
        ),
    )
    assert found.versions == case.versions, found.error
    first = min(s.begin for own in found.segments.values() for s in own)
    curve = [(3600.0 * hours - first, loss) for hours, _, loss in found.curve]
    return Figures(3600.0 * found.hours - first, 3600.0 * found.node_hours, curve[-1][1], curve)


def _site(place: Place, s: Speeds) -> SiteModel:
    return SiteModel(
        step_s=s.step_s,
        walltime=place.walltime,
        startup_s=s.startup_s,
        write_s=s.write_s,
        reserves_s=s.reserves_s,
        latency_s=s.latency_s,
        message_s=s.message_s,
        transfer_s=0.0,  # in the latency
        forecasts_s=s.forecasts_s,
        queue=QueueModel(kind="replay", waits_s=s.waits_s),
    )


def drawn(runs: Iterable[Mapping[str, Speeds]], seed: int) -> dict[str, Speeds]:
    """Return sites with the mean speeds of all runs, and waits and ends drawn from theirs."""
    rng, found = np.random.default_rng(seed), {}
    by_site: dict[str, list[Speeds]] = {}
    for fed in runs:
        for name, s in fed.items():
            by_site.setdefault(name, []).append(s)
    for name, own in by_site.items():
        mean = {
            key: float(np.mean([getattr(s, key) for s in own]))
            for key in ("step_s", "startup_s", "write_s", "latency_s", "message_s")
        }
        jobs = [pair for s in own for pair in zip(s.waits_s, s.forecasts_s, strict=True)]
        waits, forecasts = rng.choice(jobs, 100).T.tolist()
        left = [x for s in own for x in s.reserves_s]
        reserves = rng.choice(left, 100).tolist() if left else []
        found[name] = replace(
            own[0], **mean, waits_s=waits, forecasts_s=forecasts, reserves_s=reserves
        )
    return found


# ---- the comparison ------------------------------------------------------------------------------


def row(found: Figures, case: Case) -> Row:
    """Return what is compared."""
    return {
        "wall_s": found.wall_s,
        "target_s": found.reached_s(case.target),
        "node_s": found.node_s,
        "loss": found.loss,
    }


def off(real: Row, found: Row) -> Row:
    """Return how far a simulation is from the real run, relatively."""
    pairs = ((key, real[key], found[key]) for key in real)
    return {k: None if a is None or b is None else b / a - 1.0 for k, a, b in pairs}


def curves_off(real: Figures, found: Figures) -> float:
    """Return the mean relative distance of the losses at equal times."""
    end = min(real.curve[-1][0], found.curve[-1][0])
    grid = np.linspace(max(real.curve[0][0], found.curve[0][0]), end, 100)
    a, b = (np.interp(grid, *zip(*of.curve, strict=True)) for of in (real, found))
    return float(np.mean(np.abs(b / a - 1.0)))


def compare(case: Case, folders: Sequence[Path]) -> dict[str, Any]:
    """Return the comparison of a case's runs."""
    judge = learner(len(PLACES), SEED)
    reals = [figures(folder, judge) for folder in folders]
    fed = [speeds(folder) for folder in folders]
    strategy = yaml.safe_load((folders[0] / "config.yaml").read_text())["strategy"]
    rows = [row(real, case) for real in reals]
    repetitions = []
    for k, (real, one) in enumerate(zip(reals, fed, strict=True)):
        again, others = simulated(case, strategy, one), [f for f in fed if f is not one]
        repetitions.append(
            {
                "replayed": held_against(rows[k], row(again, case)),
                "curves_off": curves_off(real, again),
                "predicted": held_against(rows[k], expected(case, strategy, others or fed)),
                "fed": {name: asdict(speed) for name, speed in one.items()},
            }
        )
    usual = held_against(medians(rows), expected(case, strategy, fed))
    return {"repetitions": repetitions, "drawn": usual}


def held_against(real: Row, simulated: Row) -> dict[str, Row]:
    """Return both and how far they are apart."""
    return {"real": real, "simulated": simulated, "off": off(real, simulated)}


def expected(case: Case, strategy: dict[str, Any], fed: Sequence[Mapping[str, Speeds]]) -> Row:
    """Return the median figures of simulations with waits drawn from those of runs."""
    draws = (simulated(case, strategy, drawn(fed, k)) for k in range(DRAWS))
    return medians([row(found, case) for found in draws])


def medians(rows: Sequence[Row]) -> Row:
    """Return the median of every figure, of those that have it."""
    known = {key: [v for r in rows if (v := r[key]) is not None] for key in rows[0]}
    return {key: median(values) if values else None for key, values in known.items()}


def show(name: str, found: dict[str, Any]) -> None:
    """Print the table of a case."""
    print(f"{name:18}" + "".join(f"{key:>24}" for key in found["drawn"]["off"]))
    named = [
        (f"{k} {which}", one[which])
        for k, one in enumerate(found["repetitions"])
        for which in ("replayed", "predicted")
    ]
    for which, one in [*named, ("drawn", found["drawn"])]:
        cells = (
            "-" if (by := one["off"][key]) is None
            else f"{one['real'][key]:.4g} {one['simulated'][key]:.4g} {100 * by:+.1f} %"
            for key in one["off"]
        )  # fmt: skip
        print(f"  {which:16}" + "".join(f"{cell:>24}" for cell in cells))


def main(repetitions: int, folder: Path) -> None:
    """Run, print and record."""
    folders = {
        name: [folder / f"{name}-{repetition}" for repetition in range(repetitions)]
        for name in CASES
    }
    if make(folders, folder):
        tell(folders)


def tell(folders: Mapping[str, Sequence[Path]]) -> None:
    """Compare runs with simulations, print and record."""
    found = {name: compare(CASES[name], own) for name, own in folders.items()}
    for name, one in found.items():
        show(name, one)
    config = {
        "seed": SEED, "steps": STEPS, "nodes": NODES, "mean_run_s": MEAN_RUN_S,
        "places": {name: asdict(place) for name, place in PLACES.items()},
        "cases": {name: asdict(case) for name, case in CASES.items()},
    }  # fmt: skip
    record("faithfulness", found, config)


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    if len(sys.argv) > 2:
        main(count, Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory(prefix="faithfulness-") as temporary:
            main(count, Path(temporary))
