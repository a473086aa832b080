"""The batch mod on every batch system, faked at the process boundary."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from worlds.jobs import facility, until
from worlds.site.batch_app import Node, make_app

from flwr_hpc.batch_mod.mod import BatchError

SOURCE = """
import numpy as np
np.random.seed(42)
CALLS = []
app = ClientApp(mods=[flwr_hpc.batch("here")])

@app.train()
def train(message, context):
    CALLS.append(1)
    context.state["kept"]["n"] += 1
    if message.content["options"].get("fail"):
        raise LookupError("asked to")
    time.sleep(message.content["options"].get("sleep", 0))
    about = {"drawn": float(np.random.rand())}
    about |= {"pid": os.getpid(), "calls": len(CALLS), "job": os.environ["FLWR_HPC_JOB"]}
    return Message(RecordDict({"about": ConfigRecord(about)}), reply_to=message)
"""
FILE = """# @package facilities.here
scheduler: {scheduler}
account: null
walltime: "00:10:00"
poll_s: 0.5
"""


ALLOCATIONS = "flwr-hpc-batch/*/*/*/allocations/*"
REAL = pytest.param("slurm", marks=pytest.mark.slurm)


MakeNode = Callable[..., Node]


@pytest.fixture
def make_node(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[MakeNode]:
    """Make nodes with an app on a batch system; their jobs end with the test."""
    if kind == "slurm":
        request.getfixturevalue("slurm_conf")
    scheduler = facility(kind, tmp_path, monkeypatch).scheduler
    (tmp_path / "conf" / "facility").mkdir(parents=True)
    (tmp_path / "conf" / "facility" / "here.yaml").write_text(FILE.format(scheduler=scheduler))
    module = make_app(SOURCE, tmp_path, monkeypatch)
    nodes = []

    def make(folder: str, **settings: object) -> Node:
        own = {"flwr-hpc.config-dir": str(tmp_path / "conf"), **settings}
        nodes.append(Node(module, tmp_path / folder, **own))
        return nodes[-1]

    yield make
    for process in [p for node in nodes for p in node.processes()]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.mark.parametrize("kind", ["local", "fake_slurm", "fake_pbs", REAL])
def test_app_in_a_job(kind: str, make_node: MakeNode) -> None:
    """Protects the one line on every batch system: one warm job, state, errors, the end.

    A seed at import counts for every message, as in the fresh processes of plain Flower.
    """
    node = make_node("scratch")
    brief = make_node("brief", **{"flwr-hpc.idle-timeout-s": 1})
    brief.about()
    until(lambda: not brief.processes())
    first, second = node.about(), node.about()
    assert first["pid"] == second["pid"] != os.getpid()
    assert (first["calls"], second["calls"]) == (1, 2)
    assert first["job"] == second["job"]
    assert round(first["drawn"], 4) == round(second["drawn"], 4) == 0.3745
    with pytest.raises(LookupError, match="asked to"):
        node.send(fail=True)
    assert node.context.state["kept"]["n"] == 4
    assert node.processes()


@pytest.mark.parametrize("kind", ["fake_slurm", "fake_pbs", REAL])
def test_a_cancelled_job_stays_cancelled(kind: str, make_node: MakeNode) -> None:
    """Protects a user who cancels the job from another one, for this message or the next."""
    node, errors = make_node("scratch"), list[BatchError]()

    def send() -> None:
        try:
            node.send(sleep=600)
        except BatchError as exc:
            errors.append(exc)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    (file,) = until(lambda: list(node.workdir.glob(f"{ALLOCATIONS}/job.json")), node.workdir)
    job = json.loads(file.read_text())
    until(node.processes, node.workdir)
    cancel = ["qdel"] if kind == "fake_pbs" else ["scancel", f"--jobname={job['name']}"]
    subprocess.run([*cancel, job["id"]], check=True)
    sender.join()
    assert "cancelled, and not by this run" in str(errors[0])
    with pytest.raises(BatchError, match="no more jobs are submitted"):
        node.send()
    assert len(list(node.workdir.glob(ALLOCATIONS))) == 1
