"""All checks of some facilities: first those on this host, then the probe jobs, side by side."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from flwr_hpc.clock import Clock
from flwr_hpc.config.schema import Config
from flwr_hpc.doctor import files  # noqa: F401 (it adds its checks)
from flwr_hpc.doctor.files import WORKDIR
from flwr_hpc.doctor.findings import Finding
from flwr_hpc.doctor.job import Probe, probe_facility
from flwr_hpc.doctor.login import ACCEPTED, Login, login
from flwr_hpc.doctor.nodes import BANDWIDTHS, Nodes, nodes
from flwr_hpc.doctor.outside import Outside, hub_url, versions
from flwr_hpc.doctor.probe import PACKAGES
from flwr_hpc.errors import UserError
from flwr_hpc.plan.bandwidth import MeasuredBandwidths
from flwr_hpc.schedulers.registry import make_scheduler, rules_of
from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.server.sites import site_settings
from flwr_hpc.site.launcher import job_spec

GATE = ("scheduler commands", "scheduler answers", ACCEPTED, WORKDIR, "Python for jobs")
PAUSE_S = 0.25
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asks this process to end; its jobs have to end first."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@dataclass
class FacilityExam:
    """One facility: what there is to look at and what was found."""

    here: Login
    probe: Probe
    findings: list[Finding] = field(default_factory=list)

    def look_here(self) -> list[Finding]:
        """Make the checks on this host."""
        self.findings = login.run(self.here)
        return self.findings

    @property
    def probeable(self) -> bool:
        """Whether nothing was found that would keep the probe job from running."""
        return not any(f.name in GATE and f.status == "fail" for f in self.findings)

    @property
    def there(self) -> Nodes:
        """What the probe job brought back."""
        return Nodes(self.here.name, self.probe.result, versions(PACKAGES))

    def look_there(self) -> list[Finding]:
        """Judge what the probe job brought back."""
        found = nodes.run(self.there)
        self.findings = self.findings + found
        return found

    @property
    def bandwidths(self) -> MeasuredBandwidths | None:
        """What was measured and can be relied upon."""
        fine = any(f.name == BANDWIDTHS and f.status in ("pass", "warn") for f in self.findings)
        return self.there.bandwidths if fine else None


def patient(
    config: Config,
    name: str,
    clock: Clock,
    queue_s: float,
    most_nodes: int,
    bandwidth: bool = False,
) -> FacilityExam:
    """Gather what is looked at for one facility; touches nothing."""
    facility = config.facilities[name]
    token = secrets.token_hex(3)
    scheduler = make_scheduler(facility)
    run = RunDir(Path(config.run_dir or f"runs/doctor-{token}").expanduser().absolute())
    root = run.site_root(config, name, f"doctor-{token}").absolute()
    spec = job_spec(site_settings(run, config, name, f"doctor-{token}"))
    env = rules_of(facility).environment(facility, os.environ)
    here = Login(name, config, root, scheduler, spec, Outside(env))
    urls = (hub_url({**os.environ, **facility.env}),) if facility.internet else ()
    wanted = probe_facility(facility, most_nodes, bandwidth)
    if bandwidth and wanted.nodes * wanted.ranks_per_node == 1:
        raise UserError(
            f"--bandwidth measures ranks with each other, and the job at {name} has one. Give it "
            f"more, as in: facilities.{name}.nodes=2"
        )
    own = root.with_name(f"doctor-{token}-{name}")
    probe = Probe(name, wanted, own, scheduler, clock, queue_s, urls, bandwidth)
    return FacilityExam(here, probe)


@contextmanager
def probing(patients: Sequence[FacilityExam]) -> Iterator[Sequence[FacilityExam]]:
    """Submit the probe jobs; they are ended on every way out, signals included."""
    before = {s: signal.signal(s, _stop) for s in SIGNALS}
    try:
        for one in patients:
            one.probe.start()
        yield patients
    finally:
        _ignore()
        for one in patients:
            one.probe.close()
        for s, handler in before.items():
            signal.signal(s, handler)


def settled(patients: Sequence[FacilityExam], clock: Clock, tell: Callable[[str], Any]) -> None:
    """Wait until every probe job has brought back what it will."""
    waiting = list(patients)
    while waiting := [one for one in waiting if not one.probe.poll()]:
        tell("; ".join(one.probe.state for one in waiting))
        clock.sleep(PAUSE_S)


def _ignore() -> None:
    for s in SIGNALS:
        signal.signal(s, signal.SIG_IGN)


def _stop(signum: int, frame: FrameType | None) -> None:
    _ignore()  # impatience must not leave a job behind
    raise Stopped(signum)
