"""What the trainer reaches on GPUs: one command, under 10 minutes on a machine with one of them.

    python benchmarks/gpu.py                                    # a Llama of 1B, 2048 tokens, bf16
    python benchmarks/gpu.py --device cpu --model tiny_llama    # a trial without a GPU

Every case is a real allocation on a spool as a site has one: the worker's ranks, one per GPU, with
orders and results as files. Models have random weights, data are written here; nothing is fetched.
Recorded in ``benchmarks/results/gpu.json``, case by case, so that an end in between loses one:
tokens/s and MFU, peak memory and step time against `flwr_hpc.plan`'s prediction, seconds from order
to first step of the first and of later orders, seconds per order in which the GPU does not train,
what ``data.document_mask`` costs, kinds of attention, and of activation checkpointing; all GPUs if
there are several. A trial on CPUs records nothing.

It needs torch with CUDA or ROCm, transformers, peft, numpy, safetensors, psutil, and, of what an
image for machine learning may lack: omegaconf (with antlr4-python3-runtime 4.9), submitit,
cloudpickle, datasets, dill, multiprocess, xxhash; flwr_hpc itself may come by PYTHONPATH. 30 GB of
disk under --folder, 32 GB of host memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml

from benchmarks._machine import record
from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.config.schema import DataConfig, ModelConfig, TrainConfig
from flwr_hpc.plan.machine import machine
from flwr_hpc.plan.memory import memory
from flwr_hpc.plan.parallel import ParallelPlan
from flwr_hpc.plan.shape import ModelShape, model_shape
from flwr_hpc.plan.step import step_time
from flwr_hpc.protocol import Order, OrderKind, Result
from flwr_hpc.spool import AllocationDir, Spool
from flwr_hpc.worker.settings import WorkerSettings

ROOT = Path(__file__).resolve().parents[1]
RANK = "import sys; from flwr_hpc.worker.entry import work; work(sys.argv[1])"
# Dense bf16 TFLOP/s of one device, as vendors say.
PEAKS = {"H100": 989, "H200": 989, "A100": 312, "B200": 2250, "MI250": 191.5, "MI300": 1300}
AIM_MFU = 50.0
BYTE_VOCABULARY = 259
DOCUMENT_WORDS = 120  # About 700 bytes: a few documents in a sequence
LOST_S = 240.0  # Without a sign of life from a worker
LONGER = 6  # Times the steps of an order, where orders follow each other


@dataclass(frozen=True)
class Case:
    """One configuration."""

    name: str
    micro_batch: int = 8
    checkpointing: str = "none"
    attention: str = "sdpa"
    document_mask: bool = False
    ranks: int = 1
    later: int = 1  # Orders after the first one


@dataclass
class Setting:
    """What all cases have in common."""

    model: dict[str, Any]
    seq_len: int
    steps: int
    gpus: int
    peak_tflops: float
    folder: Path
    data: Path
    ends_at: float  # On the monotonic clock
    start: Path | None = None  # Weights that every case but the first begins with
    shape: ModelShape = field(init=False)

    def __post_init__(self) -> None:
        self.shape = model_shape(self.model, BYTE_VOCABULARY)


def cases(gpus: int, cpu: bool) -> list[Case]:
    """Return the cases, those that matter most first."""
    alone = [
        Case("plain", later=3),
        Case("document mask", document_mask=True),
        Case("full checkpointing", checkpointing="full"),
        Case("selective checkpointing", checkpointing="selective"),
        Case("eager attention", micro_batch=2, attention="eager"),
        Case("sdpa, as eager", micro_batch=2),
        Case("flex attention, document mask", attention="flex_attention", document_mask=True),
        Case("full checkpointing, large", micro_batch=16, checkpointing="full"),
    ]
    together = [replace(alone[0], name=f"{gpus} GPUs", ranks=gpus, later=1)] * (gpus > 1)
    found = [alone[0], *together, *alone[1:]]
    if cpu:  # where flex attention has no backward pass
        found = [replace(c, micro_batch=2) for c in found if c.attention != "flex_attention"]
    return found


class Allocation:
    """The ranks of one case on a spool, and what becomes of its orders."""

    def __init__(self, setting: Setting, case: Case) -> None:
        self.spool = Spool(setting.folder / case.name.replace(" ", "-").replace(",", ""))
        self.folder: AllocationDir = self.spool.allocation("gpu")
        self.folder.write_settings(_settings(setting, case).to_dict())
        self.log, self._orders = self.folder.path / "log", 0
        paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
        env = os.environ | {"WORLD_SIZE": str(case.ranks), "PYTHONPATH": os.pathsep.join(paths)}
        if not setting.gpus:
            env["CUDA_VISIBLE_DEVICES"] = ""
        with self.log.open("wb") as log:
            self.ranks = [
                subprocess.Popen(
                    [sys.executable, "-c", RANK, str(self.folder.path)],
                    env=env | {"RANK": str(rank)}, stdout=log, stderr=log,
                )
                for rank in range(case.ranks)
            ]  # fmt: skip

    def submit(self, kind: OrderKind, start: Path | None, steps: int = 0) -> str:
        """Hand in an order, as a site's launcher does; the worker takes one after the other."""
        order = Order("gpu", "here", self._orders, kind, steps=steps)
        self.spool.order(order.id).write_order(order, start)
        self.folder.assign(order.id)
        self._orders += 1
        return order.id

    def result(self, order_id: str) -> Result:
        """Wait for an order's result."""
        folder = self.spool.order(order_id)
        for _ in self._watch(folder.progress):
            if (result := folder.result()) is not None:
                break
        if result.state != "done":
            raise RuntimeError(result.error)
        return result

    def begun(self, order_id: str) -> dict[str, float]:
        """Wait until an order is running; return the allocation's seconds by phase then."""
        for _ in self._watch(self.seconds):
            state = self.folder.state()
            if state and (state.order_id == order_id or self.spool.order(order_id).has_result):
                break
        return self.seconds()

    def _watch(self, sign: Callable[[], Any]) -> Iterator[None]:
        """Look again and again, as long as the ranks live and there are signs of progress."""
        seen, since = "", time.monotonic()
        while time.monotonic() - since < LOST_S:
            if any(rank.poll() is not None for rank in self.ranks):
                raise RuntimeError(self._last_words())
            if (now := f"{sign()} {self.seconds()}") != seen:
                seen, since = now, time.monotonic()
            yield
            time.sleep(0.05)
        raise RuntimeError(f"nothing happens for {LOST_S:.0f} s; {self._last_words()}")

    def seconds(self) -> dict[str, float]:
        """Return the allocation's seconds by phase."""
        state = self.folder.state()
        return dict(state.seconds) if state else {}

    def close(self) -> None:
        """End the ranks: in order if they are alive."""
        self.folder.release()
        for rank in self.ranks:
            try:
                rank.wait(timeout=60)
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()

    def _last_words(self) -> str:
        state = self.folder.state()
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return (state.error if state and state.error else "") or " | ".join(lines[-3:])


def measure(setting: Setting, case: Case) -> dict[str, Any]:
    """Return what one case reached; raises RuntimeError, in words, if it did not."""
    began = time.monotonic()
    allocation = Allocation(setting, case)
    try:
        start = setting.start or _initialize(setting, allocation)
        found = _train(setting, case, allocation, start)
    finally:
        allocation.close()
        shutil.rmtree(allocation.spool.root, ignore_errors=True)
    return found | _predicted(setting, case) | {"seconds": round(time.monotonic() - began, 1)}


def _initialize(setting: Setting, allocation: Allocation) -> Path:
    """Have the model's random weights written, for all cases to begin with."""
    order_id = allocation.submit("initialize", None)
    allocation.result(order_id)
    start = setting.folder / "start.safetensors"
    shutil.move(allocation.spool.order(order_id).weights, start)
    setting.start = start
    return start


def _train(setting: Setting, case: Case, allocation: Allocation, start: Path) -> dict[str, Any]:
    """Train a first order and later ones that wait in the inbox, as those of a run do."""
    steps = setting.steps * (LONGER if case.later > 1 else 1)
    first = allocation.submit("train", start, setting.steps)
    later = [allocation.submit("train", start, steps) for _ in range(case.later)]
    results = [allocation.result(first)]
    phases = allocation.seconds()
    marks = [allocation.begun(order_id) for order_id in later]
    results += [allocation.result(order_id) for order_id in later]
    last = results[-1]
    found = {
        "tokens_per_s": round(last.metrics["tokens_per_s"]),
        "mfu_percent": round(last.metrics.get("mfu", 0.0), 2),
        "step_s": round(last.seconds["train"] / last.steps, 4),
        "peak_memory_gb": round(last.metrics["peak_memory_gb"], 2),
        "start_to_ready_s": round(phases["startup"] + phases["load"], 1),
        "first_order_to_first_step_s": round(results[0].seconds["first_step"], 2),
        "later_order_to_first_step_s": round(last.seconds["first_step"], 2),
        "train_loss": round(last.metrics["train_loss"], 3),
    }
    if case.later > 1:  # from the beginning of the first of them to that of the last
        spent = {name: (marks[-1][name] - marks[0][name]) / (case.later - 1) for name in marks[0]}
        idle = sum(seconds for name, seconds in spent.items() if name != "train")
        found |= {
            "gpu_idle_per_order_s": round(idle, 2),
            "of_an_order_of_5_minutes_percent": round(100 * idle / (300 + idle), 2),
            "seconds_per_order": {name: round(value, 2) for name, value in spent.items() if value},
            "weights_and_checkpoint_written_s": round(last.seconds["write"], 1),
        }
    return found


def _predicted(setting: Setting, case: Case) -> dict[str, float]:
    """Return what `flwr_hpc.plan` says of the case, which knows no eager attention of a Llama."""
    if case.attention == "eager":
        return {}
    plan = ParallelPlan(1, case.ranks, 1, case.micro_batch, 1, case.checkpointing)
    facility = FacilityConfig(
        scheduler="local", ranks_per_node=case.ranks, gpus_per_node=setting.gpus,
        peak_tflops=setting.peak_tflops,
    )  # fmt: skip
    made, _ = machine(facility, 1, "auto", efficiency=0.5, overlap=0.8)
    return {
        "predicted_memory_gb": round(
            memory(setting.shape, plan, setting.seq_len, made.compute_bytes).total / 1e9, 2
        ),
        "predicted_step_s": round(step_time(setting.shape, plan, setting.seq_len, made).total, 4),
    }


def _settings(setting: Setting, case: Case) -> WorkerSettings:
    model = setting.model | {"attn_implementation": case.attention}
    train = TrainConfig(
        micro_batch=case.micro_batch, lr=1e-4, warmup_steps=2, activation_checkpointing=
        case.checkpointing, precision="bf16" if setting.gpus else "fp32",
        checkpoint_every_orders=1 if case.later > 1 else 0,
    )  # fmt: skip
    data = DataConfig(
        kind="jsonl", paths={"here": [str(setting.data)]}, seq_len=setting.seq_len,
        document_mask=case.document_mask, tokenizer="byte", held_out_sequences=2,
    )  # fmt: skip
    return WorkerSettings(
        facility="here", facilities=["here"], seed=0, rounds=1, model=ModelConfig(config=model),
        data=data, train=train, idle_timeout_s=600.0, progress_timeout_s=0.0, walltime_s=None,
        peak_tflops=setting.peak_tflops, gpus_per_node=setting.gpus, internet=False,
        codec="full", feedback=0.0, lora_r=None,
    )  # fmt: skip


def write_documents(path: Path, tokens: int) -> None:
    """Write documents of random words, several to a sequence."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(1000)]
    count = tokens // (6 * DOCUMENT_WORDS) + 8
    with path.open("w") as file:
        for _ in range(count):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=DOCUMENT_WORDS))}) + "\n")


def run(setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """Measure the cases one after the other; record what there is after each."""
    found: dict[str, Any] = {}
    chosen = cases(setting.gpus, args.device == "cpu")
    for case in chosen:
        if found and time.monotonic() > setting.ends_at - 0.8 * _longest(found):
            found[case.name] = {"left_out": f"no time left of --minutes {args.minutes:g}"}
            continue
        try:
            found[case.name] = measure(setting, case)
        except RuntimeError as exc:  # out of memory, say: a result, too
            found[case.name] = {"failed": str(exc)[:500]}
        print(f"{case.name}: {json.dumps(found[case.name])}", flush=True)
        if args.device == "cuda":
            _record(setting, args, chosen, found)
    return found


def _longest(found: dict[str, Any]) -> float:
    """Return the seconds of the longest case but the first, which has more orders."""
    return max([60.0, *(case.get("seconds", 0.0) for case in list(found.values())[1:])])


def _record(
    setting: Setting, args: argparse.Namespace, chosen: list[Case], found: dict[str, Any]
) -> None:
    config = {
        "device": torch.cuda.get_device_name(), "gpus": setting.gpus, "model": args.model,
        "peak_tflops": setting.peak_tflops, "seq_len": setting.seq_len, "steps": setting.steps,
        "cases": {case.name: asdict(case) for case in chosen},
    }  # fmt: skip
    record("gpu", {"cost_of_document_mask_percent": cost_of_mask(found), "cases": found}, config)


def cost_of_mask(found: dict[str, Any]) -> float | None:
    """Return how much longer a step takes where documents are kept apart."""
    pair = [found.get(name, {}).get("step_s") for name in ("document mask", "plain")]
    return round(100 * (pair[0] / pair[1] - 1), 1) if all(pair) else None


def peak_of(device: str) -> float:
    """Return a GPU's dense bf16 TFLOP/s by its name."""
    for name, peak in PEAKS.items():
        if name in device:
            return peak
    sys.exit(f"the peak of '{device}' is not known: give its dense bf16 TFLOP/s, --peak-tflops N")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", default="llama3_1b", help="a file of conf/model")
    parser.add_argument("--seq-len", type=int, help="default: 2048; on CPUs 128")
    parser.add_argument("--steps", type=int, help="per order; default: 20; on CPUs 2")
    parser.add_argument("--minutes", type=float, default=9.0, help="no case is begun after so long")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 of one GPU")
    parser.add_argument(
        "--folder", type=Path, help="for weights and data; default: a temporary one"
    )
    return parser.parse_args()


def main() -> int:
    """Run; 0 if every case that was begun came to its end."""
    args = _arguments()
    cpu = args.device == "cpu"
    gpus = 0 if cpu else torch.cuda.device_count()
    if not cpu and not gpus:
        print("torch sees no GPU here; a trial without: --device cpu --model tiny_llama")
        return 0
    seq_len, steps = args.seq_len or (128 if cpu else 2048), args.steps or (2 if cpu else 20)
    model = yaml.safe_load((ROOT / "conf" / "model" / f"{args.model}.yaml").read_text())["config"]
    peak = args.peak_tflops or (0.1 if cpu else peak_of(torch.cuda.get_device_name()))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        data = Path(folder) / "documents.jsonl"
        write_documents(data, 64 * seq_len * max(1, gpus))
        setting = Setting(
            model, seq_len, steps, gpus, peak, Path(folder), data,
            time.monotonic() + 60 * args.minutes,
        )  # fmt: skip
        found = run(setting, args)
    plain = found["plain"].get("mfu_percent", 0.0)
    print(
        f"MFU {plain:.1f} % (aim {AIM_MFU:g}); document mask: {cost_of_mask(found)} % longer steps"
    )
    return int(any("failed" in case for case in found.values()))


if __name__ == "__main__":
    sys.exit(main())
