"""Federated strategies for batch systems, on Flower's public API.

This is what a strategy is written with. The strategies themselves are the modules beside this
file, one class in each, and are named by their path: ``strategies.fedbuff.FedBuff``.
"""

from strategies.base.asynchronous import AsyncStrategy
from strategies.base.hpc_strategy import HpcStrategy
from strategies.base.start import run_strategy
from strategies.base.window import WindowStrategy
from strategies.engine.engine import Engine
from strategies.engine.runtime import FatalSiteError, RunFailed, Runtime, Settings
from strategies.engine.state import Binding, Failure, Plan, SiteResult, SiteState
from strategies.parts.blocks import limit_memory

__all__ = [
    "AsyncStrategy",
    "Binding",
    "Engine",
    "Failure",
    "FatalSiteError",
    "HpcStrategy",
    "Plan",
    "RunFailed",
    "Runtime",
    "Settings",
    "SiteResult",
    "SiteState",
    "WindowStrategy",
    "limit_memory",
    "run_strategy",
]
