"""What the tests of the doctor share: a machine, a scheduler, a clock that obey the test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr_hpc.config.compose import compose_config
from flwr_hpc.doctor.login import Login
from flwr_hpc.doctor.outside import Answer, Outside
from flwr_hpc.schedulers.base import JobInfo, JobSpec, SchedulerUnavailableError
from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.server.sites import site_settings
from flwr_hpc.site.launcher import job_spec

GOOD = ("sbatch", "squeue", "scancel", "srun", "sacct", "apptainer")


class FakeOutside(Outside):
    """A login node that is well."""

    def __init__(self) -> None:
        self.programs: tuple[str, ...] = GOOD
        self.says: dict[str, Answer] = {}
        self.space = (10**12, 10**9)
        self.mounted = ("nas:/x", "nfs4")
        self.unreachable = ""
        self.lonely = ""
        self.installed = {"flwr": "1.41.0", "submitit": "1.5.4"}
        self.missing: tuple[str, ...] = ()

    def ask(self, *command: str, timeout_s: float = 60.0) -> Answer:
        return self.says.get(command[0], Answer(0, "3.12.1"))

    def which(self, program: str) -> str | None:
        return program if program in self.programs else None

    def free(self, path: Path) -> tuple[int, int]:
        return self.space

    def mount(self, path: Path) -> tuple[str, str]:
        return self.mounted

    def reach(self, url: str) -> str:
        return self.unreachable

    def loopback(self) -> str:
        return self.lonely

    def versions(self, packages: Sequence[str]) -> dict[str, str]:
        names = [p for p in packages if p not in self.missing]
        return {p: self.installed.get(p, "1.0") for p in names}


@dataclass
class FakeScheduler:
    """Takes one job and tells of it what a test says."""

    poll_s: float = 30.0
    error: Exception | None = None
    wait_s: float | None = 720.0
    info: JobInfo | None = None
    on_submit: Callable[[JobSpec], Any] = lambda spec: None
    submitted: list[JobSpec] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    asked: int = 0
    deaf: bool = False

    def submit(self, spec: JobSpec) -> dict[str, Any]:
        if self.error:
            raise self.error
        self.submitted.append(spec)
        self.on_submit(spec)
        return {"id": "7", "name": spec.name, "folder": str(spec.folder), "submitted_s": 0.0}

    def find(self, spec: JobSpec) -> dict[str, Any] | None:
        if isinstance(self.error, SchedulerUnavailableError):
            raise self.error
        return {"id": "7", "name": spec.name, "folder": ""} if spec in self.submitted else None

    def infos(self, jobs: Sequence[dict[str, Any]]) -> dict[str, JobInfo]:
        self.asked += 1
        name = jobs[0]["name"]
        return {name: self.info or JobInfo("7", name, "pending", reason="PENDING (Priority)")}

    def cancel(self, job: dict[str, Any]) -> None:
        if self.deaf:
            raise SchedulerUnavailableError("scancel: no answer")
        self.cancelled.append(job["id"])

    def estimate(self, spec: JobSpec) -> float | None:
        if self.error:
            raise self.error
        return self.wait_s

    def script(self, spec: JobSpec) -> str:
        return "#!/bin/bash\n"


def a_login(tmp_path: Path, *overrides: str, name: str = "slurm") -> Login:
    """Return a login node where everything is well."""
    given = ["facilities.slurm.account=p"] if name == "slurm" else []
    config = compose_config([f"+facility={name}", *given, *overrides])
    run = RunDir(tmp_path / "run")
    spec = job_spec(site_settings(run, config, name, "key"))
    return Login(name, config, tmp_path / "run" / "site", FakeScheduler(), spec, FakeOutside())
