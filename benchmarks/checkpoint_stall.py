"""How long training waits for its results and checkpoints, against what writing them takes.

Ends of orders of a model of 20 M parameters on two ranks, in turns: as before (a whole checkpoint
and the weights, while training waits) and as now (weights and the rest of the checkpoint in the
background of the next order). Between the ends the ranks train. "Pure write" is the same number
of bytes, fsynced, by one process with nothing else to do, on the same disk in the same turn.

    python benchmarks/checkpoint_stall.py

Writes ``benchmarks/results/checkpoint_stall.json``; exit code 1 if training waits more than 1.2
times the pure write of an order.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from _machine import record
from worlds.train.torch_ranks import LLAMA, start_team, tiny_trainer

from flwr_hpc.train.rendezvous import Group
from flwr_hpc.train.state.background import Background
from flwr_hpc.train.state.checkpoint import Checkpoints

MODEL = LLAMA | {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip
RANKS, TURNS, STEPS, LIMIT = 2, 5, 4, 1.2


def order_ends(group: Group, folder: Path) -> list[dict[str, float]]:
    """Return the seconds of each turn, of this rank."""
    trainer = tiny_trainer(group, model=MODEL, micro_batch=1)
    background, turns = Background(group), []
    old = Checkpoints(folder / "old", group)
    new = Checkpoints(folder / "new", group)
    trainer.train(1)
    for turn in range(TURNS + 1):  # the first one warms up
        trainer.train(STEPS)
        found = _before(group, trainer, old, folder / "old-order", turn)
        trainer.train(STEPS)
        found |= _now(group, trainer, new, background, folder / "new-order", turn)
        found["pure write"] = _pure_write(group, folder, found.pop("bytes"))
        turns.append(found)
    return turns[1:]


def _before(
    group: Group, trainer: Any, checkpoints: Checkpoints, folder: Path, turn: int
) -> dict[str, float]:
    group.broadcast(None)
    began = time.perf_counter()
    checkpoints.save(f"run-a-{turn:06d}", trainer.step, trainer.tensors(), {})
    saved = time.perf_counter()
    trainer.save_weights(folder / f"{turn}.safetensors")
    group.broadcast(None)
    return {"old: checkpoint": saved - began, "old: order": time.perf_counter() - began}


def _now(
    group: Group, trainer: Any, checkpoints: Checkpoints, background: Background, folder: Path,
    turn: int,
) -> dict[str, float]:  # fmt: skip
    file = folder / f"{turn}.safetensors"
    group.broadcast(None)
    began = time.perf_counter()
    write_weights = trainer.stage_weights(file).publish
    gathered = time.perf_counter()
    write = checkpoints.stage(f"run-a-{turn:06d}", trainer.step, trainer.tensors(), {}, file)
    staged = time.perf_counter()
    background.start(lambda: (write_weights(), write(), None)[-1])
    trainer.train(STEPS)
    trained = time.perf_counter()
    background.wait()  # as before the next order's end
    late = time.perf_counter() - trained
    again = time.perf_counter()
    trainer.train(STEPS)
    alone = time.perf_counter() - again
    saved = checkpoints.newest()
    assert saved is not None
    files = [file, *saved.path.glob("*.distcp")]
    return {
        "new: checkpoint": staged - gathered,
        "new: order": staged - began,
        "new: wait for the rest": late,
        "new: training slowed by": max(0.0, trained - staged - alone),
        "bytes": float(sum(path.stat().st_size for path in files)),
    }


def _pure_write(group: Group, folder: Path, size: float) -> float:
    took = 0.0
    if group.ranks.rank == 0:
        piece, path = os.urandom(1 << 22), folder / "pure"
        began = time.perf_counter()
        with open(path, "wb") as file:
            for _ in range(int(size) // len(piece)):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        took = time.perf_counter() - began
        path.unlink()
    return float(group.broadcast(took))


def main() -> int:
    """Run, print and record; 1 if the limit is broken."""
    with tempfile.TemporaryDirectory() as folder:
        team = start_team(Path(folder), RANKS)
        turns = team.run(order_ends, Path(folder))
        team.close()
    found = {name: median(turn[name] for turn in turns) for name in turns[0]}
    for name, seconds in found.items():
        print(f"{name:<26}{seconds:8.2f} s")
    ratios = {
        when: median(t[f"{when}: order"] / t["pure write"] for t in turns)
        for when in ("old", "new")
    }
    for when, ratio in ratios.items():
        print(f"an order waits, {when}: {ratio:.2f} of the pure write")
    figures = {
        "seconds": {name: round(value, 3) for name, value in found.items()},
        "of_pure_write": {when: round(ratio, 3) for when, ratio in ratios.items()},
    }
    record("checkpoint_stall", figures, {"model": MODEL, "ranks": RANKS, "turns": TURNS})
    return 0 if ratios["new"] <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
