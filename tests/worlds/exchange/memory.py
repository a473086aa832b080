"""A server in a process of its own that takes one round of replies, and how much memory it takes.

python -m worlds.exchange.memory FOLDER STRATEGY CODEC MEMORY_GB
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from worlds.exchange.federation import encode
from worlds.jobs import TESTS

from flwr_hpc.config.server_memory import ServerMemory
from flwr_hpc.exchange.checkpoint import FileCheckpoints
from flwr_hpc.exchange.client import SiteExchange
from flwr_hpc.exchange.codec import make_codec
from flwr_hpc.exchange.compression.encoder import Encoder
from flwr_hpc.exchange.executors import DaemonThreads
from flwr_hpc.exchange.grid import ExchangeGrid
from flwr_hpc.exchange.records import lazy_record
from flwr_hpc.exchange.store import make_store
from flwr_hpc.exchange.tensorfile import TensorFile, write_safetensors
from flwr_hpc.exchange.tensors import TensorInfo
from flwr_hpc.simulate.identity import take_identity
from strategies import Runtime, limit_memory, run_strategy
from strategies.diloco import DiLoCo
from strategies.engine.runtime import Settings
from strategies.fedavg import FedAvg as Windows
from strategies.fedbackfill import FedBackfill
from strategies.fedbuff import FedBuff
from strategies.private import Private
from strategies.robust_fedavg import RobustFedAvg

SITES = (1, 2, 3)
# Has malloc give nothing back that was freed, so that looking now and then misses no peak.
KEPT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}


def flowers():
    return FedAvg(min_train_nodes=len(SITES), min_available_nodes=2, fraction_evaluate=0.0)


STRATEGIES = {
    "Flower's FedAvg": flowers,
    "FedAvg": Windows,
    "DiLoCo": DiLoCo,
    "FedBuff": lambda: FedBuff(buffer_size=len(SITES)),
    "FedBackfill": FedBackfill,
    "median": RobustFedAvg,
    "Krum": lambda: RobustFedAvg(rule="krum"),
    "private": lambda: Private(flowers()),
}


class Model:
    """Weights that all sites start from, and what each has trained."""

    def __init__(self, folder, shapes):
        self.folder, self.layout = folder, {n: TensorInfo("F32", s) for n, s in shapes.items()}
        self.initial = self._write("initial", np.float32(1.0))
        self.trained = {node: self._write(f"site{node}", 1.0 + 0.01 * node) for node in SITES}

    def _write(self, name, factor):
        """Write numbers that repeat, but in no step of a block or a scale."""
        path = self.folder / f"{name}.safetensors"
        row = np.random.default_rng(0).standard_normal(9973, dtype=np.float32) * np.float32(factor)
        tensors = ((n, np.resize(row, info.shape)) for n, info in self.layout.items())
        return path, write_safetensors(path, tensors, self.layout)

    @property
    def mb(self):
        return sum(info.nbytes for info in self.layout.values()) / 1e6

    def encode(self, codec):
        """Be each site's job; return what its messages name."""
        start = self.folder / f"{self.initial[1]}.safetensors"
        if not start.exists():
            start.hardlink_to(self.initial[0])
        work = self.folder / str(codec)
        for node, (path, _) in self.trained.items():
            (work / str(node)).mkdir(parents=True)
            copy = work / str(node) / "trained"
            copy.hardlink_to(path)
            found, sha256, _ = encode(Encoder(make_codec(codec)), copy, start)
            yield node, found, sha256

    def peak(self, strategy, codec, encoded, memory_gb):
        """Have a server make one version; return the anonymous MB that it took above idle."""
        exchange = SiteExchange(make_store(f"{self.folder}/store"), make_codec(codec))
        replies = {}
        for node, path, sha256 in encoded:
            content = RecordDict()
            exchange.send(content, "arrays", path, sha256, node)
            replies[node] = {key: dict(record) for key, record in content.items()}
        (self.folder / "replies.json").write_text(json.dumps(replies))
        args = (str(self.folder), strategy, json.dumps(codec), str(memory_gb))
        command = [sys.executable, "-m", "worlds.exchange.memory", *args]
        done = subprocess.run(
            command, env={**os.environ, **KEPT}, cwd=TESTS, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])


class Answers(Grid):
    """Has a reply for each site, which answers once."""

    def __init__(self, replies):
        self._replies, self._pushed, self._ids = replies, {}, itertools.count()

    def set_run(self, run): ...

    @property
    def run(self):
        return None

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def get_node_ids(self):
        return list(SITES)

    def push_messages(self, messages):
        return [self._push(message) for message in messages]

    def _push(self, message):
        message_id = message.metadata.__dict__["_message_id"] = str(next(self._ids))
        self._pushed[message_id] = message
        return message_id

    def pull_messages(self, message_ids):
        found = (self._answer(self._pushed[i]) for i in message_ids)
        return [reply for reply in found if reply is not None]

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message):
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        if kind not in ("train", "evaluate"):
            unknown = Error(2, f"No query function registered with name '{kind}'")
            return Message(unknown, reply_to=message)
        content = RecordDict({"metrics": MetricRecord({"num-examples": node})})
        if kind == "train":
            if str(node) not in self._replies:
                return None
            found = self._replies.pop(str(node))
            content.update({key: ConfigRecord(record) for key, record in found.items()})
        return Message(content, reply_to=message)


class Peak:
    """The largest anonymous memory of this process since it was made."""

    def __init__(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what importing has left free
        self.idle = self.most = self._now()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        while True:
            self.most = max(self.most, self._now())
            time.sleep(0.002)

    def _now(self):
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024 / 1e6


def main(folder, strategy, codec, memory_gb):
    take_identity()
    folder, memory = Path(folder), ServerMemory.of(float(memory_gb))
    limit_memory(memory.blocks)
    initial = lazy_record(TensorFile(folder / "initial.safetensors"))
    grid = ExchangeGrid(
        Answers(json.loads((folder / "replies.json").read_text())),
        make_store(f"{folder}/store"),
        make_codec(json.loads(codec)),
        folder / "server",
        memory=memory.checks,
        executor=DaemonThreads(),
    )
    settings = Settings(evaluate_every=0, final_evaluation_s=0.0, poll_s=0.01)
    checkpoints = FileCheckpoints(folder / "checkpoints" / str(os.getpid()), memory.waiting)
    runtime = Runtime(checkpoints=checkpoints, check=None, settings=settings)
    peak = Peak()
    result = run_strategy(STRATEGIES[strategy](), grid, initial, 1, runtime=runtime)
    told = {"mb": peak.most - peak.idle, "rejected": grid.rejected}
    moved = np.mean(result.arrays["head"].numpy() / initial["head"].numpy())
    print(json.dumps({**told, "moved": float(moved)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
