"""Memory and speed of aggregation when weights go out of band, by strategy and number of sites.

Every site's reply is unlike the others, fetched, trained (scaled) and sent by the exchange's own
functions in processes of their own, so that each figure is one process's alone. Beside it Flower's
own FedAvg with arrays inside its messages, whose replies are made as they are pulled, and with no
other copy of them.

    python benchmarks/exchange/server_memory.py [--sites 2 4 8 16] [--memory-gb G]
        [--layers N --hidden N]

Anonymous memory (what a process must have) and mapped files (which the system takes back when it
needs room) are told apart, every 10 ms. The speed is that of the last version's making, from the
replies' files to the file of the version, against reading those files once, in the same process.
The way from a job to the server and back is what a job takes to write its weights and to read new
ones into its model, its site to send and to fetch them, and the server to take and check a reply
and to make a version (a reply's share of it), against `cp` of the reply's file, twice.

Limits: anonymous memory above an idle server's <= half a model and <= --memory-gb. Exit code 1 if
one is broken.
Writes ``benchmarks/results/server_memory.json``.
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
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from flwr_hpc.config.schema import ExchangeConfig
from flwr_hpc.config.server_memory import ServerMemory
from flwr_hpc.exchange.checkpoint import FileCheckpoints
from flwr_hpc.exchange.client import SiteExchange
from flwr_hpc.exchange.codec import make_codec
from flwr_hpc.exchange.grid import ExchangeGrid
from flwr_hpc.exchange.records import lazy_record
from flwr_hpc.exchange.store import make_store
from flwr_hpc.exchange.tensorfile import TensorFile, write_safetensors
from flwr_hpc.exchange.tensors import TensorInfo
from flwr_hpc.simulate.identity import take_identity
from strategies import Runtime, limit_memory, run_strategy
from strategies.diloco import DiLoCo
from strategies.engine.runtime import Settings
from strategies.fedbackfill import FedBackfill
from strategies.fedbuff import FedBuff

sys.path.append(str(Path(__file__).parents[1]))
from _machine import record

MB = 1e6
LIMIT = 0.5  # models
PIECE = 8 << 20
Cost = tuple[float, float]  # wall and CPU seconds
STRATEGIES: dict[str, Callable[[int], Strategy]] = {
    "Flower's FedAvg": lambda sites: FedAvg(
        min_train_nodes=sites, min_available_nodes=sites, fraction_evaluate=0.0
    ),
    "DiLoCo": lambda sites: DiLoCo(),
    "FedBuff": lambda sites: FedBuff(buffer_size=sites),
    "FedBackfill": lambda sites: FedBackfill(),
}
PLAIN = "Flower's FedAvg, inline"


def layout(hidden: int, layers: int) -> dict[str, TensorInfo]:
    """Return the tensors of a Llama with a vocabulary of 32,000, embeddings untied."""
    h, i = hidden, hidden * 8 // 3
    shapes = {"embed": (32_000, h), "head": (32_000, h), "norm": (h,)}
    for n in range(layers):
        shapes |= {f"layers.{n}.{k}": (h, h) for k in ("q", "k", "v", "o")}
        shapes |= {f"layers.{n}.{k}": (i, h) for k in ("gate", "up")}
        shapes |= {f"layers.{n}.down": (h, i), f"layers.{n}.norm": (h,)}
    return {name: TensorInfo("F32", shape) for name, shape in shapes.items()}


class Peaks:
    """The largest memory of this process, by kind, since `begin`; MB."""

    def __init__(self) -> None:
        self.anonymous = self.mapped = self.idle = 0.0

    def begin(self) -> None:
        self.idle, _ = self._now()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            anonymous, mapped = self._now()
            self.anonymous, self.mapped = max(self.anonymous, anonymous), max(self.mapped, mapped)
            time.sleep(0.01)

    def _now(self) -> tuple[float, float]:
        status = Path("/proc/self/status").read_text()
        sizes = dict(re.findall(r"(Rss\w+):\s+(\d+) kB", status))
        return int(sizes["RssAnon"]) * 1024 / MB, int(sizes["RssFile"]) * 1024 / MB


class Facilities(Grid):
    """Answers messages in processes of their own, one per message as Flower does."""

    def __init__(self, count: int, folder: Path, exchange: bool) -> None:
        self.count, self.folder, self.exchange = count, folder, exchange
        self.client_peaks: list[float] = []
        self.moved: list[Cost] = []  # by site and job
        self._ids, self._pushed = itertools.count(), dict[str, Message]()

    def set_run(self, run: Any) -> None:
        """Take no notice."""

    @property
    def run(self) -> Any:
        """Return nothing: no strategy asks."""
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Refuse: no strategy asks."""
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep the messages until their replies are asked for."""
        return [self._keep(message) for message in messages]

    def _keep(self, message: Message) -> str:
        message_id = message.metadata.__dict__["_message_id"] = str(next(self._ids))
        self._pushed[message_id] = message
        return message_id

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
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        if kind not in ("train", "evaluate"):
            unknown = Error(2, f"No query function registered with name '{kind}'")
            return Message(unknown, reply_to=message)
        content = RecordDict({"metrics": MetricRecord({"num-examples": node})})
        if kind == "train" and self.exchange:
            sent = {k: dict(r) for k, r in message.content.items()}
            reply = run("client", str(self.folder), str(node), stdin=json.dumps(sent))
            self.client_peaks.append(reply.pop("peak_mb"))
            self.moved.append(reply.pop("cost"))
            content.update({k: ConfigRecord(r) for k, r in reply.items()})
        elif kind == "train":
            (weights,) = message.content.array_records.values()
            content["arrays"] = ArrayRecord(
                {n: Array(a.numpy() * np.float32(0.9)) for n, a in weights.items()}
            )
        return Message(content, reply_to=message)


class TimedCheckpoints(FileCheckpoints):
    """Notes what the last version took to make and write."""

    took = (0.0, 0.0)

    def put(self, name: str, tensors: Any) -> ArrayRecord:
        watch = stopwatch()
        record = super().put(name, tensors)
        if name.startswith("global"):
            self.took = watch()
        return record


def stopwatch() -> Callable[[], Cost]:
    """Return what tells the wall and CPU seconds of this process since now."""
    wall, cpu = time.perf_counter(), time.process_time()
    return lambda: (time.perf_counter() - wall, time.process_time() - cpu)


def added(*costs: Cost) -> Cost:
    """Return costs together."""
    wall, cpu = zip(*costs, strict=True)
    return sum(wall), sum(cpu)


def server(
    folder: Path, strategy: str, sites: int, hidden: int, layers: int, memory: ServerMemory
) -> dict[str, Any]:
    """Be the ServerApp for two versions; return its peaks and its speed."""
    take_identity()
    peaks, plain = Peaks(), strategy == PLAIN
    inner = Facilities(sites, folder, exchange=not plain)
    initial = _initial(folder, layout(hidden, layers))
    if plain:
        initial = ArrayRecord({n: Array(a.numpy()) for n, a in initial.items()})
        peaks.begin()
        STRATEGIES["Flower's FedAvg"](sites).start(inner, initial, 2)
        return {"anonymous_mb": peaks.anonymous - peaks.idle, "mapped_mb": peaks.mapped}
    store = f"file://{folder}/store"
    checkpoints = TimedCheckpoints(folder / "checkpoints", memory.waiting)
    limit_memory(memory.blocks)
    refused: list[Any] = []
    grid = ExchangeGrid(
        inner, make_store(store), make_codec("full"), folder / "server",
        emit=lambda event, **told: refused.append(told) if event == "order_rejected" else None,
        memory=memory.checks,
    )  # fmt: skip
    settings = Settings(evaluate_every=0, final_evaluation_s=0.0, poll_s=0.01)
    runtime = Runtime(checkpoints=checkpoints, check=None, settings=settings)
    take, taken_in = grid._receiver.take, list[Cost]()

    def timed(*args: Any) -> Any:
        watch = stopwatch()
        reply = take(*args)
        if reply.array_records:
            taken_in.append(watch())
        return reply

    grid._receiver.take = timed  # type: ignore[method-assign]
    peaks.begin()
    versions = 2 * sites if strategy == "FedBackfill" else 2
    run_strategy(STRATEGIES[strategy](sites), grid, initial, versions, runtime=runtime)
    assert grid.rejected == 0, refused
    # FedBackfill makes a version of one reply.
    taken = 1 if versions > 2 else sites
    replies = [folder / f"site{n + 1}" / "trained.safetensors" for n in range(taken)]
    read, (version_s, version_cpu_s) = _read_s(replies), checkpoints.took
    moved = added(min(inner.moved), min(taken_in), (version_s / taken, version_cpu_s / taken))
    copied = added(_copied(replies[0]), _copied(replies[0]))
    return {
        "anonymous_mb": peaks.anonymous - peaks.idle,
        "mapped_mb": peaks.mapped,
        "client_mb": max(inner.client_peaks),
        "version_s": version_s,
        "version_cpu_s": version_cpu_s,
        "speed_of_reading": read / version_s,
        "there_and_back_s": moved[0],
        "there_and_back_cpu_s": moved[1],
        "over_two_cp": moved[0] / copied[0],
        "over_two_cp_cpu": moved[1] / copied[1],
    }


def _initial(folder: Path, model: dict[str, TensorInfo]) -> ArrayRecord:
    """Return random weights in a file."""
    rng = np.random.default_rng(0)
    drawn = ((n, rng.standard_normal(s.shape, dtype=np.float32)) for n, s in model.items())
    path = folder / "initial.safetensors"
    return lazy_record(TensorFile(path, write_safetensors(path, drawn, model)))


def _read_s(replies: list[Path]) -> float:
    """Return how long it takes to read so many replies once, from the page cache."""
    room, began = bytearray(PIECE), time.perf_counter()
    for reply in replies:
        with open(reply, "rb", buffering=0) as f:
            while f.readinto(room):
                pass
    return time.perf_counter() - began


def _copied(reply: Path) -> Cost:
    """Return what `cp` of a reply takes."""
    target, began = reply.with_name("copied"), time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(["cp", "--reflink=never", reply, target], check=True)
    took, now = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    target.unlink()
    return took, now.ru_utime + now.ru_stime - before.ru_utime - before.ru_stime


def client(folder: Path, node: int) -> dict[str, Any]:
    """Be the thin ClientApp: fetch weights, let the trainer work, send its weights."""
    ClientApp()
    content = RecordDict({k: ConfigRecord(record) for k, record in json.load(sys.stdin).items()})
    site = folder / f"site{node}"
    site.mkdir(exist_ok=True)
    exchange = SiteExchange(make_store(f"file://{folder}/store"), make_codec("full"))
    watch = stopwatch()
    received = exchange.receive(content, "arrays", site)
    fetched = watch()
    assert received is not None
    trained = site / "trained.safetensors"
    sha256, *job = run("trainer", str(received), str(trained), str(node))
    reply, watch = RecordDict(), stopwatch()
    exchange.send(reply, "arrays", trained, sha256, node)
    cost = added(fetched, watch(), *job)
    received.unlink()
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    sent = {k: dict(r) for k, r in reply.items()}
    return {**sent, "peak_mb": int(peak[1]) * 1024 / MB, "cost": cost}


def trainer(source: Path, target: Path, node: int) -> tuple[str, Cost, Cost]:
    """Stand for the job that trains; return the hash of what it wrote, and what it took.

    Changing the weights is its training and does not count; the model is there before.
    """
    file = TensorFile(source)
    weights = {name: np.ones(info.shape, np.float32) for name, info in file.layout.items()}
    watch = stopwatch()
    for name, array in weights.items():
        np.copyto(array, file.tensor(name))
    read = watch()
    for array in weights.values():
        array *= np.float32(0.9)
        array += np.float32(node / 1000)
    watch = stopwatch()
    return write_safetensors(target, weights.items(), file.layout), read, watch()


def run(role: str, *args: str, stdin: str = "") -> Any:
    """Run one role in a process of its own and return the JSON it prints last."""
    command = [sys.executable, __file__, "--role", role, *args]
    done = subprocess.run(command, input=stdin, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run everything and yield a row for each."""
    model = sum(s.nbytes for s in layout(options.hidden, options.layers).values()) / MB
    size = str(options.hidden), str(options.layers), str(options.memory_gb)
    for sites in options.sites:
        names = [*options.strategies, PLAIN] if sites <= options.plain else options.strategies
        for name in names:
            with tempfile.TemporaryDirectory(prefix="aggregation-") as folder:
                figures = run("server", folder, name, str(sites), *size)
            models = {f"{k}_models": figures[f"{k}_mb"] / model for k in ("anonymous", "mapped")}
            rounded = {k: round(v, 3) for k, v in (figures | models).items()}
            row = {"strategy": name, "sites": sites, "model_mb": round(model)}
            yield {**row, "memory_gb": options.memory_gb, **rounded}


def main() -> None:
    """Measure, print and record, in addition to what was recorded of others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--strategies", nargs="+", default=[*STRATEGIES], choices=STRATEGIES)
    parser.add_argument("--plain", type=int, default=4, help="inline up to so many sites")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--memory-gb", type=float, default=ExchangeConfig.memory_gb)
    parser.add_argument("--no-record", action="store_true")
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    match options.role:
        case None:
            rows = []
            for row in measure(options):
                print(row, flush=True)
                rows.append(row)
            if not options.no_record:
                _record(rows)
            broken = [r for r in rows if r["strategy"] != PLAIN and _is_too_much(r)]
            sys.exit(1 if broken else 0)
        case ["server", folder, strategy, sites, hidden, layers, memory_gb]:
            memory = ServerMemory.of(float(memory_gb))
            answer: Any = server(
                Path(folder), strategy, int(sites), int(hidden), int(layers), memory
            )
        case ["client", folder, node]:
            answer = client(Path(folder), int(node))
        case ["trainer", source, target, node]:
            answer = trainer(Path(source), Path(target), int(node))
    print(json.dumps(answer))


def _is_too_much(row: dict[str, Any]) -> bool:
    return row["anonymous_models"] > LIMIT or row["anonymous_mb"] > 1e3 * row["memory_gb"]


def _record(rows: list[dict[str, Any]]) -> None:
    path = Path(__file__).parents[1] / "results" / "server_memory.json"
    former = json.loads(path.read_text()).get("rows", []) if path.exists() else []
    what = itemgetter("strategy", "sites", "model_mb")
    kept = [row for row in former if what(row) not in map(what, rows)]
    record("server_memory", {"rows": [*kept, *rows]}, {"limit_models": LIMIT, "versions": 2})


if __name__ == "__main__":
    main()
