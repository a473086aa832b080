"""Does the trainer cost more than the loop a person would write, or than Hugging Face's Trainer?

The same Llama trained on the same sequences three ways: by orders to this package's worker (as
an allocation loads it), by a bare FSDP2 loop, and by `transformers.Trainer`, which replicates the
model (DDP). All are up at the same time, a thread per rank, and take turns of a few steps, the
first of which are the first each ever takes; only ratios within a turn count, as others use the
machine.

    python benchmarks/trainer_speed.py [SIZE[:RANKS:REPLICAS] ...]

Writes ``benchmarks/results/trainer_speed.json``.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, median
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}

import torch
import torch.distributed as dist
from _machine import RESULTS, record
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flwr_hpc.config.schema import DataConfig, ModelConfig, TrainConfig
from flwr_hpc.data.batches import Corpus, load_corpus
from flwr_hpc.protocol import Order
from flwr_hpc.spool import Spool
from flwr_hpc.train.load import load
from flwr_hpc.train.model import build, layers
from flwr_hpc.train.order import OrderRunner
from flwr_hpc.train.parallel.sharding import ONE_UNIT_BELOW
from flwr_hpc.train.rendezvous import join
from flwr_hpc.worker.deadline import Deadline
from flwr_hpc.worker.phase_timer import PhaseTimer
from flwr_hpc.worker.ranks import Ranks
from flwr_hpc.worker.reporter import Reporter
from flwr_hpc.worker.settings import WorkerSettings


@dataclasses.dataclass(frozen=True)
class Size:
    """A model, and how much of it to train."""

    hidden: int
    layers: int
    micro_batch: int
    steps: int  # Of a turn
    turns: int
    replicate: int = 1

    def model(self) -> dict[str, Any]:
        return {
            "model_type": "llama", "hidden_size": self.hidden,
            "intermediate_size": self.hidden * 11 // 4, "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64, "num_key_value_heads": self.hidden // 64,
        }  # fmt: skip


SIZES = {
    "14M": Size(384, 8, 2, 2, 7),
    "46M": Size(640, 9, 1, 1, 7),
    "1M": Size(128, 5, 2, 8, 7),
    # As many tokens a step and rank as training on GPUs has: what a step costs once counts less.
    "14M-2048": Size(384, 8, 16, 2, 5),
    "46M-1024": Size(640, 9, 8, 2, 5),
}
SETUPS = ((1, 1), (2, 1), (2, 2))  # ranks, and replicas of the model (train.replicate)
WAYS = ("ours", "bare", "hf")
SEQ_LEN = 128
TRAIN = TrainConfig(precision="fp32", warmup_steps=0, min_lr_ratio=1.0, lr=3e-4, clip=1.0)
DATA = DataConfig(paths={"a": ["email", "http"]}, seq_len=SEQ_LEN, document_mask=False)
AIMS = {"bare": 0.97, "hf": 1.0}  # of their tokens/s, from 14M on

Turn = dict[str, float]


@contextmanager
def measured(turn: Turn, prefix: str = "") -> Iterator[None]:
    """Add the wall-clock and CPU seconds of this process, all its threads together."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    turn[f"{prefix}wall_s"] = time.perf_counter() - wall
    turn[f"{prefix}cpu_s"] = time.process_time() - cpu


# Ours


def ours(folder: Path, ranks: Ranks, size: Size, pipe: Connection) -> None:
    """Carry out an order per turn."""
    spool = Spool(folder / "site")
    allocation = spool.allocation("job")
    settings = WorkerSettings(
        facility="a", facilities=["a"], seed=0, rounds=1, model=ModelConfig(config=size.model()),
        data=DATA, train=dataclasses.replace(
            TRAIN, micro_batch=size.micro_batch, replicate=size.replicate
        ),
        idle_timeout_s=3600.0, progress_timeout_s=600.0, walltime_s=3600.0, peak_tflops=None,
        gpus_per_node=0, internet=False, codec="full", feedback=0.0, lora_r=None,
    )  # fmt: skip
    timer, deadline = PhaseTimer(), Deadline(3600.0)
    group = join(allocation.path, ranks)
    with Reporter(allocation if ranks.rank == 0 else None, timer, deadline) as reporter:
        runner = load(settings, allocation, group, timer, reporter, deadline)
        runner.restore()
        weights = _carry_out(runner, spool, Order("run", "a", 0, "initialize"), None, {})
        seq = 0
        pipe.send({})
        while steps := pipe.recv():
            seq, turn = seq + 1, Turn()
            with measured(turn, "order_"):
                order = Order("run", "a", seq, "train", steps=steps)
                weights = _carry_out(runner, spool, order, weights, turn)
            pipe.send(turn)
    group.close()


def _carry_out(
    runner: OrderRunner, spool: Spool, order: Order, weights: Path | None, turn: Turn
) -> Path:
    """Carry out an order, until all of it is written; note what training alone took."""
    trainer = runner.trainer
    train = type(trainer).train

    def timed(*args: Any, **kwargs: Any) -> Any:
        with measured(turn):
            return train(trainer, *args, **kwargs)

    trainer.train = timed  # type: ignore[method-assign]
    folder = spool.order(order.id)
    result = runner.run(order, weights, folder)
    assert result is not None
    runner.publish(folder, result)
    runner.background.wait()
    turn["loss"] = result.metrics.get("last_loss", 0.0)
    return folder.weights


# The others


def _model_and_corpus(size: Size, folder: Path) -> tuple[Any, Corpus]:
    corpus = load_corpus(DATA, "a", ["a"], 0, folder)
    return build(ModelConfig(config=size.model()), corpus.tokenizer, 0, SEQ_LEN).model, corpus


def _rows(corpus: Corpus, ranks: Ranks, size: Size) -> torch.Tensor:
    """Return all sequences that will be read, in memory, in the order of the orders' data."""
    steps = size.steps * size.turns
    return corpus.batch(0, steps * size.micro_batch * ranks.world_size).input_ids


def bare(folder: Path, ranks: Ranks, size: Size, pipe: Connection) -> None:
    """Train as the tutorials do, with the same units of sharding as the trainer."""
    dist.init_process_group("gloo")
    model, corpus = _model_and_corpus(size, folder)
    batches = _rows(corpus, ranks, size).split(size.micro_batch)[ranks.rank :: ranks.world_size]
    shape, names = (ranks.world_size,), ("shard",)
    if size.replicate > 1:
        shape = (size.replicate, ranks.world_size // size.replicate)
        names = ("replicate", "shard")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    if sum(p.numel() for p in model.parameters()) >= ONE_UNIT_BELOW:
        for layer in layers(model):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(_groups(model), lr=TRAIN.lr, betas=(0.9, 0.95), fused=True)
    model.train()
    pipe.send({})
    done = 0
    while steps := pipe.recv():
        turn = Turn()
        with measured(turn):
            for ids in batches[done : done + steps]:
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), TRAIN.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            dist.all_reduce(total := loss.detach().clone())
            turn["loss"] = float(total) / ranks.world_size
        done += steps
        pipe.send(turn)
    dist.destroy_process_group()


def _groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": TRAIN.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def hf(folder: Path, ranks: Ranks, size: Size, pipe: Connection) -> None:
    """Train with `transformers.Trainer`, in one call whose steps wait for their turn."""
    import transformers

    model, corpus = _model_and_corpus(size, folder)
    rows = _rows(corpus, ranks, size)
    losses: list[torch.Tensor] = []

    class Waiting(transformers.TrainerCallback):
        left, turn, span = 0, Turn(), None

        def on_step_begin(self, *args: Any, **_: Any) -> None:
            if not self.left:
                self.left = pipe.recv() or 0
                args[2].should_training_stop = not self.left
                self.turn = Turn()
                self.span = measured(self.turn)
                self.span.__enter__()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.left -= 1
            if self.left == 0:
                total = losses[-1].detach().clone()
                if ranks.world_size > 1:
                    dist.all_reduce(total)
                self.turn["loss"] = float(total) / ranks.world_size
                self.span.__exit__(None, None, None)
                pipe.send(self.turn)

    class Ordered(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            losses[:] = [super().training_step(*args, **kwargs)]
            return losses[0]

    options = transformers.TrainingArguments(
        output_dir=str(folder / "hf"), max_steps=size.steps * size.turns, use_cpu=True,
        per_device_train_batch_size=size.micro_batch, learning_rate=TRAIN.lr,
        max_grad_norm=TRAIN.clip, lr_scheduler_type="constant", logging_strategy="no",
        save_strategy="no", report_to="none", disable_tqdm=True,
        ddp_backend="gloo" if ranks.world_size > 1 else None, ddp_find_unused_parameters=False,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(_groups(model), lr=TRAIN.lr, betas=(0.9, 0.95), fused=True)
    data = [{"input_ids": ids, "labels": ids} for ids in rows]
    trainer = Ordered(
        model, options, train_dataset=data, callbacks=[Waiting()], optimizers=(optimizer, None)
    )
    pipe.send({})
    trainer.train()
    if dist.is_initialized():
        dist.destroy_process_group()


# Turns


def _serve(way: str, folder: Path, ranks: Ranks, port: int, size: Size, pipe: Connection) -> None:
    if way == "bare" or (way == "hf" and ranks.world_size > 1):  # as torchrun does
        os.environ |= {"RANK": str(ranks.rank), "WORLD_SIZE": str(ranks.world_size)}
        os.environ |= {"LOCAL_RANK": str(ranks.rank), "LOCAL_WORLD_SIZE": str(ranks.world_size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    work: Callable[[Path, Ranks, Size, Connection], None] = globals()[way]
    try:
        work(folder, ranks, size, pipe)
    except Exception:
        traceback.print_exc()
        raise
    finally:
        pipe.close()


class Way:
    """The ranks of one of the ways."""

    def __init__(self, way: str, folder: Path, world_size: int, size: Size) -> None:
        context = multiprocessing.get_context("forkserver")  # libraries are imported once
        context.set_forkserver_preload(["transformers", "flwr_hpc.train.load"])
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            mine, theirs = context.Pipe()
            args = way, folder / way, Ranks(rank, world_size, rank, world_size), _port(way, folder)
            process = context.Process(target=_serve, args=(*args, size, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)
        self._answers()

    def turn(self, steps: int) -> Turn:
        """Take some steps; the slowest rank's wall clock, and all ranks' CPU seconds."""
        for pipe in self.pipes:
            pipe.send(steps)
        answers = self._answers()
        add = {"loss": mean, "wall_s": max, "cpu_s": sum, "order_wall_s": max, "order_cpu_s": sum}
        return {key: add[key](a[key] for a in answers) for key in answers[0]}

    def close(self) -> None:
        for pipe in self.pipes:
            with suppress(BrokenPipeError):  # who knew how many steps there are has ended
                pipe.send(0)
        for process in self.processes:
            process.join(60)

    def _answers(self) -> list[Turn]:
        return [pipe.recv() for pipe in self.pipes]


_ports: dict[tuple[str, Path], int] = {}


def _port(way: str, folder: Path) -> int:
    if (way, folder) not in _ports:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            _ports[way, folder] = free.getsockname()[1]
    return _ports[way, folder]


def compare(size: Size, world_size: int) -> list[dict[str, Turn]]:
    """Let the ways take turns, another one first each time."""
    with tempfile.TemporaryDirectory() as scratch:
        for way in WAYS:
            (Path(scratch) / way).mkdir()
        ways = {way: Way(way, Path(scratch), world_size, size) for way in WAYS}
        turns = []
        for i in range(size.turns):
            order = WAYS[i % 3 :] + WAYS[: i % 3]
            turns.append({way: ways[way].turn(size.steps) for way in order})
        for way in ways.values():
            way.close()
    return turns


def ratios(turns: list[dict[str, Turn]]) -> dict[str, float]:
    """Return the speed (and CPU seconds) of ours over that of the others."""
    found = {}
    for other in AIMS:
        for key in ("wall_s", "cpu_s"):
            each = [turn[other][key] / turn["ours"][key] for turn in turns]
            if key == "cpu_s":
                each = [1 / ratio for ratio in each]
            name = f"{'tokens/s' if key == 'wall_s' else 'CPU seconds'} over {other}"
            found[f"{name}, first"], found[name] = each[0], median(each[1:])
    rest = [turn["ours"]["order_cpu_s"] - turn["ours"]["cpu_s"] for turn in turns[1:]]
    return found | {"CPU seconds of an order besides training": median(rest)}


def main() -> int:
    """Measure, print and record; what was recorded of other sizes and setups stays."""
    rows: dict[str, dict[str, Any]] = {}
    if (RESULTS / "trainer_speed.json").exists():
        rows = json.loads((RESULTS / "trainer_speed.json").read_text())["rows"]
    for name in sys.argv[1:] or SIZES:
        name, *setup = name.split(":")
        for ranks, replicate in [tuple(map(int, setup))] if setup else SETUPS:
            size = dataclasses.replace(SIZES[name], replicate=replicate)
            turns = compare(size, ranks)
            found = {key: round(value, 3) for key, value in ratios(turns).items()}
            spread = max(abs(t[w]["loss"] / t["ours"]["loss"] - 1) for t in turns for w in AIMS)
            key = f"{name}, {ranks} ranks, {replicate} replicas"
            print(key, found, f"losses differ by {spread:.1e}", flush=True)
            rows[key] = {
                "size": dataclasses.asdict(size), "load_average": os.getloadavg(),
                "ratios": found, "losses_differ_by": spread, "turns": turns,
            }  # fmt: skip
            missed = [
                (key, other)
                for key, row in rows.items()
                for other, aim in AIMS.items()
                if not key.startswith("1M") and row["ratios"][f"tokens/s over {other}"] < aim
            ]
            record("trainer_speed", {"missed": missed, "rows": rows}, {"seq_len": SEQ_LEN})
    print("missed:", missed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
