"""The learning tasks by the name that `learning=` takes."""

from __future__ import annotations

from collections.abc import Callable

from flwr_hpc.simulate.learning.base import Learner
from flwr_hpc.simulate.learning.network import NetworkConfig, NetworkLearner
from flwr_hpc.simulate.learning.surrogate import SurrogateLearner
from flwr_hpc.simulate.learning.text import TextConfig, TextLearner

# name -> learner of (sites, own share of a site's data, seed)
TASKS: dict[str, Callable[[int, float, int], Learner]] = {
    "network": lambda sites, own, seed: NetworkLearner(sites, NetworkConfig(own_share=own), seed),
    "text": lambda sites, own, seed: TextLearner(sites, TextConfig(own_share=own), seed),
    "surrogate": lambda sites, own, seed: SurrogateLearner(sites, seed),
}
