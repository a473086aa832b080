"""Peak memory of the ServerApp and of a ClientApp when weights go out of band.

Flower's own FedAvg trains a model of >= 500 MB with 8 facilities over the exchange grid. Every
facility answers in a process of its own with the exchange's own functions, and a third process
stands for the trainer, so that each figure is one process's alone. Compared with the same
strategy over plain Flower arrays, where memory permits.

    python benchmarks/exchange/server_memory.py

Limits: ServerApp < 3 model sizes + 250 MB, ClientApp < 200 MB. Exit code 1 if one is broken.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from flwr_hpc.exchange.client import SiteExchange
from flwr_hpc.exchange.codec import make_codec
from flwr_hpc.exchange.grid import ExchangeGrid
from flwr_hpc.exchange.store import make_store
from flwr_hpc.exchange.tensorfile import TensorFile, write_safetensors
from flwr_hpc.exchange.tensors import TensorInfo

sys.path.append(str(Path(__file__).parents[1]))
from _machine import record

MB = 1e6
SERVER_LIMIT = (3, 250)  # model sizes, MB
CLIENT_LIMIT = 200  # MB
MODEL = {"vocab": 32_000, "hidden": 768, "intermediate": 2048, "layers": 12}


def layout() -> dict[str, TensorInfo]:
    """Return the tensors of a Llama of `MODEL`'s sizes, embeddings untied."""
    h, i = MODEL["hidden"], MODEL["intermediate"]
    shapes = {"embed": (MODEL["vocab"], h), "head": (MODEL["vocab"], h), "norm": (h,)}
    for n in range(MODEL["layers"]):
        shapes |= {f"layers.{n}.{k}": (h, h) for k in ("q", "k", "v", "o")}
        shapes |= {f"layers.{n}.{k}": (i, h) for k in ("gate", "up")}
        shapes |= {f"layers.{n}.down": (h, i), f"layers.{n}.norm": (h,)}
    return {name: TensorInfo("F32", shape) for name, shape in shapes.items()}


def peak_mb() -> float:
    """Return this program's peak RSS in MB.

    ``ru_maxrss`` of a process that was started by a larger one shows the larger one's memory
    (Linux keeps the figure across exec), so where that matters the kernel's mark of this
    address space is read instead.
    """
    status = Path("/proc/self/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) * 1024 / MB


def max_rss_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB


class Facilities(Grid):
    """Answers messages in processes of their own, one per message as Flower does."""

    def __init__(self, count: int, folder: Path, exchange: bool) -> None:
        identity = Message.__init__.__globals__["TaskIdentity"]  # as Flower does at start
        identity.task_id, identity.run_id, identity.node_id = 1, 1, 1
        self.count, self.folder, self.exchange = count, folder, exchange
        self.client_peaks: list[float] = []
        self._ids, self._pushed = itertools.count(), dict[str, Message]()

    def set_run(self, run: Any) -> None:
        """Take no notice."""

    @property
    def run(self) -> Any:
        """Unused by FedAvg."""
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Unused by FedAvg."""
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep the messages until their replies are asked for."""
        for message in messages:
            message_id = message.metadata.__dict__["_message_id"] = str(next(self._ids))
            self._pushed[message_id] = message
            yield message_id

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Let one facility after the other answer."""
        return [self._answer(self._pushed.pop(i)) for i in message_ids if i in self._pushed]

    def get_node_ids(self) -> Iterable[int]:
        """Number the facilities from 1."""
        return range(1, self.count + 1)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push and pull."""
        return self.pull_messages(list(self.push_messages(messages)))

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        content = RecordDict({"metrics": MetricRecord({"num-examples": node})})
        if message.metadata.message_type == "train" and self.exchange:
            sent = {k: dict(r) for k, r in message.content.items()}
            reply = run("client", str(self.folder), str(node), stdin=json.dumps(sent))
            self.client_peaks.append(reply.pop("peak_mb"))
            content.update({k: ConfigRecord(r) for k, r in reply.items()})
        elif message.metadata.message_type == "train":
            # What Flower's own Grid has in memory after it pulled a reply.
            content["arrays"] = ArrayRecord(
                {n: Array(np.full(s.shape, node, np.float32)) for n, s in layout().items()}
            )
        return Message(content, reply_to=message)


def server(folder: Path, facilities: int, rounds: int, exchange: bool) -> dict[str, Any]:
    """Be the ServerApp; return its peak memory."""
    base = peak_mb()
    inner = Facilities(facilities, folder, exchange)
    grid: Grid = inner
    if exchange:
        grid = ExchangeGrid(
            inner, make_store(f"file://{folder}/store"), make_codec("full"), folder / "server"
        )
    rng = np.random.default_rng(0)
    initial = ArrayRecord()
    for name, spec in layout().items():
        initial[name] = Array(rng.standard_normal(spec.shape, dtype=np.float32))
    began = time.monotonic()
    result = FedAvg(min_train_nodes=facilities).start(grid, initial, rounds)
    assert all(np.isfinite(a.numpy()).all() for a in result.arrays.values())
    return {
        "base_mb": base,
        "peak_mb": peak_mb(),
        "max_rss_mb": max_rss_mb(),
        "clients_mb": inner.client_peaks,
        "seconds": time.monotonic() - began,
        "rejected": grid.rejected if isinstance(grid, ExchangeGrid) else 0,
    }


def client(folder: Path, node: int) -> dict[str, Any]:
    """Be the thin ClientApp: fetch weights, let the trainer work, send its weights."""
    ClientApp()
    content = RecordDict({k: ConfigRecord(record) for k, record in json.load(sys.stdin).items()})
    site = folder / f"site{node}"
    site.mkdir(exist_ok=True)
    exchange = SiteExchange(make_store(f"file://{folder}/store"), make_codec("full"))
    received = exchange.receive(content, "arrays", site)
    sha256 = run("trainer", str(received), str(site / "trained.safetensors"), str(node))
    reply = RecordDict()
    exchange.send(reply, "arrays", site / "trained.safetensors", sha256, node)
    assert received is not None
    received.unlink()
    return {**{k: dict(r) for k, r in reply.items()}, "peak_mb": peak_mb()}


def trainer(source: Path, target: Path, node: int) -> str:
    """Stand for the job that trains; return the hash of what it wrote."""
    file = TensorFile(source)

    def trained() -> Iterator[tuple[str, Any]]:
        for name in file.layout:
            yield name, file.tensor(name) * np.float32(0.9) + np.float32(node / 1000)

    return write_safetensors(target, trained(), file.layout)


def run(role: str, *args: str, stdin: str = "") -> Any:
    """Run one role in a process of its own and return the JSON it prints last."""
    command = [sys.executable, __file__, "--role", role, *args]
    done = subprocess.run(command, input=stdin, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(facilities: int, rounds: int) -> dict[str, Any]:
    """Run everything and return the figures."""
    model_mb = sum(spec.nbytes for spec in layout().values()) / MB
    figures: dict[str, Any] = {}
    for name, exchange in (("exchange", True), ("plain", False)):
        needed = (2 * facilities + 4) * model_mb  # plain: replies of two rounds at once
        if not exchange and psutil.virtual_memory().available / MB < needed + 2000:
            continue
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = run("server", folder, str(facilities), str(rounds), str(exchange))
    limit = SERVER_LIMIT[0] * model_mb + SERVER_LIMIT[1]
    peak = max(figures["exchange"]["peak_mb"], figures["exchange"]["max_rss_mb"])
    client_peak = max(figures["exchange"]["clients_mb"])
    return {
        "model_mb": model_mb,
        "server_peak_mb": peak,
        "server_limit_mb": limit,
        "server_base_mb": figures["exchange"]["base_mb"],
        "client_peak_mb": client_peak,
        "client_limit_mb": CLIENT_LIMIT,
        "plain_flower_peak_mb": figures.get("plain", {}).get("peak_mb"),
        "seconds": figures["exchange"]["seconds"],
        "rejected": figures["exchange"]["rejected"],
        "ok": peak < limit and client_peak < CLIENT_LIMIT and not figures["exchange"]["rejected"],
    }


def table(figures: dict[str, Any]) -> str:
    size = figures["model_mb"]
    rows = [
        ("ServerApp, exchange grid", figures["server_peak_mb"], figures["server_limit_mb"]),
        ("ServerApp, plain arrays", figures["plain_flower_peak_mb"], None),
        ("ClientApp, receive + send", figures["client_peak_mb"], figures["client_limit_mb"]),
    ]
    lines = [f"model {size:.0f} MB, FedAvg"]
    lines.append(f"{'peak RSS':<28}{'MB':>8}{'models':>9}{'limit MB':>10}")
    for name, peak, limit in rows:
        if peak is not None:
            shown = f"{limit:.0f}" if limit else "-"
            lines.append(f"{name:<28}{peak:>8.0f}{peak / size:>9.2f}{shown:>10}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--facilities", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    match options.role:
        case None:
            figures = measure(options.facilities, options.rounds)
            config = {"facilities": options.facilities, "rounds": options.rounds, **MODEL}
            record("server_memory", figures, config)
            print(table(figures))
            sys.exit(0 if figures["ok"] else 1)
        case ["server", folder, facilities, rounds, exchange]:
            answer: Any = server(Path(folder), int(facilities), int(rounds), exchange == "True")
        case ["client", folder, node]:
            answer = client(Path(folder), int(node))
        case ["trainer", source, target, node]:
            answer = trainer(Path(source), Path(target), int(node))
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
