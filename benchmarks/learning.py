"""Is the learning real? Held-out losses of the federated model and of models trained alone.

Trains the demo's model three times from the same start and for the same number of steps per
facility: by both facilities under DiLoCo, and by each facility alone. One process stands for all
ranks of a facility (the trainer's results do not depend on their number); the data, trainer
and outer step are those of a real run.

    python benchmarks/learning.py [OVERRIDE ...]      e.g. rounds=4 train.lr=0.002

Writes ``benchmarks/results/learning.json``.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _machine import record
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from flwr_hpc.config.compose import compose_config
from flwr_hpc.config.schema import Config
from flwr_hpc.data.batches import load_corpus
from flwr_hpc.train.model import build
from flwr_hpc.train.optim import schedule_steps
from flwr_hpc.train.rendezvous import Group, join
from flwr_hpc.train.trainer import Trainer
from flwr_hpc.worker.ranks import Ranks
from strategies.diloco import MEANS
from strategies.parts import rules

BOUND = 2.1  # nats per byte: what the demo promises on each held-out set

Weights = dict[str, NDArray[Any]]


def trainers(config: Config, group: Group) -> dict[str, Trainer]:
    """Return a trainer per facility, all with the same initial weights."""
    made = {}
    for name, facility in config.facilities.items():
        corpus = load_corpus(config.data, name, list(config.facilities), config.seed)
        built = build(config.model, corpus.tokenizer, config.seed, config.data.seq_len)
        ranks = facility.nodes * facility.ranks_per_node
        train = dataclasses.replace(config.train, micro_batch=config.train.micro_batch * ranks)
        total = schedule_steps(config.train, config.rounds)
        made[name] = Trainer(built, corpus, train, total, group)
    return made


def held_out(sites: dict[str, Trainer], weights: Path) -> dict[str, float]:
    """Return the loss of a model at every facility, in nats per token."""
    for site in sites.values():
        site.load_weights(weights)
    return {name: round(site.evaluate().loss, 4) for name, site in sites.items()}


def federated(config: Config, group: Group, folder: Path) -> list[dict[str, float]]:
    """Train under DiLoCo and return the held-out losses, of the start and after each round."""
    sites = trainers(config, group)
    where = folder / "global.safetensors"
    next(iter(sites.values())).save_weights(where)
    theta, momentum = load_file(where), dict[str, NDArray[Any]]()
    losses = [held_out(sites, where)]
    for _ in range(config.rounds):
        trained = []
        for name, site in sites.items():
            site.load_weights(where)
            site.train(config.train.steps)
            site.save_weights(folder / f"{name}.safetensors")
            trained.append(load_file(folder / f"{name}.safetensors"))
        theta = outer_step(theta, trained, momentum, config.strategy)
        save_file(theta, where)
        losses.append(held_out(sites, where))
        print(f"  round {len(losses) - 1:2d}  {shown(losses[-1])}", flush=True)
    return losses


def outer_step(
    theta: Weights, trained: list[Weights], momentum: Weights, strategy: dict[str, Any]
) -> Weights:
    """Take DiLoCo's outer step (all facilities train equally many tokens, so they weigh alike)."""
    lr, beta = float(strategy["outer_lr"]), float(strategy["momentum"])
    mean = MEANS[strategy.get("averaged_over", "sites")]
    found = {}
    for name, old in theta.items():
        deltas = [rules.pseudo_gradient(old, weights[name]) for weights in trained]
        delta = mean(deltas, [1.0] * len(deltas))
        momentum[name] = rules.momentum_step(momentum.get(name), delta, beta)
        found[name] = np.ascontiguousarray(
            rules.nesterov_step(old, delta, momentum[name], lr, beta)
        )
    return found


def alone(config: Config, group: Group, folder: Path, name: str) -> dict[str, float]:
    """Train at one facility, as many steps as it trains in the federation."""
    sites = trainers(config, group)
    sites[name].train(config.rounds * config.train.steps)
    where = folder / f"alone-{name}.safetensors"
    sites[name].save_weights(where)
    return held_out(sites, where)


def shown(losses: dict[str, float]) -> str:
    """Return losses as one line."""
    return "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())


def compare(config: Config, folder: Path) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Train all three ways; return the federation's rounds and the losses per facility."""
    group = join(folder, Ranks())
    print("federated")
    rounds = federated(config, group, folder)
    single = {}
    for name in config.facilities:
        single[name] = alone(config, group, folder, name)
        print(f"{name} alone  {shown(single[name])}", flush=True)
    group.close()
    rows = {
        name: {
            "federated": rounds[-1][name],
            "own_alone": single[name][name],
            "other_alone": min(single[other][name] for other in single if other != name),
        }
        for name in config.facilities
    }
    return rounds, rows


def main() -> int:
    """Run, print the table, write the result; 1 if the claim does not hold."""
    config = compose_config(sys.argv[1:])
    if len(config.facilities) < 2:
        raise SystemExit("this compares facilities: name two or more")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        rounds, rows = compare(config, Path(scratch))
    holds = all(row["federated"] < min(BOUND, row["other_alone"]) for row in rows.values())
    print(f"\nheld-out loss, nats per byte (bound {BOUND})")
    print(f"{'facility':12}{'federated':>12}{'own alone':>12}{'other alone':>12}")
    for name, row in rows.items():
        print(f"{name:12}" + "".join(f"{loss:12.3f}" for loss in row.values()))
    print("the claim holds" if holds else "THE CLAIM DOES NOT HOLD")
    figures = {
        "seconds": round(time.perf_counter() - began, 1),
        "holds": holds,
        "held_out_loss": rows,
        "rounds": rounds,
    }
    settings = dataclasses.asdict(config)
    used = ("rounds", "seed", "strategy", "model", "data", "train")
    record("learning", figures, {key: settings[key] for key in used})
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
