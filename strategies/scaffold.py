"""SCAFFOLD: control variates keep the sites from drifting apart within an order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from flwr_hpc.protocol import CORRECTION, MEAN_GRADIENT
from strategies.base.fields import StoredTensors
from strategies.engine.state import Plan, SiteResult, SiteState
from strategies.fedavg import FedAvg
from strategies.parts import rules
from strategies.parts.blocks import Tensors
from strategies.parts.buffer import Update


@dataclass(frozen=True)
class ControlVariate:
    """A site's control variate."""

    arrays: StoredTensors
    weight: float
    version: int  # In which it was reported


class Scaffold(FedAvg):
    """SCAFFOLD (arXiv 1910.06378): FedAvg whose sites step along ``g_i(y) - c_i + c``.

    c_i, the control variate of site i, is the mean gradient of its last order and c the mean of
    the c_i: the correction leads a site that trains for long towards the optimum of all data and
    not of its own. For plain SGD the mean gradient is the paper's option II,
    ``c_i+ = c_i - c + (x - y) / (K eta)``; unlike that it means the same with AdamW, with a
    learning-rate schedule and for an order that was cut short. The correction is added to the
    gradient, ahead of clipping and of the inner optimizer. The server keeps all variates: sites
    stay stateless.

    A site whose variate is not known (it is new, or an ordinary ClientApp) trains without a
    correction, as if c_i = c, and counts in c from its first report on; so c is exactly the mean
    of the c_i that are known. With every site in every round that is the paper's algorithm.

    Parameters
    ----------
    outer_lr : float
        The global step size eta_g.
    weighted_by : str
        ``uniform`` (the paper's) or ``num-examples``; of the updates and of the variates in c,
        since other weights in one than in the other would move the optimum.
    forget_after : int
        The variate of a site that has not reported for so many versions is forgotten: a site
        that is gone for good would pull at the others for ever.
    **window
        ``deadline_s``, ``quorum``, ``grace_s``, ``late``, ``exponent``, ``sites_per_round`` and
        ``over_selection``, see `strategies.fedavg.FedAvg`. A variate that comes late counts.
    """

    persistent = ("variates", "control")

    def __init__(
        self,
        *,
        outer_lr: float = 1.0,
        weighted_by: Literal["num-examples", "uniform"] = "uniform",
        forget_after: int = 10,
        **window: Any,
    ) -> None:
        super().__init__(outer_lr=outer_lr, weighted_by=weighted_by, **window)
        if forget_after < 1:
            raise ValueError(f"forget_after={forget_after} must be at least 1")
        self.forget_after = forget_after
        self.variates: dict[str, ControlVariate] = {}  # c_i, by facility
        self.control: StoredTensors | None = None  # c of the present version

    def models_kept(self, sites: int) -> int:
        """Return those of its parts, each site's variate, and their mean, old and new."""
        return super().models_kept(sites) + sites + 3

    def order(self, site: SiteState) -> Plan:
        """Correct the site's gradients and ask for their mean; a plain ClientApp knows neither."""
        plan = super().order(site)
        if not site.launcher:
            return plan
        return replace(
            plan,
            options={**plan.options, MEAN_GRADIENT: True},
            extra_arrays={CORRECTION: partial(self.correction, site.facility)},
        )

    def correction(self, facility: str) -> Tensors | None:
        """Return ``c - c_i``; None while one of them is not known."""
        own = self.variates.get(facility)
        if own is None or self.control is None:
            return None
        return rules.record_delta(self.control, own.arrays)

    def on_result(self, result: SiteResult, staleness: int) -> Tensors | None:
        """Take the site's new variate in, ahead of its update."""
        gradient = result.gradient
        if gradient is not None:
            kept = self.keep_tensors("variate", rules.tensors(gradient))
            weight = float(result.examples) if self.weighted_by == "num-examples" else 1.0
            self.variates[result.facility] = ControlVariate(kept, weight, self.version)
        return super().on_result(result, staleness)

    def merge(self, updates: Sequence[Update], weights: Sequence[float]) -> Tensors:
        """Make the next version's c, and step along the weighted mean pseudo-gradient."""
        gone = self.version - self.forget_after
        self.variates = {f: v for f, v in self.variates.items() if v.version > gone}
        latest = list(self.variates.values())
        self.control = None
        if latest:
            shares = rules.normalised([v.weight or 1e-12 for v in latest])
            mean = rules.record_mean([v.arrays for v in latest], shares)
            self.control = self.keep_tensors("control", mean)
        return super().merge(updates, weights)
