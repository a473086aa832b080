"""The exchange over HTTP when either end is killed -9 in the middle."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from worlds.exchange.server import server_process, write_credential
from worlds.network.ports import reserve_port
from worlds.network.tcp_proxy import TcpProxy

from flwr_hpc.exchange.resumable import download
from flwr_hpc.exchange.stores.file import FileStore
from flwr_hpc.exchange.stores.http import HttpStore

MB = 1 << 20
SITE = """
import sys
from pathlib import Path
from flwr_hpc.exchange.store import Reference
from flwr_hpc.exchange.stores.http import HttpStore
url, credential, way, payload, key, target = sys.argv[1:]
store = HttpStore(url, Path(credential))
if way == "up":
    store.put(Path(payload), "node-7")
else:
    folder, sha256 = key.removesuffix(".payload").split("/")
    store.get(Reference.of(folder, sha256, Path(payload).stat().st_size), Path(target))
"""


@pytest.fixture
def payload(tmp_path):
    path = tmp_path / "payload"
    path.write_bytes(random.Random(0).randbytes(40 * MB))
    return path


@pytest.fixture
def line():
    with reserve_port() as kept:
        line = TcpProxy(kept.getsockname()[1])
        yield line
        line.close()


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_killed_server_is_waited_for_and_goes_on(tmp_path, line, payload, way):
    """What a site has sent or fetched by then is not sent again, but for a chunk a stream."""
    folder, target = tmp_path / "server", tmp_path / "site" / "target"
    ref = FileStore(str(folder / "store")).put(payload, "global")
    credential = write_credential(tmp_path / "credential")
    store = HttpStore(f"http://127.0.0.1:{line.port}", credential)
    work = {"up": lambda: store.put(payload, "node-7"), "down": lambda: store.get(ref, target)}
    moving = threading.Thread(target=work[way])
    line.freeze_after(25 * MB)
    with server_process(folder, line.server):
        moving.start()
        line.frozen.wait()
    line.thaw()
    with server_process(folder, line.server):
        moving.join()
    moved = folder / "store" / "node-7" / f"{ref.sha256}.payload" if way == "up" else target
    assert moved.read_bytes() == payload.read_bytes()
    assert getattr(line, way) < ref.bytes + download.STREAMS * download.CHUNK


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_killed_site_goes_on_in_a_later_process(tmp_path, line, payload, way):
    """With what lies at the server, or in its own folder."""
    folder, target = tmp_path / "server", tmp_path / "site" / "target"
    ref = FileStore(str(folder / "store")).put(payload, "global")
    credential = write_credential(tmp_path / "credential")
    url = f"http://127.0.0.1:{line.port}"
    command = [sys.executable, "-c", SITE, url, str(credential), way, str(payload), ref.key]
    with server_process(folder, line.server):
        line.freeze_after(25 * MB)
        with subprocess.Popen([*command, str(target)], cwd=Path(__file__).parents[3]) as site:
            line.frozen.wait()
            site.kill()
        line.thaw()
        subprocess.run([*command, str(target)], cwd=Path(__file__).parents[3], check=True)
    moved = folder / "store" / "node-7" / f"{ref.sha256}.payload" if way == "up" else target
    assert moved.read_bytes() == payload.read_bytes()
    assert getattr(line, way) < ref.bytes + download.STREAMS * download.CHUNK
    assert [p.name for p in moved.parent.iterdir()] == [moved.name]
