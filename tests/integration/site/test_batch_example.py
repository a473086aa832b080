"""The example of docs/batch.md in real Flower runs, where it is and inside batch jobs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from worlds.jobs import below, send, until
from worlds.network.ports import reserve_port
from worlds.runs.run import ROOT

from flwr_hpc.flower.commands import FLOWER_ENV
from flwr_hpc.server.bundle import connection

pytestmark = pytest.mark.slow

NODES = 2
RUN = "num-server-rounds=2 fraction-evaluate=0.0"
# Added to the example: a question that is answered by an exception.
CLIENT = """

@app.query("fail")
def fail(message: Message, context: Context) -> Message:
    raise LookupError("asked to")


@app.query("stay")
def stay(message: Message, context: Context) -> Message:
    import time

    while True:
        time.sleep(1)
"""
# Added in its turn: asks a question that is never answered.
ASK_TO_STAY = """

app = ServerApp()


@app.main()
def ask_to_stay(grid: Grid, context: Context) -> None:
    import time
    from flwr.app import Message, RecordDict

    while len(nodes := list(grid.get_node_ids())) < 2:  # they may come up after us
        time.sleep(0.2)
    questions = [Message(RecordDict(), n, "query.stay") for n in nodes]
    grid.send_and_receive(questions, timeout=36000)
"""
SERVER = """

train = main
app = ServerApp()


@app.main()
def train_and_ask(grid: Grid, context: Context) -> None:
    import json
    from flwr.app import Message, RecordDict

    train(grid, context)
    questions = [Message(RecordDict(), n, "query.fail") for n in grid.get_node_ids()]
    replies = grid.send_and_receive(questions, timeout=3600)
    errors = [r.error.reason for r in replies if r.has_error()]
    open("errors.json", "w").write(json.dumps(errors))
"""


class Flower:
    """SuperLink and SuperNodes in a folder, behind the gate as docs/batch.md has it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._reserved = folder, [reserve_port() for _ in range(1 + NODES)]
        self.port, *self.node_ports = (kept.getsockname()[1] for kept in self._reserved)
        self.bin = Path(sys.executable).parent
        own = {
            "FLWR_HOME": str(folder / "home"),
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        self.env = {**os.environ, **FLOWER_ENV, **own}
        self.processes: list[subprocess.Popen[bytes]] = []
        (folder / "home").mkdir()
        config = connection(f"127.0.0.1:{self.port}")
        (folder / "home" / "config.toml").write_text(config)

    def start(self, name: str, *arguments: str) -> None:
        with open(self.folder / f"{name}.log", "wb") as log:
            gate = [sys.executable, "-m", "flwr_hpc.gate"]
            command = [*gate, arguments[0], "--insecure", *arguments[1:]]
            self.processes.append(
                subprocess.Popen(command, stdout=log, stderr=log, env=self.env, cwd=self.folder)
            )

    def start_all(self) -> None:
        address = f"127.0.0.1:{self.port}"
        needs = "--disable-runtime-dependency-installation"
        self.start("superlink", "flower-superlink", f"--port={self.port}", needs)
        until(lambda: self._answers())
        for k in range(NODES):
            config = f"partition-id={k} flwr-hpc.cpus-per-rank=1 flwr-hpc.idle-timeout-s=3600"
            config += " flwr-hpc.run-check-s=2"
            port = f"--port={self.node_ports[k]}"
            node = f"--node-config={config}"
            self.start(f"node{k}", "flower-supernode", f"--superlink={address}", port, node)

    def run(self, facility: str) -> None:
        settings = f'{RUN} flwr-hpc.facility="{facility}"'
        command = [str(self.bin / "flwr"), "run", "app", "flwr-hpc", "-c", settings, "--stream"]
        done = subprocess.run(
            command, env=self.env, cwd=self.folder, capture_output=True, text=True, check=False
        )
        assert (self.folder / "errors.json").exists(), done.stdout + done.stderr
        for name in ("errors.json", "final_model.pt"):
            (self.folder / name).rename(self.folder / f"{facility}-{name}")

    def submit(self, facility: str) -> str:
        """Begin a run and return its id."""
        settings = f'{RUN} flwr-hpc.facility="{facility}"'
        begun = self.flwr("run", "app", "flwr-hpc", "-c", settings, "--format=json")
        return str(json.loads(begun)["run-id"])

    def flwr(self, *arguments: str) -> str:
        command = [str(self.bin / "flwr"), *arguments]
        return subprocess.check_output(command, env=self.env, cwd=self.folder, text=True)

    def jobs(self) -> list[psutil.Process]:
        """Return the processes of jobs of this folder."""
        found = psutil.process_iter(["environ", "status"])
        mine = str(self.folder / "flwr-hpc-batch")
        living = [p for p in found if p.info["status"] != psutil.STATUS_ZOMBIE]
        return [p for p in living if mine in (p.info["environ"] or {}).get("FLWR_HPC_JOB_DIR", "")]

    def result(self, facility: str) -> tuple[dict[str, torch.Tensor], list[str]]:
        errors = json.loads((self.folder / f"{facility}-errors.json").read_text())
        return torch.load(self.folder / f"{facility}-final_model.pt"), errors

    def stop(self) -> None:
        family: list[psutil.Process] = []
        for process in self.processes:
            family += [*below(psutil.Process(process.pid)), psutil.Process(process.pid)]
        send(signal.SIGKILL, family)
        send(signal.SIGKILL, self.jobs())
        for kept in self._reserved:
            kept.close()

    def _answers(self) -> bool:
        listening = psutil.Process(self.processes[0].pid).net_connections("tcp")
        return self.port in {c.laddr.port for c in listening}


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[Flower]:
    flower = Flower(tmp_path)
    shutil.copytree(ROOT / "examples" / "batch", tmp_path / "app")
    for name, more in (("client_app.py", CLIENT), ("server_app.py", SERVER)):
        path = tmp_path / "app" / "tiny_torch" / name
        path.write_text(path.read_text() + more)
    try:
        flower.start_all()
        yield flower
    finally:
        flower.stop()


def test_the_same_result_from_warm_jobs(flower: Flower) -> None:
    """Protects the promise: one line, the same numbers, state and errors, one job per node."""
    for facility in ("none", "local_a"):
        flower.run(facility)
    here, errors_here = flower.result("none")
    there, errors_there = flower.result("local_a")
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert errors_there == errors_here == NODES * ["<class 'LookupError'>:<'asked to'>"]
    sites = [s for s in flower.folder.glob("flwr-hpc-batch/*/*/*") if s.is_dir()]
    assert len(sites) == NODES
    for site in sites:
        assert [p.name for p in (site / "allocations").iterdir()] == ["a0000"]
        assert len(list(site.glob("orders/*/result.json"))) == 3
    log = flower.folder / "node0.log"  # another process's, that need not hurry
    until(lambda: "LookupError: asked to" in log.read_text(), flower.folder)


def test_a_stopped_run_ends_its_jobs(flower: Flower) -> None:
    """Protects the budget after `flwr stop`: jobs and ClientApps end, nodes are free again."""
    server = flower.folder / "app" / "tiny_torch" / "server_app.py"
    server.write_text(server.read_text() + ASK_TO_STAY)
    run_id = flower.submit("local_a")
    states = "flwr-hpc-batch/*/*/*/allocations/a0000/state.json"
    until(
        lambda: sum('"running"' in f.read_text() for f in flower.folder.glob(states)) == NODES,
        flower.folder,
    )
    flower.flwr("stop", run_id, "flwr-hpc")
    until(lambda: not flower.jobs(), flower.folder)
    logs = [flower.folder / f"node{k}.log" for k in range(NODES)]
    until(lambda: all("finished:stopped" in log.read_text() for log in logs), flower.folder)
