"""What fewer bytes cost in loss: the demo's model with every codec.

Two facilities train for 20 rounds from the same start on the demo's data, as in `learning.py`; what
each sends goes through the codec's file and back, with error feedback and without, under DiLoCo,
and sparse updates under SparseLoCo too. The trainer, the codecs, the feedback and the arithmetic
of the outer step are those of a real run. With ``model.lora.r=8`` adapters are trained so, on a
model that the first facility has trained alone, all its weights, for as many steps as it then
trains adapters.

    python benchmarks/exchange/codecs.py [--seeds N] [--minutes M] [OVERRIDE ...]

Runs that are over are in ``benchmarks/results/codecs_runs.jsonl`` and are not made again; the table
is written to ``benchmarks/results/codecs.json``, of adapters to ``codecs_lora.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file, save_file

from flwr_hpc.config.compose import compose_config
from flwr_hpc.config.schema import Config
from flwr_hpc.data.batches import load_corpus
from flwr_hpc.exchange.codec import make_codec
from flwr_hpc.exchange.compression.encoder import make_encoder
from flwr_hpc.exchange.shards.cuts import all_rows
from flwr_hpc.exchange.tensorfile import TensorFile
from flwr_hpc.train.model import build
from flwr_hpc.train.rendezvous import Group, join
from flwr_hpc.train.trainer import Trainer
from flwr_hpc.worker.ranks import Ranks

sys.path.append(str(Path(__file__).parents[1]))
from _machine import RESULTS, record
from learning import Weights, held_out, outer_step, trainers

RUNS = RESULTS / "codecs_runs.jsonl"
SETTINGS = ["rounds=20", "train.steps=10"]
GAMMA, LORA = 0.95, "model.lora."


@dataclasses.dataclass(frozen=True)
class Case:
    """A codec, gamma of its error feedback, and what is made of the updates."""

    codec: tuple[str, ...]
    gamma: float
    strategy: str = "diloco"

    def key(self, seed: int, overrides: list[str]) -> str:
        name = "+".join(self.codec)
        return " ".join([self.strategy, name, f"gamma={self.gamma:g}", f"seed={seed}", *overrides])


FULL = Case(("full",), 0.0)
SPARSE = ("topk", "int2")
CASES = (
    FULL,
    Case(("int8",), GAMMA), Case(("int8",), 0.0), Case(("int4",), GAMMA), Case(("int4",), 0.0),
    Case(SPARSE, GAMMA, "sparseloco"), Case(SPARSE, 0.0, "sparseloco"), Case(SPARSE, GAMMA),
)  # fmt: skip


class Sender:
    """What a facility's job does with trained weights, and the server with what it sends."""

    def __init__(self, case: Case, folder: Path) -> None:
        self._codec, self._folder = make_codec(list(case.codec)), folder
        self._encoder = make_encoder(list(case.codec), case.gamma, folder / "feedback")
        self.share = 1.0  # of the bytes of the weights

    def sent(self, order: str, weights: Path, base: Path) -> Weights:
        """Return what arrives of trained weights."""
        trained, path = TensorFile(weights), self._folder / order / "weights.safetensors"
        start, cut = self._encoder.start(order, base), all_rows(trained.layout)
        part = self._encoder.encode(path, trained, cut, start, (0, 1))
        self._encoder.publish(path, trained.layout, [part], start)
        payload = path.with_name(part.shard.file)
        received = self._codec.decode(payload, TensorFile(base), trained.layout)
        self.share = part.shard.bytes / weights.stat().st_size
        return {name: received.tensor(name).copy() for name in trained.layout}


def mean_loss(sites: dict[str, Trainer], weights: Path) -> float:
    """Return the mean of the facilities' held-out losses."""
    return round(statistics.mean(held_out(sites, weights).values()), 4)


def base_model(config: Config, folder: Path) -> Path:
    """Return a checkpoint whose weights the first facility has all trained alone."""
    if folder.exists():
        return folder
    folder.mkdir()
    group = join(folder, Ranks())
    name, site = next(iter(trainers(config, group).items()))
    site.train(config.rounds * config.train.steps)
    site.save_weights(folder / "model.safetensors")
    group.close()
    corpus = load_corpus(config.data, name, list(config.facilities), config.seed)
    built = build(config.model, corpus.tokenizer, config.seed, config.data.seq_len)
    for file, text in built.files.items():
        (folder / file).write_text(text)
    return folder


def composed(case: Case, seed: int, overrides: list[str], bases: Path) -> Config:
    """Return a run's configuration, with a checkpoint in `bases` below its adapters if any."""
    settings = [*SETTINGS, f"strategy={case.strategy}", f"seed={seed}"]
    whole = [o for o in overrides if not o.startswith(LORA)]
    if len(whole) == len(overrides):
        return compose_config([*settings, *overrides])
    base = base_model(compose_config([*settings, *whole]), bases / f"{seed}")
    return compose_config([*settings, *overrides, f"model.path={base}"])


def run(config: Config, group: Group, folder: Path, case: Case) -> Any:
    """Train once; return the mean held-out loss of every round and the share of the bytes.

    The first loss is that before all rounds.
    """
    sites = trainers(config, group)
    senders = {name: Sender(case, folder / f"send-{name}") for name in sites}
    where, momentum = folder / f"{'0' * 64}.safetensors", Weights()  # named as a version is
    next(iter(sites.values())).save_weights(where)
    theta, losses = load_file(where), [mean_loss(sites, where)]
    for number in range(config.rounds):
        arrived = []
        for name, site in sites.items():
            site.load_weights(where)
            site.train(config.train.steps)
            site.save_weights(folder / f"{name}.safetensors")
            arrived.append(senders[name].sent(f"o{number}", folder / f"{name}.safetensors", where))
        theta = outer_step(theta, arrived, momentum, config.strategy)
        save_file(theta, where)
        losses.append(mean_loss(sites, where))
    return {"losses": losses, "share": next(iter(senders.values())).share}


def complete(overrides: list[str], seeds: int, minutes: float, bases: Path) -> dict[str, Any]:
    """Make the runs that are missing; return all by their key."""
    lines = RUNS.read_text().splitlines() if RUNS.exists() else []
    over = {entry["key"]: entry["outcome"] for entry in map(json.loads, lines)}
    until = time.monotonic() + 60.0 * minutes
    for seed in range(seeds):
        for case in CASES:
            key = case.key(seed, overrides)
            if key in over or time.monotonic() > until:
                continue
            config = composed(case, seed, overrides, bases)
            with tempfile.TemporaryDirectory() as scratch:
                group = join(Path(scratch), Ranks())
                over[key] = run(config, group, Path(scratch), case)
                group.close()
            print(f"{key}: {over[key]['losses'][-1]} {over[key]['share']:.4f}", flush=True)
            with open(RUNS, "a") as file:
                file.write(json.dumps({"key": key, "outcome": over[key]}) + "\n")
    return over


def table(over: dict[str, Any], overrides: list[str], seeds: int) -> list[dict[str, Any]]:
    """Return a row per case: its loss against that of whole weights with the same seed."""
    rows = []
    for case in CASES:
        runs = [(over.get(case.key(seed, overrides)), seed) for seed in range(seeds)]
        there = [(r, over.get(FULL.key(seed, overrides))) for r, seed in runs if r]
        pairs = [(r["losses"][-1], full["losses"][-1]) for r, full in there if full]
        if pairs:
            worse = [100.0 * (loss / reference - 1.0) for loss, reference in pairs]
            rows.append(
                {
                    "strategy": case.strategy, "codec": "+".join(case.codec),
                    "feedback": case.gamma, "seeds": len(pairs),
                    "share": round(there[0][0]["share"], 4),
                    "loss": round(statistics.mean(p[0] for p in pairs), 4),
                    "percent_worse": round(statistics.mean(worse), 2),
                    "percent_worse_at_most": round(max(worse), 2),
                }
            )  # fmt: skip
    return rows


def main() -> None:
    """Run, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after these")
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)  # so small a model only waits for more
    with tempfile.TemporaryDirectory() as bases:
        over = complete(args.overrides, args.seeds, args.minutes, Path(bases))
    rows = table(over, args.overrides, args.seeds)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    whole = [o for o in args.overrides if not o.startswith(LORA)]
    config = dataclasses.asdict(compose_config([*SETTINGS, *whole]))
    settings = {key: config[key] for key in ("rounds", "strategy", "model", "data", "train")}
    adapters = len(whole) < len(args.overrides)
    name = "codecs_lora" if adapters else "codecs"
    record(name, {"rows": rows}, settings | {"overrides": args.overrides})


if __name__ == "__main__":
    main()
