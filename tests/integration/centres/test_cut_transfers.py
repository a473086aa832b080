"""Transfers to and from an S3 and an SFTP server that are cut, and what is sent again."""

from __future__ import annotations

import random
import subprocess
import sys
import uuid

import pytest
from worlds.network import s3_server, sftp_server
from worlds.network.tcp_proxy import TcpProxy

from flwr_hpc.exchange.resumable import download, s3, sftp
from flwr_hpc.exchange.store import Reference, make_store
from flwr_hpc.exchange.stores import fsspec as fsspec_store

MB = 1 << 20
SIZE = 64 * MB
FOLDER = "node-7"
# What a cut may cost: what is under way, and what lies in the kernels' and sshd's buffers.
AT_ONCE = {
    ("s3", "up"): s3.STREAMS * s3.LEAST,
    ("s3", "down"): download.STREAMS * fsspec_store.PIECE,
    ("sftp", "up"): sftp.PIECE,
    ("sftp", "down"): download.STREAMS * fsspec_store.PIECE,
}
OVERHEAD = 4 * MB
MOVE = """
import sys
from pathlib import Path
from flwr_hpc.exchange.store import Reference, make_store
way, url, payload, target, sha256 = sys.argv[1:]
store = make_store(url)
if way == "up":
    store.put(Path(payload), "node-7", sha256)
else:
    store.get(Reference.of("node-7", sha256, Path(payload).stat().st_size), Path(target))
"""
WAYS = ["up", "down"]

s3_at = pytest.fixture(scope="module")(s3_server.serve)
sftp_at = pytest.fixture(scope="module")(sftp_server.serve)


class Far:
    """A store behind a line that can be cut, and the same without."""

    def __init__(self, scheme, url, line):
        self.scheme, self.url, self.line = scheme, url, line

    def may_move(self, count, way, cuts=1):
        """Return how many bytes may pass where `count` are missing."""
        return count + cuts * AT_ONCE[self.scheme, way] + OVERHEAD


@pytest.fixture(params=["s3", "sftp"])
def far(request, tmp_path, monkeypatch):
    if reason := {"s3": s3_server, "sftp": sftp_server}[request.param].MISSING:
        pytest.skip(reason)
    server = request.getfixturevalue(f"{request.param}_at")
    if request.param == "s3":
        line = TcpProxy(int(server.url.rpartition(":")[2]))
        url = f"s3://bucket/{uuid.uuid4().hex}"
        files = s3_server.aws_files(tmp_path / "aws", f"http://127.0.0.1:{line.port}")
        for name, value in files.items():
            monkeypatch.setenv(name, value)
    else:
        line, url = TcpProxy(server.port), f"sftp://far{tmp_path}/store"
        known = (server.folder / "known_hosts").read_text()
        (tmp_path / ".ssh").mkdir()
        (tmp_path / ".ssh" / "known").write_text(known.replace(str(server.port), str(line.port)))
        (tmp_path / ".ssh" / "config").write_text(
            server.config.read_text()
            .replace(f"Port {server.port}", f"Port {line.port}")
            .replace(f"{server.folder}/known_hosts", f"{tmp_path}/.ssh/known")
        )
        monkeypatch.setenv("HOME", str(tmp_path))
    fsspec_store.connect(url)[0].clear_instance_cache()  # it may have another line
    yield Far(request.param, url, line)
    fsspec_store.connect(url)[0].clear_instance_cache()
    line.close()


@pytest.fixture
def payload(tmp_path):
    path = tmp_path / "payload"
    path.write_bytes(random.Random(0).randbytes(SIZE))
    return path


@pytest.mark.parametrize("way", WAYS)
def test_a_transfer_that_is_killed_goes_on_in_a_later_process(tmp_path, far, payload, way):
    """Hours may lie between them: what is there is in files, or in parts that the store keeps."""
    store, target = make_store(far.url), tmp_path / "site" / "target"
    sha256 = store.put(payload, FOLDER).sha256
    ref = Reference.of(FOLDER, sha256, SIZE)
    if way == "up":
        store.delete(ref)
    far.line.freeze_after(50 * MB)
    args = [way, far.url, str(payload), str(target), sha256]
    with subprocess.Popen([sys.executable, "-c", MOVE, *args]) as process:
        far.line.frozen.wait()
        process.kill()
    far.line.cut()
    far.line.thaw()
    far.line.mend()
    far.line.up = far.line.down = 0
    if way == "up":
        assert store.size(ref) is None
        store.put(payload, FOLDER, sha256)
    else:
        assert not target.exists()
        store.get(ref, target)
    moved = getattr(far.line, way)
    assert moved < far.may_move(SIZE - 50 * MB, way) < SIZE
    if way == "up":
        store.get(ref, target)
    assert target.read_bytes() == payload.read_bytes()
    assert [p.name for p in target.parent.iterdir()] == ["target"]
    fs, root = fsspec_store.connect(far.url)
    assert [path.rpartition("/")[2] for path in fs.find(root)] == [f"{sha256}.payload"]


@pytest.mark.parametrize("way", WAYS)
def test_a_line_that_is_cut_again_and_again_costs_a_piece_each_time(tmp_path, far, payload, way):
    """A flapping line moves what it can, and no transfer is given up that gets further."""
    store, target = make_store(far.url), tmp_path / "site" / "target"
    cuts = (20 * MB, 15 * MB, 15 * MB)
    if way == "down":
        ref = store.put(payload, FOLDER)
        far.line.up = far.line.down = 0
    far.line.cut_after(*cuts)
    if way == "up":
        ref = store.put(payload, FOLDER)
    else:
        store.get(ref, target)
    assert getattr(far.line, way) < far.may_move(SIZE, way, len(cuts))
    if way == "up":
        store.get(ref, target)
    assert target.read_bytes() == payload.read_bytes()
