"""What a facility on this host may ask for; fields for a batch system say nothing here."""

from __future__ import annotations

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.errors import UserError
from flwr_hpc.schedulers.rules import Rules


def check(key: str, f: FacilityConfig) -> None:
    """Check the number of nodes."""
    if f.nodes != 1:
        raise UserError(f"{key}.nodes={f.nodes}: a local facility has one node")


RULES = Rules(title="This host", check=check)
