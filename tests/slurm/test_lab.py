"""The lab itself: clusters are cut off from the world, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from lab import host
from lab.cluster import Cluster
from lab.fixtures import Lab
from lab.plan import Layout, Shape, login_plan
from lab.traffic import schedule
from worlds.hosts.leftovers import left_of
from worlds.jobs import until

SMALL = Shape(accounting=False)


@pytest.fixture
def name(lab: Lab) -> str:
    return f"t{uuid.uuid4().hex[:8]}"


def reaches(cluster: Cluster, node: str, address: str, port: int) -> bool:
    """Tell whether a node gets any answer from an address."""
    code = (
        "import socket, sys\n"
        "line = socket.socket()\n"
        "line.settimeout(5)\n"
        f"sys.exit(line.connect_ex(({address!r}, {port})))\n"
    )
    argv = cluster.inside(sys.executable, "-I", "-S", "-c", code, node=node)
    return subprocess.run(argv, check=False).returncode in (0, 111)  # open or refused


@pytest.mark.slurm
def test_compute_nodes_are_cut_off(slurm: Cluster) -> None:
    """Protects what the federation tests claim: compute nodes have the login node alone."""
    first, second = slurm.nodes
    where = slurm.layout
    with open("/proc/net/route") as table:
        hosts = [line.split()[2] for line in table][1:]
    gateways = [".".join(str(b) for b in bytes.fromhex(h)[::-1]) for h in hosts if int(h, 16)]
    assert reaches(slurm, first, second, 6818)
    assert reaches(slurm, first, where.login, 6817)
    for outside in (where.outside, "1.1.1.1", *gateways):
        assert not reaches(slurm, first, outside, 443), outside
    assert reaches(slurm, "", where.outside, 443)
    assert not reaches(slurm, "", "1.1.1.1", 443)


@pytest.mark.slurm
def test_a_cluster_leaves_nothing(name: str) -> None:
    """Protects the machine of whoever runs the tests."""
    cluster = Cluster.up(name, SMALL)
    cluster.occupy(600)
    assert len(left_of(name, cluster.layout.index)) > 5
    cluster.down()
    until(lambda: not left_of(name, cluster.layout.index))


@pytest.mark.slurm
def test_the_login_node_by_ssh(name: str) -> None:
    """Protects whoever wants to try what a user types at a centre."""
    with Cluster.up(name, Shape(accounting=False, ssh=True, gpus=2)) as cluster:
        ssh = ["ssh", "-F", str(cluster.folder / "ssh_config"), name]
        said = host.run(*ssh, "hostname; sinfo -h -o %G")
        assert said.split()[:2] == [f"{name}-login", "gpu:2"]


@pytest.mark.slurm
def test_nothing_is_left_when_its_owner_is_killed(name: str) -> None:
    """Protects against pytest's end by kill -9: there is no time for any tear-down."""
    code = (
        "import sys, time\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from lab.cluster import Cluster\n"
        "from lab.plan import Shape\n"
        f"print(Cluster.up({name!r}, Shape(accounting=False)).layout.index, flush=True)\n"
        "time.sleep(3600)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    index = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    until(lambda: not left_of(name, index))


@pytest.mark.slurm
def test_nothing_is_left_when_its_supervisor_is_killed(name: str) -> None:
    """Protects against daemons that outlive their cluster; its files go with the next one."""
    cluster = Cluster.up(name, SMALL)
    os.kill(int((cluster.folder / "supervisor").read_text().split()[0]), signal.SIGKILL)
    # Whoever makes another cluster meanwhile removes the folder, too.
    until(lambda: set(left_of(name, cluster.layout.index)) <= {str(cluster.folder)})
    host.sweep()
    until(lambda: not left_of(name, cluster.layout.index))


@pytest.mark.slurm
def test_a_step_that_fails_says_why(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects whoever has to find out why a cluster does not come up on another machine."""
    monkeypatch.setattr("lab.plan.CONTROLLER", 1)  # nobody will listen there
    monkeypatch.setattr("lab.cluster.login_plan", _hurried)  # with that daemon alone
    with pytest.raises(host.LabError, match=r"(?s)slurmctld is not ready.*slurmctld.out"):
        Cluster.up(name, SMALL)
    assert not (host.HOME / name).exists()


def _hurried(layout: Layout, keep: bool) -> dict[str, Any]:
    plan = login_plan(layout, keep)
    (slurmctld,) = (step for step in plan["steps"] if step.get("start") == "slurmctld")
    slurmctld["step_s"] = 10.0
    return plan


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects a user without Slurm: the reason and the command, not a traceback."""
    monkeypatch.setitem(host.ENV, "PATH", "/nowhere")
    reason = host.missing.__wrapped__()
    assert "apt-get install" in reason
    assert "slurm-wlm slurmdbd munge mariadb-server" in reason


def test_a_schedule_is_reproducible() -> None:
    """Protects benchmarks under load: the same seed, the same jobs; about the load asked for."""
    jobs = schedule(seed=1, for_s=10_000, nodes=4, load=1.5)
    assert jobs == schedule(seed=1, for_s=10_000, nodes=4, load=1.5)
    work = sum(job.nodes * job.run_s for job in jobs)
    assert work / (4 * 10_000) == pytest.approx(1.5, rel=0.1)
