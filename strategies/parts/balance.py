"""Weights by which no site owns the model, however fast it is or short its queue."""

from __future__ import annotations

CLIP = 3.0


class ContributionBalance:
    """Moving averages of how often sites arrive and of how many steps their orders have.

    Attributes
    ----------
    steps : dict of str to float
        Per order, by facility.
    frequency : dict of str to float
        Share of the arrivals, by facility.
    """

    persistent = ("steps", "frequency")

    def __init__(self) -> None:
        self.steps: dict[str, float] = {}
        self.frequency: dict[str, float] = {}

    def observe(self, facility: str, steps: int, sites: int) -> None:
        """Take an arrival in; shares of arrivals are followed over about 8 of every site."""
        _blend(self.steps, facility, float(max(1, steps)), 0.3)
        self.frequency.setdefault(facility, 1.0 / sites)
        new = 1.0 / (8.0 * sites)
        self.frequency = {name: (1.0 - new) * share for name, share in self.frequency.items()}
        self.frequency[facility] += new

    def share(self, facility: str, sites: int, by_steps: bool, by_arrivals: bool) -> float:
        """Return g_k of FedBackfill: 1/N, with the factors asked for."""
        share = 1.0 / sites
        if by_steps:
            share *= self.by_steps(facility)
        if by_arrivals:
            share *= self.by_arrivals(facility, sites)
        return share

    def by_steps(self, facility: str) -> float:
        """Return ``clip(sqrt(n_mean / n_k), 1/3, 3)``, n_k the steps of the site's orders."""
        mean = sum(self.steps.values()) / len(self.steps)
        return _clip((mean / self.steps[facility]) ** 0.5)

    def by_arrivals(self, facility: str, sites: int) -> float:
        """Return ``clip(1/N / f_k, 1/3, 3)``, f_k the site's share of the arrivals."""
        return _clip(1.0 / (sites * self.frequency[facility]))


class ExampleShares:
    """Which share of all examples is a site's, by its last result.

    Attributes
    ----------
    examples : dict of str to float
        By facility.
    """

    persistent = ("examples",)

    def __init__(self) -> None:
        self.examples: dict[str, float] = {}

    def observe(self, facility: str, examples: int) -> None:
        """Take a result in."""
        self.examples[facility] = float(max(1, examples))

    def of(self, facility: str, sites: int) -> float:
        """Return ``n_k / sum n``; a site that has not reported is taken for an average one."""
        mean = sum(self.examples.values()) / len(self.examples)
        return self.examples[facility] / (sites * mean)


def _clip(factor: float) -> float:
    return min(CLIP, max(1.0 / CLIP, factor))


def _blend(table: dict[str, float], name: str, value: float, new: float) -> None:
    table[name] = (1.0 - new) * table[name] + new * value if name in table else value
