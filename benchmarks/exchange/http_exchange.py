"""A file through the exchange's port on loopback against `scp` of the same file, in turns.

Wall and CPU seconds of both ends, both ways; then the server's memory while several sites send, and
then fetch, a file each at once. Both sides encrypt; ours also hashes on arrival, and syncs.

    python benchmarks/exchange/http_exchange.py
    python benchmarks/exchange/http_exchange.py --mb 200 --sites 2 --no-record

Limits: 1.3 times scp's wall seconds, 100 MB above the idle server. Needs OpenSSH's server; without,
`cp` stands in for scp and nothing is limited. Writes ``benchmarks/results/http_exchange.json``.
"""

from __future__ import annotations

import argparse
import getpass
import hashlib
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import uvicorn

from flwr_hpc.exchange.http_server import exchange_app
from flwr_hpc.exchange.store import Reference
from flwr_hpc.exchange.stores.https import HttpsStore

sys.path.append(str(Path(__file__).parents[1]))
from _machine import record

MB = 1e6
RATIO_LIMIT, MEMORY_LIMIT_MB = 1.3, 100
SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
Cost = dict[str, float]


def main() -> int:
    """Measure, print and record; 1 if a limit is broken."""
    options = _options()
    if options.serve:
        return _serve(Path(options.serve), options.port)
    if options.move:
        return _move(json.loads(options.move))
    with tempfile.TemporaryDirectory(prefix="exchange-") as name:
        folder = Path(name)
        figures = _compare(folder, int(options.mb * MB), options.repeats)
        figures |= _memory(folder, int(options.mb * MB), options.sites)
    print(json.dumps(figures, indent=2))
    if not options.no_record:
        settings = {"mb": options.mb, "sites": options.sites, "repeats": options.repeats}
        record("http_exchange", figures, settings)
    worst = max(figures["wall_ratio"].values())
    fast = worst <= RATIO_LIMIT or figures["against"] != "scp"
    return 0 if fast and max(figures["server_mb_above_idle"].values()) < MEMORY_LIMIT_MB else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=float, default=1000)
    parser.add_argument("--sites", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-record", action="store_true")
    for own in ("--serve", "--move"):  # this script's own processes
        parser.add_argument(own, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


# --- speed --------------------------------------------------------------------------------


def _compare(folder: Path, size: int, repeats: int) -> dict[str, Any]:
    payload = folder / "payload"
    digest = _write(payload, size, seed=0)
    against = "scp" if Path(SSHD).exists() and shutil.which("scp") else "cp"
    ours: dict[str, list[Cost]] = {"up": [], "down": []}
    theirs: dict[str, list[Cost]] = {"up": [], "down": []}
    for _ in range(repeats):  # in turns: the machine's other load meets both
        with _server(folder) as server:
            for way in ("up", "down"):
                ours[way].append(_exchange(server, folder, payload, digest, way))
        for way in ("up", "down"):
            move = _scp if against == "scp" else _cp
            theirs[way].append(move(folder, payload, way))
    figures: dict[str, Any] = {"against": against, "bytes": size}
    for what in ("wall_s", "cpu_s"):
        sides = {"exchange": ours, against: theirs}
        figures[what] = {
            side: {way: round(median(c[what] for c in costs), 2) for way, costs in ways.items()}
            for side, ways in sides.items()
        }
        figures[what.replace("_s", "_ratio")] = {
            way: round(figures[what]["exchange"][way] / figures[what][against][way], 2)
            for way in ("up", "down")
        }
    return figures


def _exchange(server: Server, folder: Path, payload: Path, digest: str, way: str) -> Cost:
    before = sum(server.process.cpu_times()[:2])
    with _mover(server, folder, payload, digest, way) as mover:
        cost: Cost = json.loads(mover.communicate()[0])
    cost["cpu_s"] += sum(server.process.cpu_times()[:2]) - before
    return cost


def _cp(folder: Path, payload: Path, way: str) -> Cost:
    return _cost(["cp", str(payload), str(folder / f"copied-{way}")])


def _scp(folder: Path, payload: Path, way: str) -> Cost:
    """Copy through a throw-away sshd, which takes this user's throw-away key alone."""
    for key in ("host", "user"):
        if not (folder / key).exists():
            make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
            subprocess.run(make, check=True)
    port = _free_port()
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    settings = {
        "ListenAddress": "127.0.0.1",
        "Port": port,
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "user.pub",
        "StrictModes": "no",
        "UsePAM": "no",
        "PidFile": "none",
        "Subsystem": "sftp internal-sftp",
        "PermitRootLogin": "yes",
    }
    (folder / "sshd").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
    with subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "sshd")], stderr=-3) as sshd:
        _wait_for(port)
        host = f"{getpass.getuser()}@127.0.0.1"
        there, here = f"{host}:{folder}/copied-{way}", str(payload)
        ends = [here, there] if way == "up" else [f"{host}:{here}", f"{folder}/copied-{way}"]
        command = ["scp", "-q", "-P", str(port), "-i", str(folder / "user")]
        command += [
            "-F",
            "none",
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
        ]
        try:
            return _cost([*command, *ends], lambda: (sshd.terminate(), sshd.wait()))
        finally:
            sshd.terminate()


def _cost(command: list[str], end: Any = lambda: None) -> Cost:
    """Return what a command took, with the processes that `end` waits for."""
    usage, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, check=True)
    wall = time.monotonic() - began
    end()
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall_s": wall, "cpu_s": now.ru_utime + now.ru_stime - usage.ru_utime - usage.ru_stime}


# --- memory -------------------------------------------------------------------------------


def _memory(folder: Path, size: int, sites: int) -> dict[str, Any]:
    """Return how far the server's memory rises while sites move a file each at once."""
    digests = [_write(folder / f"payload{i}", size, seed=i + 1) for i in range(sites)]
    figures: dict[str, Any] = {"sites": sites, "server_mb_above_idle": {}}
    with _server(folder) as server:
        figures["server_idle_mb"] = round(server.process.memory_info().rss / MB)
        for way in ("up", "down"):
            idle = server.process.memory_info().rss / MB
            Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")  # the peak begins anew
            movers = [
                _mover(server, folder, folder / f"payload{i}", digest, way, f"{i}")
                for i, digest in enumerate(digests)
            ]
            for mover in movers:
                with mover:
                    mover.communicate()
            figures["server_mb_above_idle"][way] = round(_peak_mb(server.process.pid) - idle, 1)
    return figures


def _peak_mb(pid: int) -> float:
    high = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert high
    return int(high[1]) * 1024 / MB


# --- processes ----------------------------------------------------------------------------


class Server:
    """The exchange's server, in a process of its own."""

    def __init__(self, pid: int, port: int) -> None:
        self.process, self.url = psutil.Process(pid), f"https://127.0.0.1:{port}"


@contextmanager
def _server(folder: Path) -> Iterator[Server]:
    if not (folder / "certificate.pem").exists():
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"]
        command += ["ec_paramgen_curve:prime256v1", "-nodes", "-days", "1", "-subj", "/CN=bench"]
        command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(folder / "key.pem")]
        command += ["-out", str(folder / "certificate.pem")]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    port, root = _free_port(), folder / "server"
    command = [sys.executable, __file__, "--serve", str(folder), "--port", str(port)]
    with subprocess.Popen(command) as process:
        try:
            _wait_for(port)
            yield Server(process.pid, port)
        finally:
            process.terminate()
    shutil.rmtree(root)


def _serve(folder: Path, port: int) -> int:
    root = folder / "server"
    root.mkdir()
    uvicorn.run(
        exchange_app(root, lambda token: token),
        host="127.0.0.1",
        port=port,
        http="h11",  # the gate's
        log_level="error",
        ssl_keyfile=folder / "key.pem",
        ssl_certfile=folder / "certificate.pem",
    )
    return 0


def _mover(
    server: Server, folder: Path, payload: Path, digest: str, way: str, site: str = ""
) -> subprocess.Popen[str]:
    """Start a site that moves a file, and prints what that took without its start-up."""
    credential = folder / f"credential{site}"
    if not credential.exists():
        credential.touch(0o600)
        certificate = (folder / "certificate.pem").read_text()
        token = f"node-{site or 0}"
        credential.write_text(json.dumps({"token": token, "certificate": certificate}))
    what = {"url": server.url, "credential": str(credential), "payload": str(payload)}
    what |= {"digest": digest, "way": way, "folder": f"node-{site or 0}"}
    command = [sys.executable, __file__, "--move", json.dumps(what)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _move(what: dict[str, str]) -> int:
    store, payload = HttpsStore(what["url"], Path(what["credential"])), Path(what["payload"])
    ref = Reference.of(what["folder"], what["digest"], payload.stat().st_size)
    target = payload.with_name(f"{payload.name}-{what['folder']}")
    began, cpu = time.monotonic(), time.process_time()
    if what["way"] == "up":
        store.put(payload, what["folder"], what["digest"])
    else:
        store.get(ref, target)
    wall, cpu = time.monotonic() - began, time.process_time() - cpu
    target.unlink(missing_ok=True)
    print(json.dumps({"wall_s": wall, "cpu_s": cpu}))
    return 0


def _write(path: Path, size: int, seed: int) -> str:
    """Write a file that does not compress; return its sha256."""
    digest, block = hashlib.sha256(), os.urandom(1 << 20)
    with open(path, "wb") as file:
        while size:
            piece = (seed.to_bytes(8, "little") + block)[: min(size, len(block))]
            file.write(piece)
            digest.update(piece)
            size -= len(piece)
    return digest.hexdigest()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _wait_for(port: int) -> None:
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
