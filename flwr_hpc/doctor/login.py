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

LOGIN = "login node"
COMMANDS = {
    "slurm": ("sbatch", "squeue", "scancel", "srun"),
    "pbs": ("qsub", "qstat", "qdel"),
    "local": (),
}
PACKAGES = ("flwr", "submitit", "hydra-core", "jinja2", "numpy", "psutil", "rich", "safetensors")
# What a rank imports, looked for without importing it.
RANK = ("submitit", "flwr", "torch", "transformers", "peft", "datasets")
PYTHON = (
    "import sys, importlib.util as u; print('%d.%d.%d' % sys.version_info[:3], "
    f"*[m for m in {RANK} if u.find_spec(m) is None])"
)
AT_ONCE_S = 5.0
ACCEPTED = "account and limits"

# What schedulers say of a job they refuse, and what then to look at.
REFUSALS = {
    r"held": "sbatch may hold it; if not, somebody at the centre does: ask there",
    r"policy|assoc": "nodes, walltime, or another account or qos; your limits: {accounts}",
    r"account": "account=NAME; yours: {accounts}",
    r"partition|queue": "partition=NAME; there are: {partitions}",
    r"qos": "qos=NAME; yours: {accounts}",
    r"time ?limit|walltime": "walltime=HH:MM:SS; limits: {partitions}",
    r"reservation": "reservation=NAME, or null",
    r"node|gres|cpu|processor|memory": "nodes, gpus_per_node, gpu_request, gpu_type or "
    "cpus_per_rank; what there is: {nodes}",
}
LOOK_UP = {
    "slurm": {
        "accounts": "sacctmgr show assoc user=$USER format=account%30,partition,qos%60",
        "partitions": "sinfo -o '%P %l %D'",
        "nodes": "sinfo -o '%P %D %c %m %G'",
    },
    "pbs": {"accounts": "qstat -Qf", "partitions": "qstat -Q", "nodes": "pbsnodes -a"},
}


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
        return self.facility.scheduler == "local"

    def set(self, field: str) -> str:
        """Return a field of the facility as it is set on the command line."""
        return f"facilities.{self.name}.{field}"


login: Checks[Login] = Checks(LOGIN)


@login("scheduler commands")
def commands(here: Login) -> Finding:
    """Look for the batch system's programs."""
    kind = here.facility.scheduler
    names = COMMANDS[kind]
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
    if here.facility.scheduler != "slurm":
        return skipped(f"{here.facility.scheduler} is not asked for it")
    if not here.outside.which("sacct"):
        said = "sacct was not found on this host"
    else:
        answer = here.outside.ask("sacct", "-X", "-n", "-o", "JobID", "-S", "now")
        if answer.code == 0:
            return passed("sacct answers")
        said = answer.err.strip() or f"sacct ended with code {answer.code}"
    return warned(
        said,
        "runs go on without; what slurmctld has forgotten of a job (after its MinJobAge) is lost. "
        "The centre can enable accounting",
    )


@login(ACCEPTED, needs=["scheduler answers"])
def accepted(here: Login) -> Finding:
    """Let the scheduler judge the job that a run would submit; nothing is submitted."""
    if here.facility.scheduler == "pbs":
        return skipped("PBS judges a job only when it is submitted: see the probe job")
    try:
        wait_s = here.scheduler.estimate(here.spec)
    except UserError as exc:
        words = refusal(exc)
        return failed(words, mend_refusal(here.name, here.facility.scheduler, words))
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


def mend_refusal(facility: str, scheduler: str, words: str) -> str:
    """Return what to change about a job that was refused with these words."""
    look_up = LOOK_UP.get(scheduler, LOOK_UP["slurm"])
    said = next((line for line in words.lower().splitlines() if "error" in line), words.lower())
    for pattern, fix in REFUSALS.items():
        if re.search(pattern, said):
            return f"facilities.{facility}.{fix.format(**look_up)}"
    return (
        f"look at the script (python -m flwr_hpc.run +facility={facility} dry_run=true) beside "
        "what the centre's pages ask for"
    )


def _who_to_ask(here: Login) -> str:
    return (
        "try again in some minutes; if it stays so, ask the centre. With several clusters on one "
        f"host: {here.set('env.SLURM_CONF')}=/path/to/slurm.conf"
    )


@login("Python for jobs")
def python(here: Login) -> Finding:
    """Look for the interpreter or container that the ranks run in."""
    f = here.facility
    if f.container:
        return _container(here)
    path = f.python or sys.executable
    if f.python and "/" not in f.python and f.setup:
        return skipped(f"{path}, found after the job's setup lines: see the probe job")
    answer = here.outside.ask(path, "-c", PYTHON)
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
