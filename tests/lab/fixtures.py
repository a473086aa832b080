"""What tests get of the lab: clusters of their own, made when first needed, used again."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterator, Sequence

import pytest

from .centres import CENTRES, Centres, Site, missing_tun
from .cluster import Cluster
from .host import LabError, missing
from .plan import Shape

__all__ = [
    *("FAULTY", "Lab", "REQUIRE"),
    *("centres", "lab", "need_hosts", "slurm", "slurm_conf", "three_centres"),
]

_NUMBERS = itertools.count()
REQUIRE, REQUIRE_HOSTS = "FLWR_HPC_REQUIRE_SLURM", "FLWR_HPC_REQUIRE_HOSTS"
# For tests of faults: notices a dead node in half a minute, but no healthy one of a busy machine.
FAULTY = Shape(nodes=2, cpus=2, slurmd_timeout_s=20)


class Lab:
    """The clusters of one test process."""

    def __init__(self) -> None:
        self._clusters: dict[tuple[Shape, int], Cluster] = {}
        self._made = 0

    def cluster(self, shape: Shape = FAULTY, which: int = 0) -> Cluster:
        """Return an empty, healthy cluster; `which` tells several of one shape apart."""
        cluster = self._clusters.get((shape, which))
        if cluster is not None:
            try:
                cluster.reset()
            except LabError as exc:  # a test left it in ruins: make another
                warnings.warn(f"a cluster was made anew: {exc}", stacklevel=2)
                self._clusters.pop((shape, which)).down()
                cluster = None
        if cluster is None:
            name = f"t{os.getpid()}_{self._made}"
            self._made += 1
            cluster = self._clusters[shape, which] = Cluster.up(name, shape)
        return cluster

    def down(self) -> None:
        for cluster in self._clusters.values():
            cluster.down()
        self._clusters.clear()


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Clusters; skips the test, or fails it where they are required, when none can be made."""
    _need(missing())
    lab = Lab()
    yield lab
    lab.down()


@pytest.fixture
def centres() -> Iterator[Centres]:
    """Return a server and two centres that share nothing; skips where there can be none."""
    with _connected(CENTRES) as centres:
        yield centres


@pytest.fixture
def three_centres() -> Iterator[Centres]:
    """As `centres`, with a third one that has no batch system either."""
    with _connected((*CENTRES, Site("centre_c", "carl"))) as centres:
        yield centres


def _connected(sites: Sequence[Site]) -> Centres:
    need_hosts()
    return Centres.up(f"w{os.getpid()}_{next(_NUMBERS)}", sites)


def need_hosts() -> None:
    """Skip the test, or fail it where they are required, when no hosts can be made.

    A container without TUN devices may still be one for Slurm: they are required by themselves.
    """
    _need(missing())
    _need(missing_tun(), "hosts that share nothing", REQUIRE_HOSTS)


def _need(reason: str, what: str = "Slurm", required: str = REQUIRE) -> None:
    if reason and os.environ.get(required) == "1":
        pytest.fail(f"{required}=1, but {reason}")
    if reason:
        pytest.skip(f"no {what}: {reason}")


@pytest.fixture
def slurm(lab: Lab) -> Cluster:
    """Return an empty cluster of two nodes that a test may break."""
    return lab.cluster()


@pytest.fixture
def slurm_conf(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``SLURM_CONF`` name a cluster: the one it names already, else one of the lab's."""
    if not os.environ.get("SLURM_CONF"):
        monkeypatch.setenv("SLURM_CONF", str(request.getfixturevalue("slurm").conf))
