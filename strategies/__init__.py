"""Federated strategies for batch systems, on Flower's public API."""

from strategies.async_diloco import AsyncDiLoCo
from strategies.asynchronous import AsyncStrategy
from strategies.base import HpcStrategy
from strategies.decoupled import DecoupledDiLoCo
from strategies.diloco import DiLoCo
from strategies.engine import Engine
from strategies.fedasync import FedAsync
from strategies.fedavg import FedAvg
from strategies.fedbackfill import FedBackfill
from strategies.fedbackfill_rounds import FedBackfillRounds
from strategies.fedbuff import FedBuff
from strategies.fedcompass import FedCompass
from strategies.fedqueue import FedQueue
from strategies.rounds import run_rounds
from strategies.runtime import FatalSiteError, RunFailed, Runtime, Settings
from strategies.scaffold import Scaffold
from strategies.sites import Arrival, Binding, Failure, Plan
from strategies.streaming import StreamingDiLoCo
from strategies.window import WindowStrategy

__all__ = [
    "Arrival",
    "AsyncDiLoCo",
    "AsyncStrategy",
    "Binding",
    "DecoupledDiLoCo",
    "DiLoCo",
    "Engine",
    "Failure",
    "FatalSiteError",
    "FedAsync",
    "FedAvg",
    "FedBackfill",
    "FedBackfillRounds",
    "FedBuff",
    "FedCompass",
    "FedQueue",
    "HpcStrategy",
    "Plan",
    "RunFailed",
    "Runtime",
    "Scaffold",
    "Settings",
    "StreamingDiLoCo",
    "WindowStrategy",
    "run_rounds",
]
