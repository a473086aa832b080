"""The batch mod on every batch system, faked at the process boundary."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from worlds.batch_app import Node, make_app
from worlds.jobs import facility, until

SOURCE = """
CALLS = []
app = ClientApp(mods=[flwr_hpc.batch("here")])

@app.train()
def train(message, context):
    CALLS.append(1)
    context.state["kept"]["n"] += 1
    if message.content["options"].get("fail"):
        raise LookupError("asked to")
    about = {"pid": os.getpid(), "calls": len(CALLS), "job": os.environ["FLWR_HPC_JOB"]}
    return Message(RecordDict({"about": ConfigRecord(about)}), reply_to=message)
"""
FILE = """# @package facilities.here
scheduler: {scheduler}
account: null
walltime: "00:10:00"
poll_s: 0.5
"""


REAL = pytest.param("slurm", marks=pytest.mark.slurm)


@pytest.mark.parametrize("kind", ["local", "fake_slurm", "fake_pbs", REAL])
def test_app_in_a_job(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Protects the one line on every batch system: one warm job, state, errors, the end."""
    if kind == "slurm":
        request.getfixturevalue("slurm_conf")
    scheduler = facility(kind, tmp_path, monkeypatch).scheduler
    (tmp_path / "conf" / "facility").mkdir(parents=True)
    (tmp_path / "conf" / "facility" / "here.yaml").write_text(FILE.format(scheduler=scheduler))
    module = make_app(SOURCE, tmp_path, monkeypatch)
    settings = {"flwr-hpc.config-dir": str(tmp_path / "conf")}
    node = Node(module, tmp_path / "scratch", **settings)
    brief = Node(module, tmp_path / "brief", **settings, **{"flwr-hpc.idle-timeout-s": 1})
    try:
        brief.about()
        until(lambda: not brief.processes())
        first, second = node.about(), node.about()
        assert first["pid"] == second["pid"] != os.getpid()
        assert (first["calls"], second["calls"]) == (1, 2)
        assert first["job"] == second["job"]
        with pytest.raises(LookupError, match="asked to"):
            node.send(fail=True)
        assert node.context.state["kept"]["n"] == 4
        assert node.processes()
    finally:
        for process in [*node.processes(), *brief.processes()]:
            process.kill()
