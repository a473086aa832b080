"""The doctor's checks on a login node: each failing situation gives its fix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from worlds.site.doctor import FakeOutside, FakeScheduler, a_login

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.config.schema import ModelConfig
from flwr_hpc.doctor import files
from flwr_hpc.doctor.findings import Finding
from flwr_hpc.doctor.login import Login, duration, login, mend_refusal
from flwr_hpc.doctor.outside import Answer
from flwr_hpc.errors import UserError
from flwr_hpc.schedulers.base import SchedulerUnavailableError

REFUSED = "Slurm refused the job 'x': sbatch: error: {}\nCheck account, partition"


def found(here: Login) -> dict[str, Finding]:
    return {f.name: f for f in login.run(here)}


def sick(
    tmp_path: Path,
    *overrides: str,
    outside: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
) -> dict[str, Finding]:
    """Return the findings on a login node where something is not as it should be."""
    here = a_login(tmp_path, *overrides)
    for thing, changes in ((here.outside, outside), (here.scheduler, scheduler)):
        for key, value in (changes or {}).items():
            setattr(thing, key, value)
    return found(here)


def test_all_is_well(tmp_path: Path) -> None:
    """Protects users of a good facility from false alarms."""
    findings = found(a_login(tmp_path))
    assert {f.status for f in findings.values()} <= {"pass", "skipped"}
    assert "would start in 12 min" in findings["account and limits"].observed
    assert not list(tmp_path.iterdir())


def test_not_on_a_login_node(tmp_path: Path) -> None:
    """Protects who types the command on a laptop: said once, and nothing else is asked."""
    findings = sick(tmp_path, outside={"programs": ("srun",)})
    first = findings["scheduler commands"]
    assert (first.status, first.observed) == (
        "fail",
        "not found on this host: sbatch squeue scancel",
    )
    assert "login node of slurm" in first.fix
    for name in ("scheduler answers", "accounting", "account and limits"):
        assert findings[name].status == "skipped"


def test_scheduler_away(tmp_path: Path) -> None:
    """Protects against taking a silent scheduler for a refusal."""
    away = SchedulerUnavailableError("squeue: Unable to contact slurm controller")
    findings = sick(tmp_path, scheduler={"error": away})
    assert findings["scheduler answers"].status == "fail"
    assert "Unable to contact" in findings["scheduler answers"].observed
    assert "SLURM_CONF" in findings["scheduler answers"].fix
    assert findings["account and limits"].status == "skipped"


@pytest.mark.parametrize(
    "outside",
    [
        {"programs": ("sbatch", "squeue", "scancel", "srun")},
        {"says": {"sacct": Answer(1, "", "Slurm accounting storage is disabled")}},
    ],
)
def test_no_accounting_is_no_failure(tmp_path: Path, outside: dict[str, Any]) -> None:
    """Protects clusters without accounting: a warning, and the rest goes on."""
    findings = sick(tmp_path, outside=outside)
    assert findings["accounting"].status == "warn"
    assert findings["account and limits"].status == "pass"


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (Answer(0, "", "PBS is not configured to maintain job history\n"), "warn", "job_history"),
        (Answer(153, "", "qstat: Unknown Job Id 1.pbshost"), "pass", ""),  # it looked for it
    ],
)
def test_whether_pbs_keeps_a_history(
    tmp_path: Path, answer: Answer, status: str, words: str
) -> None:
    """Protects PBS's users: why an end has no reason, and no advice that is for Slurm."""
    here = a_login(tmp_path, "facilities.pbs.account=p", name="pbs")
    here.outside.programs = ("qsub", "qstat", "qdel")  # type: ignore[attr-defined]
    here.outside.says = {"qstat": answer}  # type: ignore[attr-defined]
    finding = found(here)["accounting"]
    assert finding.status == status
    assert words in finding.fix
    here.scheduler.error = SchedulerUnavailableError("down")  # type: ignore[attr-defined]
    fix = found(here)["scheduler answers"].fix
    assert "PBS_SERVER" in fix
    assert "SLURM" not in fix


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ("Invalid account or account/partition combination specified", "account=NAME; yours: sacc"),
        ("invalid partition specified: nowhere", "partition=NAME; there are: sinfo"),
        ("Invalid qos specification", "qos=NAME; yours: sacctmgr"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "walltime=HH:MM:SS"),
        ("Node count specification invalid", "nodes, gpus_per_node"),
        ("Requested node configuration is not available", "nodes, gpus_per_node"),
        ("More processors requested than permitted", "nodes, gpus_per_node"),
        ("Job violates accounting/QOS policy (job submit limit)", "your limits: sacctmgr"),
        ("PENDING (AssocGrpNodeLimit)", "your limits: sacctmgr"),
        ("PENDING (JobHeldUser)", "facilities.slurm.options may hold it"),
        ("something new", "dry_run=true"),
    ],
)
def test_refusals(tmp_path: Path, words: str, fix: str) -> None:
    """Protects the user from guessing which field a refusal is about."""
    refused = UserError(REFUSED.format(words))
    finding = sick(tmp_path, scheduler={"error": refused})["account and limits"]
    assert finding.status == "fail"
    assert finding.observed.endswith(words)
    assert fix in finding.fix
    assert "{" not in finding.fix


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ("qsub: Unknown queue", "facilities.aurora.partition=NAME (the queue); there are: qst"),
        ("qsub: Queue is not enabled", "facilities.aurora.partition=NAME"),
        ("qsub: Job violates queue and/or server resource limits", "nodes, walltime or another"),
        ("qsub: would exceed queue prod's per-user limit", "nodes, walltime or another"),
        ("qsub: Unknown resource Resource_List.filesystem", "chunk, options, nodes"),
        ("queued: Can Never Run: Insufficient amount of resource: ngpus", "pbsnodes -a"),
    ],
)
def test_refusals_of_pbs(words: str, fix: str) -> None:
    """Protects PBS users from advice in Slurm's words."""
    assert fix in mend_refusal("aurora", FacilityConfig("pbs"), words)


@pytest.mark.parametrize(
    ("answer", "fix"),
    [
        (Answer(127, "", "No such file or directory: '/x/python'"), "facilities.slurm.python="),
        (Answer(0, "3.9.18"), "Python 3.11 or newer"),
        (Answer(0, "3.12.1 torch peft"), "/x/python -m pip install 'flwr-hpc[train]'"),
    ],
)
def test_python_of_the_jobs(tmp_path: Path, answer: Answer, fix: str) -> None:
    """Protects from a job that cannot even begin."""
    says = {"/x/python": answer}
    findings = sick(tmp_path, "facilities.slurm.python=/x/python", outside={"says": says})
    assert findings["Python for jobs"].status == "fail"
    assert fix in findings["Python for jobs"].fix


def test_python_by_setup_lines_is_left_to_the_probe(tmp_path: Path) -> None:
    """Protects facilities whose Python comes by a module on the compute nodes."""
    own = ("facilities.slurm.python=python3", "facilities.slurm.setup=['module load x']")
    assert sick(tmp_path, *own)["Python for jobs"].status == "skipped"


def test_containers(tmp_path: Path) -> None:
    """Protects from an image that is not there; the runtime may be on compute nodes alone."""
    image = tmp_path / "x.sif"
    setting = f"facilities.slurm.container={image}"
    finding = sick(tmp_path, setting)["Python for jobs"]
    assert (finding.status, finding.observed) == ("fail", f"there is no image {image}")
    image.touch()
    assert sick(tmp_path, setting)["Python for jobs"].status == "pass"
    finding = sick(tmp_path, setting, outside={"programs": ("sbatch",)})["Python for jobs"]
    assert finding.status == "warn"
    assert "module load apptainer" in finding.fix


def test_packages_and_loopback(tmp_path: Path) -> None:
    """Protects what runs on the login node itself."""
    finding = sick(tmp_path, outside={"missing": ("psutil",)})["packages here"]
    assert (finding.status, finding.observed) == ("fail", "missing: psutil")
    finding = sick(tmp_path, outside={"lonely": "refused"})["loopback"]
    assert finding.status == "fail"


def test_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects from a folder that cannot be written, or that compute nodes do not see."""
    finding = sick(tmp_path, outside={"mounted": ("/dev/sda1", "ext4")})["working folder"]
    assert finding.status == "warn"
    assert "facilities.slurm.workdir=" in finding.fix

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    findings = sick(tmp_path)
    assert "Permission denied" in findings["working folder"].observed
    assert findings["free space"].status == "skipped"


def test_shared_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects from a working folder beside the file systems that the facility's file names."""
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    monkeypatch.delenv("UNSET", raising=False)
    for roots, status in (("[/gpfs,$SCRATCH]", "pass"), ("[$UNSET]", "pass"), ("[/gpfs]", "warn")):
        finding = sick(tmp_path, f"facilities.slurm.shared_roots={roots}")["working folder"]
        assert finding.status == status, roots
    assert "/gpfs" in finding.observed


def test_a_path_containers_cannot_take(tmp_path: Path) -> None:
    """Protects from a bind of half a path."""
    here = a_login(tmp_path, "facilities.slurm.container=x.sif")
    odd = replace(here, root=tmp_path / "a:b")
    assert "':'" in found(odd)["working folder"].observed


def test_space(tmp_path: Path) -> None:
    """Protects from a disk that fills up in the third round."""
    assert sick(tmp_path, outside={"space": (10**8, -1)})["free space"].status == "fail"
    assert "inodes" in sick(tmp_path, outside={"space": (10**13, 9)})["free space"].observed
    assert sick(tmp_path, outside={"space": (10**13, -1)})["free space"].status == "pass"


LFS = "/scratch/me 900000 0 1000000 - 5000 0 1000000 -\n"


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (LFS, "fail"),  # 102 MB left
        (LFS.replace("1000000 - 5", "9000000 - 5"), "pass"),
        (LFS.replace("900000", "2000000*"), "fail"),
        (LFS.replace("1000000 - 5000 0 1000000", "0 - 5000 0 6000"), "fail"),  # 1000 files left
        ("/scratch/a/very/long/path\n 9 0 0 - 5 0 0 -\n", "pass"),
        ("no quotas", "skipped"),
    ],
)
def test_quota(tmp_path: Path, said: str, status: str) -> None:
    """Protects from a quota that is smaller than the disk; formats of lfs."""
    outside = {
        "mounted": ("mds@tcp:/scratch", "lustre"),
        "programs": (*FakeOutside().programs, "lfs"),
        "says": {"lfs": Answer(0, said)},
    }
    assert sick(tmp_path, outside=outside)["quota"].status == status


# What Lustre prints without -q: as in the pages of two centres, the National Institute of Genetics
# ("Change Storage Capacity") and OzSTAR ("Lustre"), where a part of the file system did not answer.
NIG = """Disk quotas for usr your_account (uid 6000):
      Filesystem  kbytes   quota   limit   grace   files   quota   limit   grace
        /lustre7 982177580       0 1000000000       - 443208230       0       0       -
uid 6000 is using default file quota setting
"""
OZSTAR = """Disk quotas for usr username (uid 1000):
     Filesystem    kbytes    quota   limit   grace   files   quota   limit   grace
          /fred [1041408]  5242880 6291456       -     [0]       0       0       -
"""


@pytest.mark.parametrize(
    ("printed", "left"), [(NIG, (17822420 * 1024, None)), (OZSTAR, (4201472 * 1024, None))]
)
def test_quota_as_centres_print_it(printed: str, left: tuple[int | None, int | None]) -> None:
    """Protects from taking a limit for none: headings, remarks, and figures in brackets."""
    (row,) = files.usage(printed)
    assert files.quota_left(row) == left


def test_the_tightest_quota_counts(tmp_path: Path) -> None:
    """Protects projects: at many centres the folder's project has the quota, and nobody else."""
    here = a_login(tmp_path)
    roomy, tight = LFS.replace("1000000 - 5", "0 - 5"), LFS
    says = {"project": f" 4711 P {tmp_path}\n", "-u": roomy, "-g": "no quotas", "-p": tight}

    def ask(*command: str, timeout_s: float = 60.0) -> Answer:
        assert "-p" not in command or "4711" in command
        return Answer(0, next((text for word, text in says.items() if word in command), ""))

    outside: Any = here.outside
    outside.mounted, outside.ask = ("mds@tcp:/scratch", "lustre"), ask
    outside.programs = (*FakeOutside().programs, "lfs")
    quota = files.quota(here)
    assert (quota.status, quota.observed[:11]) == ("fail", "0.1 GB left")


def test_quota_of_another_file_system_is_not_ours(tmp_path: Path) -> None:
    """Protects from reading the home quota for the scratch folder."""
    rows = "Disk quotas for user me (uid 1):\n Filesystem blocks quota limit grace files quota "
    rows += "limit grace\nnas:/home 9 10 10 0 1 0 0 0\nnas:/x 9 90000000 0 0 1 0 0 0\n"
    outside = {"programs": (*FakeOutside().programs, "quota"), "says": {"quota": Answer(1, rows)}}
    assert sick(tmp_path, outside=outside)["quota"].observed == "92.2 GB left"


def test_need_follows_the_model(tmp_path: Path) -> None:
    """Protects the estimate: a 7B model needs hundreds of GB, an unknown one 5."""
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008}
    seven = ModelConfig(config=sizes | {"vocab_size": 32000})
    assert 6e9 < (files.parameters(seven) or 0) < 7.5e9
    gpt = {"n_embd": 4096, "n_layer": 32, "vocab_size": 32000}
    assert 6e9 < (files.parameters(ModelConfig(config=gpt)) or 0) < 9e9
    assert files.needed_bytes(seven) > 2.0e11
    assert files.needed_bytes(ModelConfig(path="org/name")) == 5 * 10**9
    (tmp_path / "model.safetensors").write_bytes(b"x" * 200)
    assert files.parameters(ModelConfig(path=str(tmp_path))) == 100


def test_model_and_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects from a job that finds nothing to train."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    paths = ["data=text", f"data.paths.slurm={tmp_path}/none/*.txt", "model.path=org/name"]
    findings = sick(tmp_path, *paths)
    assert "hf download org/name" in findings["model and tokenizer"].observed
    assert findings["data"].status == "fail"
    online = "facilities.slurm.internet=true"
    finding = sick(tmp_path, *paths, online, outside={"unreachable": "timed out"})
    assert "timed out" in finding["Hugging Face from here"].observed
    assert sick(tmp_path, *paths, online)["Hugging Face from here"].status == "pass"


def test_exchange_store(tmp_path: Path) -> None:
    """Protects from a store that fails at the first round's end; nothing is left in it."""
    assert sick(tmp_path)["exchange store"].status == "skipped"
    for url in (f"{tmp_path}/exchange", "memory://exchange"):
        assert sick(tmp_path, f"exchange.store={url}")["exchange store"].status == "pass"
    assert not list((tmp_path / "exchange").iterdir())
    for url in ("nonsense://x", "/proc/none"):
        finding = sick(tmp_path, f"exchange.store={url}")["exchange store"]
        assert finding.status == "fail"
        assert "exchange.store=URL" in finding.fix


def test_a_check_that_breaks_is_a_finding(tmp_path: Path) -> None:
    """Protects the other checks from one with a fault of its own."""

    def boom(program: str) -> str | None:
        raise ValueError("boom")

    findings = sick(tmp_path, outside={"which": boom})
    assert "ValueError: boom" in findings["scheduler commands"].observed
    assert findings["data"].status == "pass"


def test_jobs_on_this_machine(tmp_path: Path) -> None:
    """Protects local facilities from questions to a scheduler they do not have."""
    here = a_login(tmp_path, name="local_a")
    assert isinstance(here.scheduler, FakeScheduler)
    assert {f.status for f in login.run(here)} <= {"pass", "skipped"}


@pytest.mark.parametrize(
    ("seconds", "text"), [(40, "40 s"), (720, "12 min"), (10800, "3 h"), (400000, "5 days")]
)
def test_durations(seconds: float, text: str) -> None:
    """Protects readers from seconds by the thousand."""
    assert duration(seconds) == text
