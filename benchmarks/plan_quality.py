"""How near `flwr_hpc.plan` comes to the trainer: time of a step and peak memory, on this CPU.

Every configuration trains in processes of its own, a rank and a thread each. Time is CPU time per
rank, so that others' work on the machine does not count; memory is the peak of resident memory
above that of the connected process before it has a model. The machine's rates (matrix products,
passes over memory, gloo between two ranks) are measured first; how much of the matrix rate a layer
reaches is taken from the first configuration, and all others are predicted.

With ``--predict`` nothing is measured: the recorded measurements are predicted anew.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed leaves resident memory

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._machine import RESULTS, record
from flwr_hpc.config.schema import ModelConfig, TrainConfig
from flwr_hpc.data.batches import Batch
from flwr_hpc.plan.bandwidth import Bandwidths
from flwr_hpc.plan.machine import Machine
from flwr_hpc.plan.memory import memory
from flwr_hpc.plan.parallel import ParallelPlan
from flwr_hpc.plan.shape import ModelShape, model_shape
from flwr_hpc.plan.step import step_time
from flwr_hpc.train.model import build
from flwr_hpc.train.rendezvous import Group, join
from flwr_hpc.train.trainer import Trainer
from flwr_hpc.worker.ranks import Ranks

SEQ_LEN = 128
STEPS = 2
# name: hidden, intermediate, layers, heads, vocabulary
MODELS = {
    "9M": (384, 1024, 4, 6, 3072),
    "22M": (512, 1376, 6, 8, 6144),
    "33M": (512, 1408, 9, 8, 8192),
}


@dataclass(frozen=True)
class Case:
    """One configuration."""

    model: str
    micro_batch: int
    accumulation: int = 1
    checkpointing: str = "none"
    ranks: int = 1
    precision: str = "fp32"

    @property
    def compute_bytes(self) -> int:
        return 4 if self.precision == "fp32" else 2


# Chosen after the formulas had been corrected on others (see the README).
CASES = [
    Case("9M", 4),
    Case("9M", 1), Case("9M", 8), Case("9M", 8, 1, "full"), Case("9M", 2, 4),
    Case("9M", 2, 1, "none", 2), Case("9M", 4, 1, "full", 2),
    Case("22M", 1), Case("22M", 4), Case("22M", 4, 1, "full"), Case("22M", 4, 1, "selective"),
    Case("22M", 1, 2, "none", 2),
    Case("33M", 1), Case("33M", 2, 1, "full"), Case("33M", 1, 1, "none", 2),
    Case("33M", 1, 2, "full", 2),
    # For their memory: how fast this CPU multiplies in bf16 is not among the rates.
    Case("9M", 4, precision="bf16"), Case("9M", 2, 4, precision="bf16"),
    Case("33M", 2, precision="bf16"), Case("33M", 1, 1, "full", 2, "bf16"),
]  # fmt: skip


class Words:
    """As much of a tokenizer as building a model needs."""

    bos_token_id, eos_token_id, pad_token_id = None, 1, 0

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


class Noise:
    """A corpus of random tokens."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def batch(self, *place_and_count: int) -> Batch:
        ids = torch.randint(2, self.vocabulary, (place_and_count[-1], SEQ_LEN))
        return Batch(ids, ids.clone())


def model_config(name: str) -> dict[str, Any]:
    hidden, inner, layers, heads, vocabulary = MODELS[name]
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
        "vocab_size": vocabulary, "max_position_embeddings": SEQ_LEN, "tie_word_embeddings": True,
    }  # fmt: skip


def in_ranks(function: Any, ranks: int, *args: Any) -> list[Any]:
    """Call ``function(group, *args)`` on every rank of a fresh group and return the answers."""
    context = multiprocessing.get_context("forkserver")  # libraries are imported once
    context.set_forkserver_preload(["transformers", "flwr_hpc.train.trainer"])
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe() for _ in range(ranks)]
        processes = [
            context.Process(target=_serve, args=(pipes[r][1], folder, r, ranks, function, args))
            for r in range(ranks)
        ]
        for process in processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()
        answers = [mine.recv() for mine, _ in pipes]
        for process in processes:
            process.join()
    return answers


def _serve(
    pipe: Any, folder: str, rank: int, ranks: int, function: Any, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    group = join(Path(folder), Ranks(rank, ranks, rank, ranks), timeout_s=600)
    pipe.send(function(group, *args))
    group.close()


def measure(group: Group, case: Case) -> dict[str, float]:
    """Train, and return seconds of CPU per step and the bytes at the peak of all steps."""
    vocabulary = MODELS[case.model][-1]
    _small_step(group)  # what the first step of any model loads
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here
    config = TrainConfig(
        micro_batch=case.micro_batch, accumulation=case.accumulation, precision=case.precision,
        activation_checkpointing=case.checkpointing,
    )  # fmt: skip
    trainer = _trainer(group, model_config(case.model), vocabulary, config)
    Path("/proc/self/clear_refs").write_text("5")  # building on the CPU is not the plan's subject
    trainer.train(1)
    began, wall = time.process_time(), time.perf_counter()
    trainer.train(STEPS)
    cpu, wall = time.process_time() - began, time.perf_counter() - wall
    return {
        "cpu_s": cpu / STEPS, "wall_s": wall / STEPS, "bytes": _resident("VmHWM") - before,
    }  # fmt: skip


def _trainer(group: Group, config: dict[str, Any], vocabulary: int, train: TrainConfig) -> Trainer:
    kind = train.activation_checkpointing
    built = build(ModelConfig(config=config), Words(vocabulary), 0, SEQ_LEN, kind)
    return Trainer(built, Noise(vocabulary), train, 100, group)  # type: ignore[arg-type]


def _small_step(group: Group) -> None:
    tiny = model_config("9M") | {"hidden_size": 96, "intermediate_size": 64, "vocab_size": 64}
    _trainer(group, tiny, 64, TrainConfig(micro_batch=1, precision="fp32")).train(1)


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise AssertionError(key)


def rates(group: Group) -> dict[str, float]:
    """Return FLOP/s of a matrix product, bytes/s of a pass, and bytes/s and seconds of gloo."""
    a, b = torch.randn(512, 512), torch.randn(512, 1376)
    product = _cpu_s(lambda: a @ b, 30)
    x, y = torch.randn(2**24), torch.randn(2**24)
    passing = _cpu_s(lambda: x.add_(y), 10)
    large, small = torch.ones(2**23), torch.ones(1)
    ring = _cpu_s(lambda: dist.all_reduce(large), 5)
    call = _cpu_s(lambda: dist.all_reduce(small), 50)
    return {
        "flops": 2 * 512 * 512 * 1376 / product,
        "memory_gb_s": 3 * 4 * 2**24 / passing / 1e9,
        "gloo_gb_s": 4 * 2**23 / ring / 1e9,  # 2 (G-1)/G = 1 of the array passes through a rank
        "gloo_latency_s": call,
    }


def _cpu_s(call: Any, times: int) -> float:
    call()
    began = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - began) / times


def predict(case: Case, machine: Machine, shape: ModelShape) -> dict[str, float]:
    plan = ParallelPlan(
        1, case.ranks, 1, case.micro_batch, case.accumulation, case.checkpointing
    )  # fmt: skip
    needed = memory(shape, plan, SEQ_LEN, case.compute_bytes, gloo=True)
    return {"cpu_s": step_time(shape, plan, SEQ_LEN, machine).total, "bytes": needed.total}


def machine_of(found: dict[str, float], ranks: int, efficiency: float) -> Machine:
    table = Bandwidths(ranks, 0.0, 0.0, measured={(1, 2): found["gloo_gb_s"]},
                       latency_s=found["gloo_latency_s"])  # fmt: skip
    return Machine(
        1, ranks, found["flops"], None, None, table, compute_bytes=4, efficiency=efficiency,
        overlap=0.0, layer_overhead_s=0.0, memory_gb_s=found["memory_gb_s"], step_overhead_s=0.0,
    )  # fmt: skip


def calibrated(found: dict[str, float], case: Case, measured: float) -> float:
    """Return the efficiency at which the case takes as long as was measured."""
    shape = model_shape(model_config(case.model))
    plan = ParallelPlan(1, 1, 1, case.micro_batch, case.accumulation, case.checkpointing)
    ideal = step_time(shape, plan, SEQ_LEN, machine_of(found, 1, 1.0))
    return ideal.compute / (measured - ideal.optimizer)


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's."""
    order = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*order)[0, 1])


Measured = tuple[dict[str, float], list[dict[str, Any]]]


def measured() -> Iterator[Measured]:
    """Yield the machine's rates, and all cases up to now with what was measured of them."""
    found = dict(in_ranks(rates, 2)[0])
    rows: list[dict[str, Any]] = []
    for case in CASES:
        answers = in_ranks(measure, case.ranks, case)
        got = {k: max(a[k] for a in answers) for k in answers[0]}
        got["load_average"] = os.getloadavg()[0]
        rows.append({"case": asdict(case), "measured": got})
        yield found, rows


def recorded() -> Measured:
    """Return the same of the last run."""
    body = json.loads((RESULTS / "plan_quality.json").read_text())
    return body["config"]["rates"], body["rows"]


def compare(found: dict[str, float], rows: list[dict[str, Any]]) -> float:
    """Add to every row what is predicted; return the efficiency that the first one reached."""
    efficiency = calibrated(found, Case(**rows[0]["case"]), rows[0]["measured"]["cpu_s"])
    for row in rows:
        case, got = Case(**row["case"]), row["measured"]
        machine = machine_of(found, case.ranks, efficiency)
        said = predict(case, machine, model_shape(model_config(case.model)))
        off = {k: said[k] / got[k] - 1 for k in ("cpu_s", "bytes")}
        row |= {"predicted": said, "off": off}
    return efficiency


def note(found: dict[str, float], rows: list[dict[str, Any]]) -> None:
    """Predict what was measured, print the last of it, and record all."""
    efficiency = compare(found, rows)
    timed = [row for row in rows if Case(**row["case"]).precision == "fp32"]
    pairs = {
        k: ([r["measured"][k] for r in some], [r["predicted"][k] for r in some])
        for k, some in (("cpu_s", timed), ("bytes", rows))
    }
    figures = {
        "rank_correlation_time": rank_correlation(*pairs["cpu_s"]),
        "rank_correlation_memory": rank_correlation(*pairs["bytes"]),
        "memory_within_10_percent": sum(abs(r["off"]["bytes"]) <= 0.1 for r in rows),
        "configurations": len(rows),
    }
    case, got, said, off = (rows[-1][k] for k in ("case", "measured", "predicted", "off"))
    print(
        *case.values(),
        f"{got['cpu_s']:.3f} s, predicted {said['cpu_s']:.3f} ({off['cpu_s']:+.0%});",
        f"{got['bytes'] / 1e6:.0f} MB, predicted {said['bytes'] / 1e6:.0f} ({off['bytes']:+.0%})",
        figures,
        flush=True,
    )
    record("plan_quality", figures | {"rows": rows}, {"rates": found, "efficiency": efficiency})


def main() -> int:
    for found, rows in [recorded()] if "--predict" in sys.argv else measured():
        if len(rows) > 1:
            note(found, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
