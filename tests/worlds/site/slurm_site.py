"""One site of a run on a cluster of the lab, with workers that need no torch."""

from __future__ import annotations

import contextlib
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.cluster import Cluster
from worlds import worker as fake_worker
from worlds.jobs import TESTS, until

from flwr_hpc.clock import SystemClock
from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.config.schema import AllocationConfig
from flwr_hpc.protocol import Order, Status
from flwr_hpc.schedulers.slurm.adapter import SlurmScheduler
from flwr_hpc.site.manager import AllocationManager
from flwr_hpc.spool import Spool

__all__ = ["SlurmSite"]

FINAL = ("done", "failed")


class SlurmSite:
    """What the server would do at one facility; every message is a process of its own.

    Parameters
    ----------
    cluster : Cluster
    folder : Path
    limits : AllocationConfig or None
    lost_after_s : float
        See `SlurmScheduler`.
    **fields
        Of `FacilityConfig`.
    """

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        limits: AllocationConfig | None = None,
        lost_after_s: float = 60.0,
        **fields: Any,
    ) -> None:
        self.cluster, self.spool = cluster, Spool(folder / "site")
        self.key, self.limits = uuid.uuid4().hex[:8], limits or AllocationConfig()
        self.lost_after_s = lost_after_s
        env = {"SLURM_CONF": str(cluster.conf), "PYTHONPATH": str(TESTS)}
        default = {"walltime": "00:10:00", "poll_s": 0.5, "env": env, "account": "lab"}
        self.facility = FacilityConfig(**(default | fields))

    def site(self) -> AllocationManager:
        """Return the site as a new process would see it."""
        scheduler = SlurmScheduler(self.facility)
        scheduler.lost_after_s = self.lost_after_s
        return AllocationManager(
            self.spool, self.key, "real", self.facility, self.limits, scheduler, {}, SystemClock(),
            entry=fake_worker.run,
        )  # fmt: skip

    def submit(self, seconds: float = 1.0, sequence: int = 0, gate: int = -1) -> str:
        """Submit an order that takes so long, and waits at the step `gate`; returns its id."""
        options = {"seconds": seconds, "gate": gate}
        order = Order(self.key, "real", sequence, "train", steps=5, options=options)
        self.site().submit(order, None)
        return order.id

    def collect(self, order: str) -> Status:
        return self.site().collect(order)

    def open_gate(self) -> None:
        """Let orders that wait at their gate go on."""
        (self.spool.root / fake_worker.GATE).touch()

    def result(self, order: str) -> Status:
        """Wait for an order's end, as long as its work moves."""
        site = self.site()

        def look() -> Status | None:
            status = site.wait(lambda: site.collect(order), 5.0, FINAL)
            return status if status.state in FINAL else None

        status = until(look, self.spool.root, explain=self._log)
        assert status is not None
        return status

    def until_step(self, order: str, step: int = 5) -> None:
        """Wait until a worker is in the middle of an order, asking as the server does."""
        self.until(lambda: self.collect(order).step >= step)

    def until(self, what: Callable[[], object]) -> None:
        """Wait for something as long as the site's work moves."""
        until(what, self.spool.root, explain=self._log)

    def step(self, order: str) -> int:
        return int(self.spool.order(order).progress().get("step", 0))

    def job(self) -> str:
        """Return the id of the newest allocation's job."""
        job = self.spool.allocations()[-1].job()
        assert job is not None
        return str(job["id"])

    def node(self) -> str:
        """Return the node that the newest allocation's job runs on."""
        return self.cluster.slurm("squeue", "-h", "-j", self.job(), "-o", "%N").strip()

    def end(self) -> None:
        """Release, and check that no job is left and none was submitted twice."""
        self.site().release()
        self.until(lambda: not self.site().live_jobs())
        ours = [line for line in self._squeue() if line[0].startswith(self.key)]
        assert not [line for line in ours if line[1] in ("RUNNING", "PENDING", "COMPLETING")]
        assert max(Counter(name for name, _ in ours).values(), default=0) <= 1, ours

    def allocations(self) -> list[str]:
        return [alloc.name for alloc in self.spool.allocations()]

    def trained(self) -> list[str]:
        """Return the orders that were finished, as often as they were."""
        with contextlib.suppress(FileNotFoundError):
            return [
                line.split()[0]
                for line in (self.spool.root / "trained.log").read_text().splitlines()
            ]
        return []

    def _log(self) -> str:
        log = self.cluster.folder / "log" / "slurmctld.log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-30:])

    def _squeue(self) -> list[list[str]]:
        listed = self.cluster.slurm("squeue", "-h", "-a", "--states=all", "-o", "%j %T")
        return [line.split() for line in listed.splitlines()]
