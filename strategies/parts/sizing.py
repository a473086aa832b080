"""How many steps an order is to have: by the site's speed, its walltime and what transfers cost."""

from __future__ import annotations

from strategies.engine.state import SiteState
from strategies.parts import limits
from strategies.parts.pace import SpeedEstimate

LEAST_STEPS = 5  # below that an order is not worth its transfer
ROUND_OVERHEADS = 5.0  # an order trains so many times as long as it costs besides
UNKNOWN_OVERHEAD_S = 60.0


class OrderSizing:
    """Orders of about `round_s` seconds that end within the walltime.

    Parameters
    ----------
    round_s : float or None
        Seconds of training per order (None: five times what an order costs besides).
    min_steps, max_steps : int
        Bounds of an order; a site whose speed is not known yet gets the smallest.
    """

    def __init__(self, round_s: float | None, min_steps: int, max_steps: int) -> None:
        limits.positive("round_s", round_s)
        limits.steps(min_steps, max_steps)
        self.round_s, self.min_steps, self.max_steps = round_s, min_steps, max_steps

    def steps(self, site: SiteState, pace: SpeedEstimate, now: float) -> int:
        """Return the steps of a site's next order."""
        step_s = pace.step_s.get(site.facility)
        if not step_s:
            return self.min_steps
        overhead_s = pace.overhead_s.get(site.facility, UNKNOWN_OVERHEAD_S)
        round_s = self.round_s or ROUND_OVERHEADS * overhead_s
        steps = min(max(int(round_s / step_s), self.min_steps), self.max_steps)
        if not site.warm or site.ends_at is None:
            return steps
        left_s = site.ends_at - now - overhead_s
        if left_s >= 1.3 * steps * step_s:  # else a remainder would be too short for another
            return steps
        return min(self.max_steps, max(LEAST_STEPS, int(left_s / (1.06 * step_s))))
