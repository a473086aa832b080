"""Real worker processes of one site, reached through the files of a spool as the launcher does."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from worlds.jobs import until
from worlds.train.forked import Forked

from flwr_hpc.config.schema import DataConfig, ModelConfig, TrainConfig
from flwr_hpc.protocol import Order, Result
from flwr_hpc.spool import AllocationDir, OrderDir, Spool

RUN = "import sys; from flwr_hpc.train.worker import run; run(sys.argv[1])"
# Checkpoints wait while there is a file "slow" in the allocation's folder.
SLOW = """
import sys, time
from pathlib import Path
from torch.distributed.checkpoint import FileSystemWriter
from flwr_hpc.train import worker
write, folder = FileSystemWriter.write_data, Path(sys.argv[1])
def slow(self, *args):
    while (folder / "slow").exists():
        time.sleep(0.02)
    return write(self, *args)
FileSystemWriter.write_data = slow
worker.run(sys.argv[1])
"""
FAST = TrainConfig(steps=4, micro_batch=2, lr=1e-2, warmup_steps=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"{i} bottles of {i * i} on the wall\n" for i in range(900)))
    return path


@pytest.fixture
def site(tmp_path: Path, text: Path) -> Iterator[Site]:
    site = Site(Spool(tmp_path / "site"), text)
    yield site
    site.close()


class Site:
    """A spool, the allocations on it and their processes."""

    def __init__(self, spool: Spool, text: Path) -> None:
        self.spool = spool
        self.text = text
        self.processes: list[list[Forked]] = []

    def start(
        self,
        ranks: int = 2,
        train: TrainConfig = FAST,
        program: str = RUN,
        requeued: AllocationDir | None = None,
        fresh: bool = False,
        **settings: Any,
    ) -> AllocationDir:
        """Start the ranks of a new allocation, or of one once more."""
        number = str(len(self.processes))
        allocation = requeued or self.spool.allocation(f"job-{number}")
        allocation.write_settings(self._settings(train) | settings)
        env = os.environ | {"WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
        env["FLWR_HPC_ATTEMPT"] = number
        log = allocation.path / "log"
        log.write_bytes(b"")
        self.processes.append(
            [
                Forked(program, str(allocation.path), env | {"RANK": str(rank)}, log, fresh)
                for rank in range(ranks)
            ]
        )
        return allocation

    def _settings(self, train: TrainConfig) -> dict[str, Any]:
        from worlds.train.torch_ranks import LLAMA

        data = DataConfig(kind="text", paths={"a": [str(self.text)]}, seq_len=32)
        return {
            "facility": "a", "facilities": ["a"], "seed": 0,
            "model": dataclasses.asdict(ModelConfig(config=LLAMA)),
            "data": dataclasses.asdict(data), "train": dataclasses.asdict(train),
            "codec": "full", "feedback": 0.0,
            "rounds": 3, "idle_timeout_s": 3600.0, "walltime_s": 3600.0,
            "progress_timeout_s": 600.0,
            "peak_tflops": 1.0, "gpus_per_node": 0, "internet": False, "lora_r": None,
        }  # fmt: skip

    def order(self, allocation: AllocationDir, seq: int, **fields: Any) -> OrderDir:
        """Hand in an order; ``start`` and ``extra_arrays`` are the files that it comes with."""
        start, extra_arrays = fields.pop("start", None), fields.pop("extra_arrays", None)
        order = Order("run", "a", seq, **fields)
        folder = self.spool.order(order.id)
        folder.write_order(order, start, extra_arrays)
        allocation.assign(order.id)
        return folder

    def done(self, folder: OrderDir) -> Result:
        self.wait(lambda: folder.result() is not None)
        result = folder.result()
        assert result is not None
        assert result.state == "done", result.error
        return result

    def wait(self, reached: Callable[[], bool]) -> None:
        until(reached, self.spool.root, explain=self.logs)

    def ended(self, index: int = -1) -> list[int]:
        """Wait until an allocation's processes are gone and return their exit codes."""
        self.wait(lambda: all(p.poll() is not None for p in self.processes[index]))
        return [p.returncode for p in self.processes[index]]

    def logs(self) -> str:
        return "\n".join((a.path / "log").read_text() for a in self.spool.allocations())

    def close(self) -> None:
        for process in (p for ranks in self.processes for p in ranks):
            process.kill()
            process.wait()
