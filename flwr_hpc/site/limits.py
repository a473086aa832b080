"""What a site refuses, because its own centre set a limit: words for the server, and its people."""

from __future__ import annotations

from flwr_hpc.config.facility import FacilityConfig, walltime_s
from flwr_hpc.config.schema import LimitsConfig
from flwr_hpc.errors import UserError
from flwr_hpc.protocol import Order


class LimitReached(UserError):
    """The site does no more, or not this; trying again will not change that."""


def check_order(limits: LimitsConfig, order: Order) -> None:
    """Refuse an order of more steps than one may have here."""
    if limits.steps is not None and order.kind == "train" and order.steps > limits.steps:
        raise LimitReached(
            f"an order of {order.steps} steps is more than the site allows "
            f"(site.limits.steps={limits.steps})"
        )


def check_spending(
    limits: LimitsConfig, facility: FacilityConfig, ran_s: float, running: int
) -> None:
    """Refuse a further job if with it the site could spend more than it may.

    Parameters
    ----------
    limits : LimitsConfig
    facility : FacilityConfig
    ran_s : float
        How long the jobs that have ended ran, together.
    running : int
        How many have not: each may take its whole walltime.
    """
    if limits.node_hours is None:
        return
    each_s = walltime_s(facility.walltime)
    spent = ran_s * facility.nodes / 3600
    further = each_s * facility.nodes / 3600
    if spent + (running + 1) * further > limits.node_hours:
        raise LimitReached(
            f"the site's jobs have spent {spent:.2f} node-hours, and a further one may take "
            f"{further:.2f}: more than it allows (site.limits.node_hours={limits.node_hours:g})"
        )
