"""A server and its sites in one process: exchange grid, thin client, a trainer of one line."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from worlds.exchange.shards import encode_shards

from flwr_hpc.exchange.client import SiteExchange
from flwr_hpc.exchange.codec import make_codec, make_downlink
from flwr_hpc.exchange.compression.encoder import Encoder
from flwr_hpc.exchange.grid import ExchangeGrid
from flwr_hpc.exchange.records import RecordTensors
from flwr_hpc.exchange.shards.cuts import all_rows
from flwr_hpc.exchange.shards.manifest import WeightFiles
from flwr_hpc.exchange.store import PREFIX, make_store, node_folder
from flwr_hpc.exchange.tensorfile import TensorFile, save, sha256_of
from flwr_hpc.exchange.tensors import BadPayload

NODES = (11, 12, 13)


def initial():
    rng = np.random.default_rng(0)
    return ArrayRecord(
        {
            "w": Array(rng.standard_normal((4, 3), dtype=np.float32)),
            "b": Array(rng.standard_normal(5)),
            "steps": Array(np.asarray(1.0, dtype=np.float32)),
        }
    )


def trained(name, array, node):
    kind = array.dtype.type
    return np.asarray(array * kind(0.9) + kind(node / 7))


class InProcess(Grid):
    """Answers every message at once, by calling `site(message) -> content or error`."""

    def __init__(self, site, nodes=NODES):
        identity = Message.__init__.__globals__["TaskIdentity"]  # as Flower does at start
        identity.task_id, identity.run_id, identity.node_id = 1, 1, 1
        self.site, self.nodes = site, nodes
        self.pushed, self._replies, self._ids = [], {}, itertools.count()

    def set_run(self, run): ...

    @property
    def run(self):
        return "the run"

    def create_message(self, *args, **kwargs):
        return Message(*args, **kwargs)

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        return [self._push(m) for m in messages]

    def _push(self, message):
        message_id = f"{message.object_id}{next(self._ids)}"
        message.metadata.__dict__["_message_id"] = message_id
        self.pushed.append(message)
        self._replies[message_id] = Message(self.site(message), reply_to=message)
        return message_id

    def pull_messages(self, message_ids):
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))


class Site:
    """The thin ClientApp with a trainer of one line; `spoil` changes what it sends."""

    def __init__(self, exchange, folder, spoil=lambda node, path, content: path):
        self.exchange, self.folder, self.spoil = exchange, folder, spoil

    def __call__(self, message):
        node = message.metadata.dst_node_id
        metrics = MetricRecord({"num-examples": node, "loss": 0.5})
        content = RecordDict({"metrics": metrics})
        if message.metadata.message_type == "evaluate":
            return content
        work = self.folder / f"site{node}"
        work.mkdir(parents=True, exist_ok=True)
        start = self.exchange.receive(message.content, "arrays", work)
        file, path = TensorFile(start), work / "trained"
        result = {n: Array(trained(n, file.tensor(n), node)) for n in file.layout}
        save(RecordTensors(ArrayRecord(result)), path)
        path = self.spoil(node, path, content)
        try:
            path, sha256, _ = encode(Encoder(self.exchange.codec), path, start)
            self.exchange.send(content, "arrays", path, sha256, node)
        except BadPayload:  # this site sends it all the same
            ref = self.exchange.store.put(path, node_folder(node))
            content[f"{PREFIX}arrays"] = ref.to_record()
        return content


def encode(encoder, path, start):
    """Be the job: encode files, a rank each; return what names it, its sha256 and metrics."""
    begun = encoder.start("", start)
    if encoder.is_plain(begun):
        return path, sha256_of(path), {}
    files = WeightFiles.open(path)
    cuts = [all_rows(files.whole.layout) if cut is None else cut for _, cut in files.parts]
    return encode_shards(encoder, path.with_name("trained.safetensors"), files.whole, cuts, begun)


def plain_site(message):
    """An ordinary Flower ClientApp, without the exchange."""
    node = message.metadata.dst_node_id
    content = RecordDict({"metrics": MetricRecord({"num-examples": node, "loss": 0.5})})
    if message.metadata.message_type == "train":
        arrays = message.content["arrays"]
        content["arrays"] = ArrayRecord(
            {n: Array(np.asarray(trained(n, a.numpy(), node))) for n, a in arrays.items()}
        )
    return content


class Federation:
    """An exchange grid over simulated sites."""

    def __init__(
        self, folder: Path, inline_below_mb=0.0, codec="full", downlink="full", store=None,
        grid=None, **site,
    ):  # fmt: skip
        self.store, codec = make_store(store or str(folder / "store")), make_codec(codec)
        downlink = make_downlink(downlink, codec)
        exchange = SiteExchange(self.store, codec, inline_below_mb, downlink=downlink)
        self.site = Site(exchange, folder / "sites", **site)
        self.inner = InProcess(self.site)
        self.events = []
        self.folder = folder
        self.grid = ExchangeGrid(
            self.inner,
            self.store,
            codec,
            folder / "server",
            downlink=downlink,
            inline_below_mb=inline_below_mb,
            emit=self._note,
            **grid or {},
        )

    def _note(self, event, **fields):
        if event != "weights_sent":  # which every message has
            self.events.append((event, fields))

    def files(self, part):
        gc.collect()
        return [p for p in (self.folder / part).rglob("*") if p.is_file()]

    def run(self, rounds=3, strategy=FedAvg, **options):
        return strategy(**options).start(self.grid, initial(), rounds)

    def train(self, *nodes, arrays=None):
        record = RecordDict({"arrays": arrays or initial(), "config": ConfigRecord({"lr": 0.1})})
        ids = self.grid.push_messages([Message(record, n, "train") for n in nodes])
        return list(self.grid.pull_messages(ids))


def values(record):
    return {name: array.numpy() for name, array in record.items()}


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
