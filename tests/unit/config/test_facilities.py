"""The facility files that are shipped: what they say, and the job scripts they give."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from flwr_hpc.config.compose import compose_config
from flwr_hpc.config.facility import FacilityConfig, queue_of, walltime_s
from flwr_hpc.config.folder import conf_dir
from flwr_hpc.config.schema import decode
from flwr_hpc.errors import UserError
from flwr_hpc.schedulers import script
from flwr_hpc.schedulers.accounts import settle_accounts
from flwr_hpc.schedulers.registry import check_facility, make_scheduler
from flwr_hpc.site import submission
from flwr_hpc.site.submission import job_spec
from flwr_hpc.spool import Spool

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden"
DOCS = (ROOT / "docs" / "facilities.md").read_text()
EXAMPLES = ("slurm", "pbs")
QOS = {"marenostrum5": "acc_ehpc", "discoverer": "project1"}  # where the user has to say it
FACTS = {
    "gpus_per_node": "of a node",
    "cpus_per_node": "cores of a node that jobs may use",
    "gpu_memory_gb": "memory of one device",
    "peak_tflops": "of one device, dense bf16",
}
FILES = {
    path.stem: path
    for path in sorted((conf_dir() / "facility").glob("*.yaml"))
    if not path.stem.startswith("local")
}


@cache
def _facility(name: str, *overrides: str) -> FacilityConfig:
    """Compose a facility as a user would; overrides are fields of it."""
    given = ["account=project1", *([f"qos={QOS[name]}"] if name in QOS else []), *overrides]
    settings = [f"facilities.{name}.{o}" for o in given]
    facility = compose_config([f"+facility={name}", *settings]).facilities[name]
    check_facility(name, facility)
    return facility


def _script(name: str, facility: FacilityConfig) -> str:
    spec = job_spec(Spool(Path("/scratch/me/run")), "2026-run", name, facility)
    return make_scheduler(facility).script(spec)


@pytest.fixture(autouse=True)
def _same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/venv/bin/python")
    for module in (submission, script):
        monkeypatch.setattr(module, "checkout", lambda: "")


@pytest.mark.parametrize("name", FILES)
def test_golden_script(name: str) -> None:
    """Protects each facility's job script from changes nobody looked at."""
    text = _script(name, _facility(name))
    golden = GOLDEN / f"{name}.sh"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    again = f"UPDATE_GOLDEN=1 pytest {Path(__file__).relative_to(ROOT)} -k {name}, and look at it"
    assert golden.exists(), f"tests/golden/{name}.sh is missing. Write it with: {again}"
    assert text == golden.read_text(), f"another script than before. If that is meant: {again}"
    assert len(text.splitlines()) <= 60


@pytest.mark.parametrize("name", FILES)
def test_facility_keeps_its_own_rules(name: str) -> None:
    """Protects the files from what the centre would refuse or waste."""
    facility, file = _facility(name), f"conf/facility/{name}.yaml"
    missing = [field for field in FACTS if name not in EXAMPLES and not getattr(facility, field)]
    assert not missing, f"{file} lacks: " + "; ".join(f"{m}: {FACTS[m]}" for m in missing)
    asked = r"^#(?:SBATCH --|PBS -l |PBS -)([a-zA-Z-]+)"
    used = re.findall(asked, _script(name, facility), flags=re.MULTILINE)
    assert len(used) == len(set(used)), f"{file}: something is asked for twice: {used}"
    assert not set(used) & set(facility.forbidden), f"{file}: see its field forbidden"
    assert facility.nodes == 1, f"{file}: nodes={facility.nodes}; users choose more themselves"
    assert facility.ranks_per_node == facility.gpus_per_node, (
        f"{file}: ranks_per_node is to be ${{.gpus_per_node}}: a rank drives one GPU"
    )
    queue = queue_of(facility)
    assert queue or not facility.queues, f"{file}: partition and qos are none of its queues"
    if queue is not None and queue.walltime:
        assert walltime_s(facility.walltime) <= walltime_s(queue.walltime), f"{file}: walltime"


@pytest.mark.parametrize("name", FILES)
def test_the_account_is_the_users(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects users from a job that is refused, or charged to the wrong project."""
    for variable in ("SBATCH_ACCOUNT", "SLURM_ACCOUNT", "PBS_ACCOUNT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "")
    qos = [f"facilities.{name}.qos={QOS[name]}"] if name in QOS else []
    facilities = compose_config([f"+facility={name}", *qos]).facilities
    with pytest.raises(UserError, match=rf"facilities\.{name}\.account must be given"):
        settle_accounts(facilities)


@pytest.mark.parametrize("name", QOS)
def test_qos_must_be_given(name: str) -> None:
    """Protects users of the centres that take no job without a QOS of the project's."""
    with pytest.raises(UserError, match=rf"facilities\.{name}\.qos must be given"):
        compose_config([f"+facility={name}", f"facilities.{name}.account=p1"])


@pytest.mark.parametrize("name", FILES)
def test_facts_name_their_source(name: str) -> None:
    """Protects the files from facts of unknown origin and age."""
    text, file = FILES[name].read_text(), f"conf/facility/{name}.yaml"
    source = re.search(r"^# Source: (.+(?:\n# .+)*)", text, flags=re.MULTILINE)
    assert source, f"{file} lacks the line: # Source: https://docs.CENTRE, YEAR-MONTH"
    if name not in EXAMPLES:
        assert re.search(r"20\d\d", source[1]), f"{file}: its source has no year"
        assert re.search(r"\b(docs?|apps)\.[\w.-]+|unverified", source[1]), f"{file}: {source[1]}"
    assert "shared_roots:" in text or _facility(name).scheduler != "slurm", (
        f"{file} lacks shared_roots: what compute nodes share with login nodes; []: not known"
    )


@pytest.mark.parametrize("name", FILES)
def test_every_queue_can_be_chosen(name: str) -> None:
    """Protects the debug and preemptable queues: each is two or three overrides away."""
    facility = _facility(name)
    for queue in facility.queues:
        chosen = replace(
            facility,
            partition=queue.partition,
            qos=queue.qos,
            nodes=queue.max_nodes or queue.min_nodes,
            walltime=queue.walltime or facility.walltime,
        )
        check_facility(name, chosen)
        assert queue_of(chosen) == queue
        if facility.scheduler == "slurm":
            assert ("#SBATCH --requeue\n" in _script(name, chosen)) == queue.preemptable
        else:
            assert f"#PBS -q {queue.partition}\n#PBS -A" in _script(name, chosen)
            assert "#PBS -r y\n" in _script(name, chosen)


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        (
            "leonardo",
            ["walltime=02:00:00"],
            "walltime=02:00:00: partition boost_usr_prod qos boost_qos_dbg gives 1 node at most "
            "00:30:00. Add to the command: facilities.leonardo.walltime=00:30:00. Or one of the "
            "queues that take 1 node for 02:00:00: facilities.leonardo.qos=null; "
            "facilities.leonardo.qos=boost_qos_lprod",
        ),
        (
            "leonardo",
            ["nodes=100"],
            "nodes=100: partition boost_usr_prod qos boost_qos_dbg takes 1 to 2 nodes. Add to the "
            "command: facilities.leonardo.nodes=2. Or one of the queues that take 100 nodes for "
            "00:30:00: facilities.leonardo.qos=boost_qos_bprod",
        ),
        ("frontier", ["walltime=06:00:00"], "at most 02:00:00"),
        ("frontier", ["nodes=100", "walltime=07:00:00"], "walltime=06:00:00"),
        ("alps", ["partition=debug", "nodes=2", "walltime=01:30:00"], "walltime=00:45:00"),
        ("marenostrum5", ["options.mem=100G"], "must never set --mem"),
        ("perlmutter", ["partition=gpu"], "facilities.perlmutter.partition=null"),
        ("discoverer", ["gpu_request=gpus"], "facilities.discoverer.gpu_request=gres"),
        ("leonardo", ["ranks_per_node=8"], "facilities.leonardo.ranks_per_node=4"),
        ("leonardo", ["cpus_per_rank=16"], "facilities.leonardo.cpus_per_rank=8"),
        ("frontier", ["ranks_per_node=3"], "facilities.frontier.ranks_per_node=8"),
        ("leonardo", ["options.time=1"], "Use facilities.leonardo.walltime"),
        ("leonardo", ["options.gres=gpu:2"], "Use facilities.leonardo.gpus_per_node"),
        ("leonardo", ["options.mem_per_cpu=1"], "no long option of sbatch"),
        ("leonardo", ["gpu_request=gpu"], "Did you mean 'gpus'?"),
        ("leonardo", ["gpu_vendor=apple"], "Valid: nvidia, amd, intel."),
        (
            "leonardo",
            ["sbatch.mem=1G"],
            "'facilities.leonardo' has no key 'sbatch'. Valid keys: sch",
        ),
        ("leonardo", ["chunk='ncpus=1'"], "facilities.leonardo.gpu_request, gpu_type and constr"),
        ("leonardo", ["mpi=openmpi"], "facilities.leonardo.launcher_args"),
        ("polaris", ["gpu_request=gpus"], "facilities.polaris.chunk"),
        ("polaris", ["qos=high"], "its queue is facilities.polaris.partition"),
        ("polaris", ["reservation=R12"], "facilities.polaris.partition=R12"),
        ("polaris", ["options.walltime=1"], "Use facilities.polaris.walltime instead"),
        ("polaris", ["options.select=1"], "Use facilities.polaris.nodes and chunk instead"),
        ("polaris", ["options.a-b=1"], "facilities.polaris.options.filesystems=home"),
        (
            "polaris",
            ["chunk='4:ncpus=1'"],
            "facilities.polaris.chunk='ncpus=32:ngpus=4:mpiprocs=4'",
        ),
        ("polaris", ["forbidden=[place]"], "must never ask for place"),
        ("polaris", ["mpi=mpi"], "Valid: mpich, openmpi, mpich-tmrsh."),
        ("polaris", ["nodes=5"], "facilities.polaris.partition=preemptable"),
        ("aurora", ["partition=prod"], "prod takes 256 to 10624 nodes"),
    ],
)
def test_mistakes_are_explained(name: str, overrides: list[str], said: str) -> None:
    """Protects users from learning a centre's rules by refused jobs."""
    with pytest.raises(UserError) as caught:
        _facility(name, *overrides)
    assert said in str(caught.value)


def test_unknown_queues_are_the_users_business() -> None:
    """Protects QOS and partitions that a centre gives to one project alone."""
    facility = _facility("leonardo", "qos=my_project_qos", "walltime=10-00:00:00")
    assert queue_of(facility) is None


def test_a_setting_of_a_facility_that_is_not_named() -> None:
    """Protects who relies on the two local facilities, which are only there if none is named."""
    with pytest.raises(UserError, match=r"names no facility 'local_a'\. Add .*\+facility=local_a"):
        compose_config(["facilities.local_a.nodes=2"])


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"gpu_request": "gres"}, "--gres=gpu:4"),
        ({"gpu_request": "gres", "gpu_type": "a100"}, "--gres=gpu:a100:4"),
        ({"gpu_request": "gpus", "nodes": 3}, "--gpus=12"),
        ({"gpu_request": "gpus-per-node", "gpu_type": "h100"}, "--gpus-per-node=h100:4"),
        ({"gpu_request": "gpus-per-task"}, "--gpus-per-task=1"),
        ({"gpu_request": "gpus-per-task", "ranks_per_node": 2}, "--gpus-per-task=2"),
    ],
)
def test_gpu_requests(fields: dict[str, Any], line: str) -> None:
    """Protects the several manners in which centres want GPUs asked for."""
    text = _script("slurm", replace(_facility("slurm"), **fields))
    assert re.findall(r"#SBATCH (--g.*)", text) == [line]


def test_preemptable_queues_may_still_refuse_to_requeue() -> None:
    """Protects users who want a preempted job to end."""
    own = ["partition=qgpu_preempt", "options.no-requeue=''"]
    assert re.findall("#SBATCH --.*requeue", _script("karolina", _facility("karolina", *own))) == [
        "#SBATCH --no-requeue"
    ]


def test_containers_reach_the_gpus_of_either_vendor() -> None:
    """Protects AMD's centres from containers that see no GPU."""
    for name, flag in (("lumi", "--rocm"), ("leonardo", "--nv")):
        command = _script(name, _facility(name, "container=/images/torch.sif")).split("srun ")[1]
        assert flag in shlex.split(command)


def test_facility_survives_the_site_file() -> None:
    """Protects the queues on their way to the site's process, through JSON."""
    facility = _facility("frontier")
    body = json.loads(json.dumps(asdict(facility)))
    assert decode(FacilityConfig, body, "site.json") == facility


@pytest.mark.parametrize("name", FILES)
def test_docs_list_every_facility(name: str) -> None:
    """Protects the table in the documentation from going stale."""
    listed = re.search(rf"^\| `{name}` ", DOCS, flags=re.MULTILINE)
    assert listed, f"docs/facilities.md lacks a row: | `{name}` | ..."


def test_the_documented_example_works(tmp_path: Path) -> None:
    """Protects whoever adds a cluster by the documentation."""
    (example,) = re.findall(r"```yaml\n( +# @package .+?)```", DOCS, flags=re.DOTALL)
    (tmp_path / "facility").mkdir()
    (tmp_path / "facility" / "mycluster.yaml").write_text(dedent(example))
    config = compose_config(["+facility=mycluster"], str(tmp_path))
    facility = config.facilities["mycluster"]
    assert facility.ranks_per_node == facility.gpus_per_node == 4
    assert queue_of(facility) is not None
    assert "#SBATCH --gres=gpu:a100:4" in _script("mycluster", facility)
