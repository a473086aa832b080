"""The exchange's server with TLS on loopback, in a thread or as a process that can be killed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import uvicorn

from flwr_hpc.exchange.http_server import Limits, exchange_app
from flwr_hpc.gate.certificate import new_certificate

SITES = {"token-7": "node-7", "token-8": "node-8"}


@cache
def key_and_certificate() -> tuple[str, str]:
    """Return a throw-away key and the certificate of 127.0.0.1 that it signs, as PEM."""
    certificate, key = new_certificate("127.0.0.1")
    return key, certificate


def write_credential(path: Path, token: str = "token-7", certificate: str | None = None) -> Path:
    """Write what a site is given with its invitation."""
    certificate = certificate or key_and_certificate()[1]
    path.touch(mode=0o600)
    path.write_text(json.dumps({"token": token, "certificate": certificate}))
    return path


class ExchangeServer:
    """A real uvicorn; `url` is where it listens.

    Parameters
    ----------
    folder : Path
        Of this server: its store is ``folder / "store"``.
    tls : bool
    authorize : callable or None
    limits : Limits or None
    """

    def __init__(self, folder, tls=True, authorize=None, limits=None, clock=None):
        self.root = folder / "store"
        self.root.mkdir(parents=True, exist_ok=True)
        self.moves = []  # as reported
        report = self.moves.append
        self._app = exchange_app(self.root, authorize or SITES.get, limits, clock, report)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http{'s' * tls}://127.0.0.1:{self.port}"
        self._server = uvicorn.Server(config(self._app, folder, tls))
        self._thread = threading.Thread(target=self._server.run, args=([self.listener],))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()


def config(app, folder: Path, tls: bool) -> uvicorn.Config:
    quiet = {"log_level": "warning", "access_log": False, "lifespan": "off"}
    options = {
        **quiet,
        "http": "h11",
        "h11_max_incomplete_event_size": 16 << 10,
    }  # as the gate does
    if tls:
        for name, text in zip(("key", "certificate"), key_and_certificate(), strict=True):
            (folder / name).write_text(text)
        options |= {"ssl_keyfile": folder / "key", "ssl_certfile": folder / "certificate"}
    return uvicorn.Config(app, **options)


@contextmanager
def server_process(
    folder: Path, port: int, limits: Limits | None = None
) -> Iterator[subprocess.Popen]:
    """Run one, without TLS, on a port; killed with -9 at the end, or before."""
    (folder / "store").mkdir(parents=True, exist_ok=True)
    fields = json.dumps(asdict(limits or Limits()))
    command = [sys.executable, __file__, str(folder), str(port), fields]
    root = Path(__file__).parents[3]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": f"{root}:{root}/tests"}) as run:
        try:
            while run.poll() is None and not _listens(port):
                time.sleep(0.1)
            yield run
        finally:
            run.kill()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def main(folder: str, port: str, fields: str) -> None:
    limits = replace(Limits(), **json.loads(fields))
    app = exchange_app(Path(folder) / "store", SITES.get, limits)
    server = uvicorn.Server(config(app, Path(folder), tls=False))
    server.run([socket.create_server(("127.0.0.1", int(port)))])


if __name__ == "__main__":
    main(*sys.argv[1:])
