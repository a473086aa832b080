"""Another user of the login node, while a run goes on: he reaches, reads and changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file
from worlds.hosts.stranger import AS_NOBODY, NOBODY, needs_another_user, open_to_others
from worlds.jobs import command_line, connections
from worlds.runs.run import Run

from flwr_hpc.server.bundle import PYPROJECT
from flwr_hpc.server.bundle import connection as flower_connection

pytestmark = [pytest.mark.slow, needs_another_user]

METHODS = ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD")
MORE_PATHS = (
    "/", "/docs", "/openapi.json", "/health", "/v1", "/v1/fleet/", "/v1/control/../fleet/x",
    "//v1/control/StartRun", "/v1/control/StartRun?x=1", "/%76%31/control/x", "/no/such/path",
)  # fmt: skip
# Reads "port method path" by line; each on a connection of its own, in the name of a local proxy.
ASK = """
import http.client, sys
for line in sys.stdin:
    port, method, path = line.split()
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
    connection.request(method, path, body=b"x" * 2000, headers={
        "Content-Type": "application/protobuf", "X-Forwarded-For": "127.0.0.1",
        "X-Real-IP": "127.0.0.1", "Upgrade": "websocket", "Connection": "Upgrade",
    })
    print(connection.getresponse().status, method, path)
    connection.close()
"""
APP = """
from pathlib import Path
from typing import Any
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    Path("{mark}").touch()


@app.lifespan()
def start(context):
    Path("{mark}").touch()
    yield
"""


@dataclass
class Visit:
    """What a stranger met in the middle of a run."""

    run: Run
    served: list[str] = field(default_factory=list)  # "program path" of all that we are served
    answers: list[str] = field(default_factory=list)
    flwr_run: str = ""  # What it printed
    flwr_run_code: int = 0
    ran: bool = True  # Whether the stranger's app did
    ungated: list[str] = field(default_factory=list)  # What else listened, and where
    addresses: set[str] = field(default_factory=set)
    went_on: bool = False  # The run, when the stranger had left


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Visit:
    base = tmp_path_factory.mktemp("strangers")
    before = os.umask(0o022)  # as most users have it
    try:
        run = Run(
            base / "run", "exchange.inline_below_mb=0", f"facilities.local_b.workdir={base}/shared"
        )
    finally:
        os.umask(before)
    seen = Visit(run)
    run.until_training()
    gates = _look_around(seen)
    asked = [(port, *route) for port, name in gates.items() for route in _routes(port, name, seen)]
    lines = "\n".join(f"{port} {method} {path}" for port, method, path in asked)
    seen.answers = _as_nobody([sys.executable, "-c", ASK], lines).stdout.splitlines()
    assert len(seen.answers) == len(asked)
    _submit(seen, next(port for port, name in gates.items() if "superlink" in name))
    seen.went_on = run.process.poll() is None
    assert run.end() == 0, run.said()
    return seen


def _look_around(seen: Visit) -> dict[int, str]:
    """Return the ports of Flower's servers by port; note what else listens."""
    gates = {}
    family = psutil.Process(seen.run.process.pid).children(recursive=True)
    for process in [*family, *seen.run.ranks("local_a")]:
        line = command_line(process)  # first: a fork has its parent's line, and its sockets
        for connection in connections(process):
            if connection.status != psutil.CONN_LISTEN:
                continue
            seen.addresses.add(connection.laddr.ip)
            if "-m flwr_hpc.gate" in line:
                gates[connection.laddr.port] = line.split("flower-")[1].split()[0]
            elif "submitit" not in line:  # a rank's listeners: see test_rendezvous
                seen.ungated.append(line)
    return gates


def _routes(port: int, name: str, seen: Visit) -> list[tuple[str, str]]:
    """Return every method and path of a server, and some that it has not."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/openapi.json", timeout=60) as answer:
        paths = json.load(answer)["paths"]
    seen.served += [f"{name} {path}" for path in paths]
    known = [(method.upper(), path) for path, methods in paths.items() for method in methods]
    return [*known, *(("POST", path) for path in MORE_PATHS), *((m, "/health") for m in METHODS)]


def _as_nobody(
    command: list[str], text: str = "", env: dict[str, str] | None = None, cwd: str = "/"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*AS_NOBODY, *command], input=text, capture_output=True, text=True, cwd=cwd,
        env={**os.environ, **(env or {})}, timeout=600,
    )  # fmt: skip


def _submit(seen: Visit, port: int) -> None:
    """Let the stranger hand in an app of his own."""
    home = Path(tempfile.mkdtemp(prefix="stranger-"))
    mark = home / "ran"
    (home / "app").mkdir()
    (home / "app" / "stranger.py").write_text(APP.format(mark=mark))
    toml = PYPROJECT.replace("flwr_hpc.server.server_app", "stranger")
    (home / "app" / "pyproject.toml").write_text(toml)
    (home / "config.toml").write_text(flower_connection(f"127.0.0.1:{port}"))
    for path in (home, *home.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    settings = {
        "FLWR_HOME": str(home), "HOME": str(home), "TMPDIR": str(home),
        "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
    }  # fmt: skip
    flwr = str(Path(sys.executable).with_name("flwr"))
    done = _as_nobody([flwr, "run", str(home / "app"), "flwr-hpc"], env=settings, cwd=str(home))
    seen.flwr_run, seen.flwr_run_code = done.stdout + done.stderr, done.returncode
    seen.ran = mark.exists()
    shutil.rmtree(home, ignore_errors=True)  # what he started may write there still


def test_every_path_of_both_programs_is_refused(visit: Visit) -> None:
    """Protects the owner from whoever reaches a port: Control, Fleet and Runtime alike."""
    paths = [line.split()[1] for line in visit.served]
    for part in ("/v1/control/", "/v1/fleet/", "/v1/runtime/"):
        assert any(path.startswith(part) for path in paths), paths
    for program in ("superlink", "supernode"):
        assert any(line.startswith(program) for line in visit.served)
    assert [a for a in visit.answers if not a.startswith("403 ")] == []


def test_flwr_run_of_another_user_runs_nothing(visit: Visit) -> None:
    """Protects the owner's account: this executed the stranger's code in it before."""
    assert visit.flwr_run_code != 0
    assert "403" in visit.flwr_run or "another user" in visit.flwr_run, visit.flwr_run
    assert not visit.ran


def test_nothing_else_listens(visit: Visit) -> None:
    """Protects against a door beside the gate: a program that Flower starts, or another host's."""
    assert visit.ungated == []
    assert visit.addresses == {"127.0.0.1"}


def test_the_run_is_what_it_would_have_been(visit: Visit, undisturbed: Run) -> None:
    """Protects the run from the stranger's visit, and from the gate itself."""
    assert visit.went_on
    ours = load_file(visit.run.dir / "model" / "model.safetensors")
    theirs = load_file(undisturbed.dir / "model" / "model.safetensors")
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor, rtol=1e-4, atol=1e-5, err_msg=name)
    assert visit.run.left_behind() == []


def test_every_file_of_a_run_is_its_owners_alone(visit: Visit) -> None:
    """Protects weights, data and secrets: in the run directory, and where a site's folder lies
    on a path that others share; also what jobs wrote."""
    base = visit.run.dir.parent
    sites = [
        visit.run.dir / "facilities" / "local_a",
        *(base / "shared/flwr-hpc").glob("*/local_b"),
    ]
    for site in sites:
        assert list(site.glob("allocations/*/job/*_log.err")), "no job wrote there"
        assert list(site.glob("orders/*/result.json"))
    assert open_to_others(visit.run.dir, base / "shared" / "flwr-hpc") == {}
