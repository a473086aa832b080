"""Whose account a job is charged to, on a real slurmdbd and on a cluster without one."""

from __future__ import annotations

import pytest
from lab.cluster import Cluster
from lab.fixtures import Lab
from lab.plan import Shape

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.errors import UserError
from flwr_hpc.schedulers.accounts import find_account

pytestmark = pytest.mark.slurm


@pytest.fixture(autouse=True)
def _nobody_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SBATCH_ACCOUNT", "SLURM_ACCOUNT"):
        monkeypatch.delenv(name, raising=False)


def _find(cluster: Cluster, user: str) -> str:
    facility = FacilityConfig(env={"SLURM_CONF": str(cluster.conf)})
    return str(find_account("here", facility, user))


def test_the_accounts_of_a_user(lab: Lab) -> None:
    """Protects users of real clusters, with one account, several or none."""
    cluster = lab.cluster(Shape(nodes=1, cpus=1, accounting=True))
    assert _find(cluster, "nobody") == "others (your only one, says sacctmgr)"
    assert _find(cluster, "daemon") == "none (sacctmgr shows none of yours)"
    with pytest.raises(UserError, match="several accounts: lab, capped, root"):
        _find(cluster, "root")
    cluster.kill("slurmdbd")
    with pytest.raises(UserError, match=r"must be given.*Connection refused"):
        _find(cluster, "nobody")


def test_a_cluster_without_accounting(lab: Lab) -> None:
    """Protects clusters without slurmdbd from a question that has no answer."""
    cluster = lab.cluster(Shape(nodes=1, cpus=1, accounting=False))
    assert _find(cluster, "nobody") == "none (the cluster keeps none, says sacctmgr)"
