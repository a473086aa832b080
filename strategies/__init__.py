"""Federated strategies for batch systems, on Flower's public API."""

from strategies.asynchronous import AsyncStrategy
from strategies.base import HpcStrategy
from strategies.diloco import DiLoCo
from strategies.engine import Engine
from strategies.fedbuff import FedBuff
from strategies.rounds import run_rounds
from strategies.runtime import FatalSiteError, RunFailed, Runtime, Settings
from strategies.sites import Arrival, Failure

__all__ = [
    "Arrival",
    "AsyncStrategy",
    "DiLoCo",
    "Engine",
    "Failure",
    "FatalSiteError",
    "FedBuff",
    "HpcStrategy",
    "RunFailed",
    "Runtime",
    "Settings",
    "run_rounds",
]
