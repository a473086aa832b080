"""A reply in shards over HTTP: what a cut costs, and what can never fit."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from worlds.exchange.server import ExchangeServer, write_credential
from worlds.exchange.shards import even_cuts, write_shards
from worlds.network.tcp_proxy import TcpProxy

from flwr_hpc.clock import SystemClock
from flwr_hpc.exchange.client import SiteExchange
from flwr_hpc.exchange.codec import make_codec
from flwr_hpc.exchange.expected import Expected
from flwr_hpc.exchange.http_server import Limits
from flwr_hpc.exchange.receiver import Receiver
from flwr_hpc.exchange.records import RecordTensors
from flwr_hpc.exchange.stores.file import FileStore
from flwr_hpc.exchange.stores.http import HttpStore
from flwr_hpc.exchange.transfer import Transfer
from flwr_hpc.files import is_disk_trouble
from flwr_hpc.protocol import ARRAYS

MB = 1 << 20
OVERHEAD = 256 << 10  # bytes of headers that a test's requests may take
SHARDS = 8  # of 5 MB


class Impatient(SystemClock):
    """The real clock, but for the pauses between attempts."""

    def sleep(self, seconds):
        super().sleep(min(seconds, 0.02))


class Site:
    """Sends 40 MB in shards."""

    def __init__(self, folder, port, **options):
        credential = write_credential(folder / "credential")
        self.store = HttpStore(f"http://127.0.0.1:{port}", credential, clock=Impatient(), **options)
        values = np.random.default_rng(0).standard_normal((SHARDS, 5 * MB // 4), np.float32)
        self.whole = RecordTensors(ArrayRecord({"w": Array(values)}))
        cuts = even_cuts(self.whole.layout, SHARDS)
        self.shards = write_shards(folder / "weights.safetensors", self.whole, cuts)

    def send(self):
        content = RecordDict()
        exchange = SiteExchange(self.store, make_codec("full"), 0.0)
        exchange.send(content, ARRAYS, *self.shards, node_id=7)
        return content


def take(server, content, site, folder):
    """Return what the server makes of a reply."""
    store = FileStore(str(server.root))
    receiver = Receiver(store, make_codec("full"), folder, lambda name: site.whole, 1 << 26)
    expected = Expected(7, {ARRAYS: site.whole.layout})
    return receiver.take(content, expected, Transfer())[ARRAYS]["w"].numpy()


@pytest.fixture
def server(tmp_path):
    with ExchangeServer(tmp_path / "server", tls=False) as server:
        yield server


@pytest.fixture
def line(server):
    line = TcpProxy(server.port)
    yield line
    line.close()


def test_of_shards_that_are_cut_each_goes_on(tmp_path, server, line):
    """What is sent again stays below a few pieces of each shard that was under way."""
    site = Site(tmp_path, line.port)
    line.cut_after(9 * MB, 11 * MB)
    content = site.send()
    np.testing.assert_array_equal(take(server, content, site, tmp_path), site.whole.raw("w"))
    assert line.up < (SHARDS * 5 + 2 * 4 * 2) * MB + OVERHEAD


def test_whole_shards_are_not_sent_again(tmp_path, server, line):
    """By a later process, after a cut that ended the first."""
    line.cut_after(22 * MB)
    with pytest.raises(TimeoutError, match="nothing moved"):
        Site(tmp_path, line.port, stall_s=0.0).send()
    assert list(server.root.glob("node-7/*.payload"))
    line.up = 0
    site = Site(tmp_path, line.port)
    content = site.send()
    assert line.up < (18 + 4 * 3) * MB
    np.testing.assert_array_equal(take(server, content, site, tmp_path), site.whole.raw("w"))


def test_shards_that_can_never_fit_together_are_no_full_disk(tmp_path):
    """Each would, and the site would wait for ever for room that its own shards take."""
    limits = Limits(quota_bytes=22 * MB)
    with ExchangeServer(tmp_path / "server", tls=False, limits=limits) as small:
        line = TcpProxy(small.port)
        with pytest.raises(OSError, match=f"above the quota of {22 * MB}") as caught:
            Site(tmp_path, line.port).send()
        line.close()
    assert not is_disk_trouble(caught.value)
    assert line.up < OVERHEAD
    assert not [path for path in small.root.rglob("*") if path.is_file()]
