"""Job scripts, compared with golden ones. ``UPDATE_GOLDEN=1 pytest ...`` writes them anew."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.schedulers import script
from flwr_hpc.schedulers.base import JobSpec
from flwr_hpc.schedulers.registry import make_scheduler
from flwr_hpc.schedulers.script import render
from flwr_hpc.site import submission
from flwr_hpc.site.submission import job_spec
from flwr_hpc.spool import Spool

ROOT = Path(__file__).parents[3]

FACILITIES = {
    "slurm_plain": FacilityConfig(account="p123", partition="cpu", ranks_per_node=2),
    "slurm_gpus_by_gres": FacilityConfig(
        account="EUHPC_B01",
        partition="boost_usr_prod",
        qos="boost_qos_dbg",
        constraint="a100",
        reservation="flower",
        nodes=2,
        ranks_per_node=4,
        gpus_per_node=4,
        cpus_per_rank=8,
        walltime="1-02:00:00",
        options={"exclusive": "", "mem": "494000M"},
        launcher_args=["--cpu-bind=cores"],
    ),
    "slurm_container": FacilityConfig(
        account="project_1",
        partition="standard-g",
        ranks_per_node=8,
        gpus_per_node=8,
        gpu_request="gpus-per-node",
        container="/scratch/images/torch 2.sif",
        container_runtime="singularity",
        internet=True,
    ),
    "slurm_modules_and_env": FacilityConfig(
        account="p1",
        python="/opt/venv/bin/python",
        setup=["module purge", "module load Python/3.11 NCCL", 'echo "it\'s $HOSTNAME"'],
        env={"NCCL_SOCKET_IFNAME": "ib0", "GREETING": "it's $HOME", "OMP_NUM_THREADS": "7"},
    ),
    "pbs_modules_and_env": FacilityConfig(
        scheduler="pbs",
        account="p1",
        partition="gpu",
        nodes=2,
        ranks_per_node=4,
        gpus_per_node=4,
        cpus_per_rank=8,
        walltime="1-02:00:00",
        options={"filesystems": "home:eagle"},
        launcher_args=["--cpu-bind", "depth"],
        setup=["module load cuda", 'echo "it\'s $HOSTNAME"'],
        env={"GREETING": "it's $HOME"},
        container="/scratch/images/torch 2.sif",
    ),
    "local": FacilityConfig(scheduler="local", ranks_per_node=2, setup=["ulimit -c 0"]),
}


def _spec(facility: FacilityConfig, root: str = "/scratch/me/run 1") -> JobSpec:
    return job_spec(Spool(Path(root)), "2026-run", "centre", facility)


@pytest.mark.parametrize("name", FACILITIES)
def test_golden_scripts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects every facility's job script from changes nobody looked at."""
    monkeypatch.setattr(sys, "executable", "/opt/venv/bin/python")
    for module in (submission, script):
        monkeypatch.setattr(module, "checkout", lambda: "/opt/flwr-hpc")
    text = make_scheduler(FACILITIES[name]).script(_spec(FACILITIES[name]))
    golden = ROOT / "tests" / "golden" / f"{name}.sh"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("name", FACILITIES)
def test_scripts_are_valid_bash_and_write_nothing(name: str, tmp_path: Path) -> None:
    """Protects dry runs: any host can show the script, nothing appears on disk."""
    spec = _spec(FACILITIES[name], str(tmp_path / "a 'quoted' $path"))
    text = make_scheduler(FACILITIES[name]).script(spec)
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_values_survive_the_shell(tmp_path: Path) -> None:
    """Protects environment values with quotes, dollars and spaces."""
    value = 'it\'s $HOME "and" more'
    facility = FacilityConfig(scheduler="local", env={"GREETING": value})
    text = make_scheduler(facility).script(_spec(facility, str(tmp_path)))
    text = text[: text.index("exec ")] + 'printf %s "$GREETING"'
    assert subprocess.check_output(["bash", "-c", text], text=True) == value


def test_percent_signs_in_paths() -> None:
    """Protects log files in folders whose names look like Slurm's patterns."""
    facility = FACILITIES["slurm_plain"]
    text = make_scheduler(facility).script(_spec(facility, "/scratch/50%j"))
    assert "/scratch/50%%j/allocations/a0000/job/%j_0_log.out" in text


@pytest.mark.parametrize("template", sorted((ROOT / "slurm_templates").glob("*.j2")))
def test_templates_stay_small(template: Path) -> None:
    """Protects the templates from logic: short, no conditions but 'if present'."""
    lines = template.read_text().splitlines()
    assert len(lines) <= 60
    for line in lines:
        if "{%" in line:
            words = shlex.split(line.strip("{%} "))
            assert words[0] in ("if", "endif", "for", "endfor")
            assert words[0] != "if" or len(words) == 2


def test_missing_field_is_an_error() -> None:
    """Protects against scripts with holes."""
    with pytest.raises(UndefinedError, match="name"):
        render("slurm.sh.j2", {})
