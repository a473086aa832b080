"""The doctor's checks on compute nodes, from reports alone: each fault gives its fix."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from flwr_hpc import __version__
from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.doctor.findings import Finding
from flwr_hpc.doctor.job import ProbeResult
from flwr_hpc.doctor.nodes import Nodes, nodes

PACKAGES = {"torch": "2.13.0", "transformers": "5.1", "peft": "0.21", "datasets": "4.0"}
GPU = {"name": "A100", "bytes": 39 * 2**30}
TOKEN = "t0ken"


def report(rank: int) -> dict[str, Any]:
    """Return what one of four ranks on two nodes says when all is well."""
    return {
        "rank": rank,
        "host": f"n{rank // 2}",
        "token": TOKEN,
        "ping": True,
        "flwr_hpc": __version__,
        "packages": dict(PACKAGES),
        "cores": [2 * (rank % 2), 2 * (rank % 2) + 1],
        "tmp": "/tmp",
        "tmp_free": 10**11,
        "torch": {"cuda": True, "seconds": 9.0},
        "gpus": [{**GPU, "uuid": f"{rank // 2}-{k}"} for k in range(2)],
        "unreachable": {},
        "meeting": {"ranks": 4, "seconds": 1.5, "device": "cuda", "gigabytes_s": 20.0},
    }


def well(**fields: Any) -> Nodes:
    """Return two nodes of two GPUs where everything is as declared."""
    shape = {"nodes": 2, "ranks_per_node": 2, "gpus_per_node": 2, "cpus_per_rank": 2}
    facility = FacilityConfig(account="p", **(shape | {"gpu_memory_gb": 40.0} | fields))
    probed = ProbeResult(facility, "7", "", {k: report(k) for k in range(4)}, 60.0, token=TOKEN)
    probed.round_trip_s = dict.fromkeys(range(4), 0.4)
    probed.clock_s = dict.fromkeys(range(4), (-0.2, 0.1))
    return Nodes("x", probed, {"flwr": "1.41.0", **PACKAGES})


def found(there: Nodes) -> dict[str, Finding]:
    return {f.name: f for f in nodes.run(there)}


def sick(rank: int, **changes: Any) -> dict[str, Finding]:
    """Return the findings when one rank says something else."""
    there = well()
    there.probed.reports[rank] |= deepcopy(changes)
    return found(there)


def test_all_is_well() -> None:
    """Protects users of a good facility from false alarms."""
    findings = found(well())
    assert {f.status for f in findings.values()} == {"pass", "skipped"}
    assert [f.name for f in findings.values() if f.status == "skipped"] == [
        "bandwidths",
        "outbound reach",
    ]
    assert "4 ranks on n0, n1" in findings["probe job"].observed
    assert "all-reduce at 20.0 GB/s" in findings["rendezvous"].observed


@pytest.mark.parametrize(
    ("fault", "log", "fix"),
    [
        ("the job ended early: FAILED", "No module named 'submitit'", "install flwr-hpc[train]"),
        ("the job ended early: FAILED", "execve(): x: No such file", "not on the compute nodes"),
        ("the job ended early: FAILED", "Exec format error", "other processors"),
        ("the job ended early: FAILED", "segfault", "see the ranks' last words"),
        ("the job ended early: COMPLETED", "", "not even a log file came back"),
        ("no sign of life after 30 min; PENDING (Priority)", "", "--timeout 120"),
        ("the job will not start: AssocGrpNodeLimit policy", "", "your limits"),
    ],
)
def test_jobs_that_bring_nothing_back(fault: str, log: str, fix: str) -> None:
    """Protects the user from a silent failure on a compute node."""
    there = well()
    there.probed.reports, there.probed.waited_s = {}, None
    there.probed.fault, there.probed.log = fault, log
    first, *others = nodes.run(there)
    assert first.status == "fail"
    assert fault in first.observed
    assert log in first.observed
    assert fix in first.fix
    assert {f.status for f in others} == {"skipped"}


def test_a_refused_job() -> None:
    """Protects the scheduler's own words about the probe job."""
    there = well()
    there.probed.job_id, there.probed.reports = "", {}
    there.probed.fault = "Slurm refused the job 'x': sbatch: error: Invalid qos specification"
    finding = found(there)["probe job"]
    assert finding.observed == there.probed.fault
    assert "facilities.x.qos=NAME" in finding.fix


def test_some_ranks_are_silent() -> None:
    """Protects from judging an allocation by the ranks that live."""
    there = well()
    del there.probed.reports[3]
    there.probed.fault = "some ranks did not come to an end in 7 min"
    assert "no report of rank 3" in found(there)["probe job"].observed


def test_files() -> None:
    """Protects from a folder that is another one there, or stale, or slow."""
    for change in ({"token": None}, {"ping": False}):
        finding = sick(2, **change)["shared files"]
        assert finding.status == "fail"
        assert "facilities.x.workdir=" in finding.fix
    there = well()
    there.probed.round_trip_s[1] = 31.0
    assert found(there)["shared files"].status == "warn"


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"packages": {"torch": "2.13.0"}}, "fail", "missing: transformers, peft, datasets"),
        ({"torch": {"error": "OSError: libcudart"}}, "fail", "libcudart"),
        ({"flwr_hpc": "0.0.1"}, "fail", f"0.0.1, {__version__}; {__version__} on the login node"),
        ({"packages": PACKAGES | {"torch": "2.6.0"}}, "fail", "not the same in all ranks: torch"),
    ],
)
def test_packages(change: dict[str, Any], status: str, words: str) -> None:
    """Protects from environments that differ, or break on import."""
    findings = sick(1, **change)
    assert findings["packages"].status == status
    assert words in findings["packages"].observed
    assert "facilities.x.python" in findings["packages"].fix
    assert findings["rendezvous"].status == "skipped"


def test_other_versions_than_on_the_login_node() -> None:
    """Protects from a difference that may be meant: a warning; no torch there is fine."""
    there = well()
    differs = Nodes("x", there.probed, {"torch": "2.6.0"})
    assert "torch 2.13.0 (2.6.0 on the login node)" in found(differs)["packages"].observed
    assert found(differs)["packages"].status == "warn"
    assert found(Nodes("x", there.probed, {}))["packages"].status == "pass"


@pytest.mark.parametrize(
    ("change", "status", "fix"),
    [
        ({"torch": {"cuda": False, "seconds": 1.0}, "gpus": []}, "fail", "gpu_request"),
        ({"gpus": {"error": "RuntimeError: driver too old"}}, "fail", "nvidia driver"),
        ({"gpus": [{**GPU, "uuid": ""}]}, "pass", ""),  # the other rank sees both
        ({"gpus": [{**GPU, "uuid": "third"}]}, "fail", "gpus_per_node=3"),
        ({"gpus": [{**GPU, "uuid": "0-0", "bytes": 20 * 2**30}]}, "warn", "gpu_memory_gb=20"),
    ],
)
def test_gpus(change: dict[str, Any], status: str, fix: str) -> None:
    """Protects from a node with other GPUs than the plan and MFU are made for."""
    finding = sick(1, **change)["GPUs"]
    assert finding.status == status, finding
    assert fix in finding.fix


def test_gpus_of_one_rank_each() -> None:
    """Protects --gpus-per-task, where a rank sees its own GPU alone."""
    there = well()
    for k, r in there.probed.reports.items():
        r["gpus"] = [{**GPU, "uuid": str(k)}]
    assert found(there)["GPUs"].status == "pass"
    assert found(well(gpus_per_node=0))["GPUs"].status == "skipped"


def test_cores() -> None:
    """Protects from ranks that share a core, or have fewer than their threads."""
    finding = sick(3, cores=[0])["cores per rank"]
    assert (finding.status, finding.observed) == ("fail", "a rank may use 1, 2 declared")
    assert "cpus_per_rank=1" in finding.fix
    finding = sick(3, cores=[0, 1])["cores per rank"]
    assert "n1: 2 ranks share 2 cores" in finding.observed
    local = well(scheduler="local")
    local.probed.reports[3]["cores"] = [0]
    assert found(local)["cores per rank"].status == "warn"


def test_rendezvous() -> None:
    """Protects from the wrong network interface."""
    finding = sick(2, meeting={"error": "TimeoutError: ranks [2] did not start"})["rendezvous"]
    assert finding.status == "fail"
    assert "facilities.x.env.GLOO_SOCKET_IFNAME=" in finding.fix
    there = well()
    del there.probed.reports[0]["meeting"]  # it never came back from it
    assert found(there)["rendezvous"].status == "fail"


@pytest.mark.parametrize(
    ("bounds", "status"),
    [
        ((-40.0, 3.0), "pass"),  # slow files say little, and accuse nobody
        ((6.0, 9.0), "warn"),
        ((-99.0, -70.0), "fail"),
    ],
)
def test_clock(bounds: tuple[float, float], status: str) -> None:
    """Protects from accusing a clock of what is the file system's delay."""
    there = well()
    there.probed.clock_s[2] = bounds
    assert found(there)["clock"].status == status


def test_tmp_and_outbound_reach() -> None:
    """Protects from a full /tmp, and from counting on an internet that is not there."""
    assert "TMPDIR" in sick(1, tmp_free=5)["temporary files"].fix
    there = well(internet=True)
    for r in there.probed.reports.values():
        r["unreachable"] = {"https://huggingface.co": ""}
    assert found(there)["outbound reach"].status == "pass"
    there.probed.reports[1]["unreachable"] = {"https://huggingface.co": "timed out"}
    finding = found(there)["outbound reach"]
    assert finding.status == "fail"
    assert "facilities.x.internet=false" in finding.fix


def measured(rows: list[dict[str, Any]], kinds: int = 2) -> dict[str, Any]:
    """Return what every rank says of collectives."""
    return {"rows": rows, "kinds": kinds, "device": "A100, NCCL"}


def test_bandwidths() -> None:
    """Protects the table that plans go by: whole, in part, and of a job in which it hangs."""
    row = {"inner": 1, "size": 2, "all_gather": 50.0, "reduce_scatter": 50.0, "all_reduce": 50.0}
    rows = [row, row | {"size": 4, "all_reduce": 20.0}]
    assert sick(0)["bandwidths"].status == "skipped"
    there = well()
    for one in there.probed.reports.values():
        one["bandwidth"] = measured(rows)
    assert found(there)["bandwidths"].observed == "2 kinds of groups: 33.3 to 50 GB/s"
    table = there.bandwidths
    assert table is not None
    assert (table.facility, table.nodes, table.ranks_per_node) == ("x", ["n0", "n1"], 2)
    assert (table.torch, table.rows[1].size) == ("2.13.0", 4)
    late = sick(0, bandwidth=measured(rows[:1]))["bandwidths"]
    assert (late.status, "1 kinds not measured" in late.observed) == ("warn", True)
    assert sick(0, bandwidth=measured([]))["bandwidths"].status == "fail"
    there.probed.reports[3]["bandwidth"] = {"error": "no end after 540 s"}
    hangs = found(there)["bandwidths"]
    assert hangs.status == "fail"
    assert "NCCL_DEBUG=INFO" in hangs.fix
