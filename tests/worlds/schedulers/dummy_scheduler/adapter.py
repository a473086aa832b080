"""The dummy's commands, what they answer, and the job script."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from worlds.schedulers.dummy_scheduler.rules import RULES

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.schedulers.base import Failure, JobInfo, JobSpec, JobState
from flwr_hpc.schedulers.command import Answer, CommandScheduler
from flwr_hpc.schedulers.script import MPI_RANK, common_fields, mpi_env, rank_command, render

HERE = Path(__file__).parent
PROGRAM = [sys.executable, str(HERE / "program.py")]
AWAY = 3
STATES: dict[str, JobState] = {"at work": "running"}


class DummyScheduler(CommandScheduler):
    rules = RULES

    def script(self, spec: JobSpec) -> str:
        common, f = common_fields(spec), spec.facility
        ranks = str(f.ranks_per_node)
        fields = {
            "home": f.env["DUMMY_HOME"],
            "env": common["env"] | mpi_env(f),
            "launch": shlex.join([*PROGRAM, "ranks", ranks, *f.launcher_args]),
            "command": rank_command(spec, MPI_RANK),
        }
        return render("dummy.sh.j2", common | fields, beside=str(HERE))

    def submit_command(self, script: Path, folder: Path) -> list[str]:
        return [*PROGRAM, "submit", self.facility.env["DUMMY_HOME"], str(script)]

    def parse_submit(self, out: str) -> str:
        return out.strip()

    def status_command(self, jobs: Sequence[dict[str, Any]]) -> list[str]:
        return [*PROGRAM, "list", self.facility.env["DUMMY_HOME"]]

    def find_command(self, name: str) -> list[str]:
        return self.status_command([])

    def parse_status(self, answer: Answer) -> list[JobInfo]:
        return [_info(**job) for job in json.loads(answer.out)]

    def cancel_command(self, job: dict[str, Any]) -> list[str]:
        return [*PROGRAM, "end", self.facility.env["DUMMY_HOME"], job["id"]]

    def classify(self, answer: Answer) -> Failure:
        return "no answer" if answer.code == AWAY else "refused"


def make_scheduler(facility: FacilityConfig) -> DummyScheduler:
    return DummyScheduler(facility)


def _info(id: str, name: str, word: str, began: float, ended: float | None) -> JobInfo:
    state = STATES.get(word, "ended")
    return JobInfo(
        id, name, state, submitted_s=began, started_s=began, ended_s=ended, nodes=1,
        outcome=word if state == "ended" else None, reason=word,
    )  # fmt: skip
