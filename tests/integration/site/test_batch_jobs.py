"""The batch mod with real jobs on this host; Flower's own processes are not needed for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from worlds.hosts.stranger import open_to_others
from worlds.jobs import send, until
from worlds.site.batch_app import Node, make_app, make_context, make_message

from flwr_hpc.batch_mod.carry import AppError
from flwr_hpc.batch_mod.mod import BatchError

SOURCE = """
import numpy as np

app = ClientApp(mods=[flwr_hpc.batch("local_a", idle_timeout_s=3600, cpus_per_rank=1)])
CALLS = []

class Odd(Exception):
    pass

@app.train()
def train(message, context):
    CALLS.append(1)
    what = message.content["options"].get("what", "")
    context.state["kept"]["n"] += 1
    if what == "raise":
        raise Odd("as asked")
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "sleep":
        time.sleep(3600)
    doubled = {k: Array(np.asarray(2 * v.numpy())) for k, v in message.content["arrays"].items()}
    about = {"pid": os.getpid(), "calls": len(CALLS), "rank": int(os.environ.get("RANK", 0))}
    content = {"arrays": ArrayRecord(doubled), "about": ConfigRecord(about)}
    return Message(RecordDict(content), reply_to=message)

@app.query("add_up")
def add_up(message, context):
    import torch.distributed as dist, torch
    dist.init_process_group("gloo")
    if message.content["options"].get("fail_on") == dist.get_rank():
        raise Odd("one of several")
    total = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(total)
    dist.destroy_process_group()
    return Message(RecordDict({"sum": MetricRecord({"sum": total.item()})}), reply_to=message)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return make_app(SOURCE, tmp_path, monkeypatch)


@pytest.fixture
def node(module: ModuleType, tmp_path: Path) -> Iterator[Node]:
    node = Node(module, tmp_path / "scratch")
    yield node
    send(signal.SIGKILL, node.processes())


def test_one_warm_job_answers(node: Node) -> None:
    """Protects content and state both ways, warmth, and the job from an app that fails."""
    reply = node.send()
    assert (reply.content["arrays"]["w"].numpy() == 2 * np.arange(6).reshape(2, 3)).all()
    assert reply.content["arrays"]["b"].numpy() == 14
    assert reply.metadata.dst_node_id == 1
    first, second = reply.content["about"], node.about()
    assert first["pid"] == second["pid"] != os.getpid()
    assert (first["calls"], second["calls"]) == (1, 2)
    assert node.context.state["kept"]["n"] == 3
    with pytest.raises(node.module.Odd, match="as asked") as caught:
        node.send(what="raise")
    assert "raise Odd" in caught.value.__notes__[0]
    assert node.context.state["kept"]["n"] == 4
    with pytest.raises(AppError, match="killed by SIGKILL"):
        node.send(what="die")
    after = node.about()
    assert after["pid"] != first["pid"]
    assert node.module.CALLS == []
    assert len(list(node.workdir.glob("flwr-hpc-batch/11/7/*/allocations/*"))) == 1


def test_what_a_message_leaves_is_its_owners_alone(node: Node) -> None:
    """Protects messages, replies and logs from other users; the app's umask is its own after it."""
    before = os.umask(0o022)
    try:
        node.send()
    finally:
        assert os.umask(before) == 0o022
    assert open_to_others(node.workdir / "flwr-hpc-batch") == {}


def test_a_message_sent_again_is_answered_once(node: Node) -> None:
    """Protects a message whose ClientApp was killed from being trained twice."""
    message = make_message()
    first = node.module.app(message, make_context(**node.context.node_config))
    again = node.module.app(message, make_context(**node.context.node_config))
    assert again.content == first.content
    assert first.content["about"]["calls"] == 1


def test_idle_job_ends(module: ModuleType, tmp_path: Path) -> None:
    """Protects the budget once a run is over, and the host from what it left."""
    node = Node(module, tmp_path / "scratch", **{"flwr-hpc.idle-timeout-s": 1})
    node.send()
    until(lambda: not node.processes())


def test_longer_than_the_walltime(module: ModuleType, tmp_path: Path) -> None:
    """Protects from three jobs for a message that no job of that length can answer."""
    node = Node(module, tmp_path / "scratch", **{"flwr-hpc.walltime": "00:20"})
    with pytest.raises(BatchError, match="more than the walltime of 20 s"):
        node.send(what="sleep")
    until(lambda: not node.processes())


def test_an_app_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the user: what is missing in the job comes back in its own words."""
    source = 'if os.environ.get("FLWR_HPC_JOB"):\n    import not_in_the_job\n' + SOURCE
    node = Node(make_app(source, tmp_path, monkeypatch), tmp_path / "scratch")
    with pytest.raises(BatchError, match="No module named 'not_in_the_job'"):
        node.send()
    until(lambda: not node.processes())


def test_two_ranks_call_the_app_together(module: ModuleType, tmp_path: Path) -> None:
    """Protects apps that use torch.distributed, also when one rank fails and the other waits."""
    node = Node(module, tmp_path / "scratch", **{"flwr-hpc.ranks-per-node": 2})
    assert node.send("query.add_up").content["sum"]["sum"] == 3.0
    with pytest.raises(node.module.Odd, match="one of several"):
        node.send("query.add_up", fail_on=1)
    assert node.send("query.add_up").content["sum"]["sum"] == 3.0
    assert node.about()["rank"] == 0
    send(signal.SIGTERM, node.processes())
    until(lambda: not node.processes())


def test_none_runs_in_place(module: ModuleType, tmp_path: Path) -> None:
    """Protects a laptop among the facilities."""
    node = Node(module, tmp_path / "scratch", **{"flwr-hpc.facility": "none"})
    assert node.about()["pid"] == os.getpid()
    assert node.context.state["kept"]["n"] == 2
