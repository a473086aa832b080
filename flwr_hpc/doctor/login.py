"""Checks on a login node: the scheduler, Python, what the login node itself runs."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.config.schema import Config
from flwr_hpc.doctor.findings import Checks, Finding, failed, passed, skipped, warned
from flwr_hpc.doctor.outside import Outside
from flwr_hpc.errors import UserError
from flwr_hpc.schedulers.base import JobSpec, Scheduler, SchedulerUnavailableError
from flwr_hpc.schedulers.interpreter import probe
from flwr_hpc.schedulers.registry import rules_of
from flwr_hpc.schedulers.rules import Rules

LOGIN = "login node"
PACKAGES = ("flwr", "submitit", "hydra-core", "jinja2", "numpy", "psutil", "rich", "safetensors")
# What a rank imports, looked for without importing it.
RANK = ("submitit", "flwr", "torch", "transformers", "peft", "datasets")
AT_ONCE_S = 5.0
ACCEPTED = "account and limits"


@dataclass(frozen=True)
class Login:
    """What the checks of one facility look at."""

    name: str  # Of the facility
    config: Config
    root: Path  # Where a run's site would work
    scheduler: Scheduler
    spec: JobSpec  # The job that a run would submit
    outside: Outside

    @property
    def facility(self) -> FacilityConfig:
        return self.config.facilities[self.name]

    @property
    def local(self) -> bool:
        """Whether jobs run on this machine."""
        return self.facility.local

    @property
    def rules(self) -> Rules:
        return rules_of(self.facility)

    def set(self, field: str) -> str:
        """Return a field of the facility as it is set on the command line."""
        return f"facilities.{self.name}.{field}"


login: Checks[Login] = Checks(LOGIN)


@login("scheduler commands")
def commands(here: Login) -> Finding:
    """Look for the batch system's programs."""
    names = here.rules.programs
    missing = [name for name in names if not here.outside.which(name)]
    if missing:
        return failed(
            f"not found on this host: {' '.join(missing)}",
            f"run this on a login node of {here.name} (after its module, if its batch system is "
            f"one), or for this machine: {here.set('scheduler')}=local",
        )
    return passed(" ".join(names) or "none needed: jobs run on this machine")


@login("scheduler answers", needs=["scheduler commands"])
def answers(here: Login) -> Finding:
    """Ask for a job that is not there."""
    try:
        here.scheduler.find(here.spec)
    except SchedulerUnavailableError as exc:
        return failed(str(exc), _who_to_ask(here))
    return passed("yes")


@login("accounting", needs=["scheduler answers"])
def accounting(here: Login) -> Finding:
    """See whether ended jobs are remembered."""
    accounting = here.rules.accounting
    if accounting is None:
        return skipped(f"{here.facility.scheduler} is not asked for it")
    program = accounting.command[0]
    if not here.outside.which(program):
        return warned(f"{program} was not found on this host", accounting.without)
    answer = here.outside.ask(*accounting.command)
    absent = accounting.none in answer.err if accounting.none else answer.code != 0
    if not absent:
        return passed(f"ended jobs are remembered ({program})")
    said = answer.err.strip() or f"{program} ended with code {answer.code}"
    return warned(said, accounting.without)


@login(ACCEPTED, needs=["scheduler answers"])
def accepted(here: Login) -> Finding:
    """Let the scheduler judge the job that a run would submit; nothing is submitted."""
    if not here.rules.trial:
        title = here.rules.title
        return skipped(f"{title} judges a job only when it is submitted: see the probe job")
    try:
        wait_s = here.scheduler.estimate(here.spec)
    except UserError as exc:
        words = refusal(exc)
        return failed(words, mend_refusal(here.name, here.facility, words))
    except SchedulerUnavailableError as exc:
        return failed(str(exc), _who_to_ask(here))
    if here.local:
        return skipped("there is no queue")
    f = here.facility
    nodes = "1 node" if f.nodes == 1 else f"{f.nodes} nodes"
    start = "" if wait_s is None else f"; would start {_soon(wait_s)} if submitted now"
    return passed(f"{nodes} for {f.walltime} accepted{start}")


def _soon(seconds: float) -> str:
    return "at once" if seconds < AT_ONCE_S else f"in {duration(seconds)}"


def refusal(exc: UserError) -> str:
    """Return what the scheduler said, without the general advice that follows it."""
    return str(exc).split("\nCheck ")[0]


def duration(seconds: float) -> str:
    """Return seconds, minutes, hours or days, whichever reads best."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def mend_refusal(name: str, f: FacilityConfig, words: str) -> str:
    """Return what to change about a job that was refused with these words."""
    said = next((line for line in words.lower().splitlines() if "error" in line), words.lower())
    for pattern, fix in rules_of(f).refusals.items():
        if re.search(pattern, said):
            return f"facilities.{name}.{fix}"
    return (
        f"look at the script (python -m flwr_hpc.run +facility={name} dry_run=true) beside "
        "what the centre's pages ask for"
    )


def _who_to_ask(here: Login) -> str:
    other = here.rules.other_cluster
    more = f". With several clusters on one host: {here.set(other)}" if other else ""
    return f"try again in some minutes; if it stays so, ask the centre{more}"


@login("Python for jobs")
def python(here: Login) -> Finding:
    """Look for the interpreter or container that the ranks run in."""
    f = here.facility
    if f.container:
        return _container(here)
    path = f.python or sys.executable
    if f.python and "/" not in f.python and f.setup:
        return skipped(f"{path}, found after the job's setup lines: see the probe job")
    answer = here.outside.ask(path, "-c", probe(RANK))
    if answer.code:
        return failed(
            f"{path}: {_last_line(answer.err)}",
            f"{here.set('python')}=/path/to/venv/bin/python, with flwr-hpc[train] in it",
        )
    version, *missing = answer.out.split()
    if tuple(map(int, version.split("."))) < (3, 11):
        return failed(f"{path} is Python {version}", "an environment of Python 3.11 or newer")
    if missing and not f.setup:
        return failed(
            f"{path} lacks {', '.join(missing)}",
            f"{path} -m pip install 'flwr-hpc[train]', or {here.set('python')}=/path/to/python",
        )
    return passed(f"{path}, Python {version}")


def _container(here: Login) -> Finding:
    f = here.facility
    image = str(f.container)
    if "://" not in image and not Path(image).expanduser().exists():
        return failed(f"there is no image {image}", f"{here.set('container')}=/path/to/image.sif")
    if not here.outside.which(f.container_runtime):
        return warned(
            f"{image}; {f.container_runtime} was not found on this host",
            "well if compute nodes have it (see the probe job), or by a module: "
            f"'{here.set('setup')}=[module load {f.container_runtime}]'",
        )
    return passed(f"{image} in {f.container_runtime}")


@login("packages here")
def packages(here: Login) -> Finding:
    """Look for what the login node's processes import."""
    found = here.outside.versions(PACKAGES)
    missing = [name for name in PACKAGES if name not in found]
    if missing:
        return failed(f"missing: {', '.join(missing)}", "pip install flwr-hpc")
    return passed(f"flwr {found['flwr']}, submitit {found['submitit']}")


@login("loopback")
def loopback(here: Login) -> Finding:
    """Try what SuperLink, ServerApp and the sites need of this host."""
    if fault := here.outside.loopback():
        return failed(f"127.0.0.1: {fault}", "ask the centre whether login nodes filter loopback")
    return passed("127.0.0.1")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no answer"])[-1]
