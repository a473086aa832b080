"""Differential privacy around rounds that step along the mean update, in blocks."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from flwr_hpc.protocol import WEIGHT_KEY
from strategies.base.asynchronous import AsyncStrategy
from strategies.base.hpc_strategy import HpcStrategy
from strategies.diloco import DiLoCo
from strategies.engine import messages
from strategies.engine.flower.mean import aggregate
from strategies.engine.flower.shares import AVERAGING
from strategies.parts import limits, privacy
from strategies.parts.blocks import made_record
from strategies.parts.norms import clip_scale, scaled_update, update_norm

log = logging.getLogger("strategies")

OURS = (HpcStrategy.aggregate, DiLoCo.aggregate)


class Private(HpcStrategy):
    """Central differential privacy of sites (arXiv 1710.06963) over a strategy of rounds.

    Every update is clipped to the norm C, all count alike, and noise goes into their sum before the
    strategy sees them::

        sum_k min(1, C / ||u_k||) u_k  +  N(0, (z C)^2)

    So one site changes what is released by no more than the noise hides, whatever the strategy
    makes of the mean (momentum, Adam), and however many of the sites that were asked have reported.
    For FedAvg that is Flower's ``DifferentialPrivacyServerSideFixedClipping``: noise z C / n in the
    mean. With `quantile` C follows a quantile of the norms (arXiv 1905.03871), by a noisy count.

    The trained weights are private, and so are all versions; metrics that sites report are not.

    Parameters
    ----------
    strategy : Strategy
        Flower's FedAvg, FedAvgM, FedAdam, FedAdagrad or FedYogi, `strategies.diloco.DiLoCo` or a
        plain `HpcStrategy`.
    clip : float
        C; with `quantile` the first one.
    noise_multiplier : float
        z.
    min_updates : int
        A round with fewer makes no version: its noise would be large for its mean.
    quantile : float or None
        gamma: the share of updates that are to be no longer than C.
    clip_lr : float
        eta of ``C <- C exp(-eta (b - gamma))``.
    count_noise : float
        Standard deviation of the noise in the count that b is taken from; the noise of the updates
        is raised so that both together are z.
    delta : float
        At which epsilon is told, in each round's metrics (``dp_epsilon``).
    """

    persistent = ("clip", "releases")

    def __init__(
        self,
        strategy: Strategy,
        *,
        clip: float = 1.0,
        noise_multiplier: float = 1.0,
        min_updates: int = 2,
        quantile: float | None = None,
        clip_lr: float = 0.2,
        count_noise: float = 1.0,
        delta: float = 1e-5,
    ) -> None:
        super().__init__(weighted_by="uniform")
        _check_strategy(strategy)
        for name, value in (("clip", clip), ("min_updates", min_updates), ("clip_lr", clip_lr)):
            limits.positive(name, value)
        limits.not_negative("noise_multiplier", noise_multiplier)
        limits.not_negative("count_noise", count_noise)
        limits.positive_share("delta", delta)
        self.strategy = strategy
        self.clip, self.noise_multiplier, self.min_updates = clip, noise_multiplier, min_updates
        self.quantile, self.clip_lr, self.count_noise = quantile, clip_lr, count_noise
        self.delta = delta
        self.releases = 0  # versions made
        self._update_noise = noise_multiplier
        if quantile is not None:
            limits.positive_share("quantile", quantile)
            self._update_noise = privacy.noise_apart(noise_multiplier, count_noise)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask whom the strategy asks."""
        self.arrays = arrays
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Hand on clipped replies of equal weights, of which the first carries the noise."""
        replies = list(replies)
        good = [r for r in replies if r.has_content()]
        if len(good) < self.min_updates:
            log.warning(
                "round %d has %d updates, fewer than strategy.min_updates=%d: no version is made",
                *(server_round, len(good), self.min_updates),
            )
            return None, None
        trained = [messages.arrays_of(reply) or ArrayRecord() for reply in good]
        norms = [update_norm(self.arrays, one) for one in trained]
        scales = [clip_scale(norm, self.clip) for norm in norms]
        clipped = [scaled_update(self.arrays, *pair) for pair in zip(trained, scales, strict=True)]
        if self._update_noise:  # no site may guess it, and a resumed run draws another
            noise = privacy.gaussian(secrets.randbits(128), self._update_noise * self.clip)
            clipped[0] = privacy.with_noise(self.arrays, trained[0], scales[0], noise)
        for reply, one in zip(good, clipped, strict=True):
            reply.content = self._alike(messages.with_arrays(reply.content, one))
        new, metrics = aggregate(self.strategy, server_round, replies)
        if new is None or isinstance(new, ArrayRecord):
            arrays = new
        else:
            arrays = made_record(self.arrays, new.__getitem__)
        self.stored = getattr(self.strategy, "stored", None)
        if arrays:
            metrics = MetricRecord({**(metrics or {}), **self._release(norms)})
        return arrays, metrics

    def _alike(self, content: RecordDict) -> RecordDict:
        """Let a reply count as much as any other."""
        key = getattr(self.strategy, "weighted_by_key", WEIGHT_KEY)
        weighed = {
            name: MetricRecord({**record, key: 1.0})
            for name, record in messages.records(content, MetricRecord).items()
            if key in record
        }
        return RecordDict({**content, **weighed})

    def _release(self, norms: Sequence[float]) -> dict[str, float]:
        """Count a version, let C follow, and return what is told of it."""
        self.releases += 1
        told = {"dp_clip_norm": self.clip}
        if self.noise_multiplier:
            told["dp_epsilon"] = privacy.epsilon(self.noise_multiplier, self.releases, self.delta)
        if self.quantile is not None:
            within: float = sum(norm <= self.clip for norm in norms)
            if self.noise_multiplier:
                within += self.count_noise * secrets.SystemRandom().gauss(0.0, 1.0)
            self.clip = privacy.next_clip(
                self.clip, within / len(norms), self.quantile, self.clip_lr
            )
        return told

    # ---- as the strategy does ---------------------------------------------------------------

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask whom the strategy asks."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Leave it to the strategy: metrics are not private."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Log the settings of both."""
        super().summary()
        self.strategy.summary()


def _check_strategy(strategy: Any) -> None:
    """Refuse what is not known to step along the mean of a round's updates, all alike."""
    kind = type(strategy)
    name = f"{kind.__module__}.{kind.__name__}"
    if isinstance(strategy, AsyncStrategy):
        raise ValueError(
            f"{name} makes versions of as many updates as have come, by its own loop and with "
            "weights of its own: the noise is for rounds of equal weights. Wrap one of those, e.g. "
            "flwr.serverapp.strategy.FedAvg or strategies.diloco.DiLoCo"
        )
    ours = isinstance(strategy, HpcStrategy) and kind.aggregate in OURS
    averages = ours and kind.aggregate_train is HpcStrategy.aggregate_train
    if not averages and kind.aggregate_train not in AVERAGING:
        raise ValueError(
            f"{name} is not known to step along the mean of the updates, which is what the noise "
            "is sized for. Valid: FedAvg, FedAvgM, FedAdam, FedAdagrad and FedYogi of "
            "flwr.serverapp.strategy, strategies.diloco.DiLoCo"
        )
