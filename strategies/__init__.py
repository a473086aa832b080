"""Federated strategies for batch systems, on Flower's public API."""

from strategies.async_diloco import AsyncDiLoCo
from strategies.base.asynchronous import AsyncStrategy
from strategies.base.synchronous import HpcStrategy
from strategies.base.window import WindowStrategy
from strategies.decoupled_diloco import DecoupledDiLoCo
from strategies.diloco import DiLoCo
from strategies.engine.engine import Engine
from strategies.engine.rounds import run_rounds
from strategies.engine.runtime import FatalSiteError, RunFailed, Runtime, Settings
from strategies.engine.state import Binding, Failure, Plan, SiteResult
from strategies.fedasync import FedAsync
from strategies.fedavg import FedAvg
from strategies.fedbackfill import FedBackfill
from strategies.fedbackfill_rounds import FedBackfillRounds
from strategies.fedbuff import FedBuff
from strategies.fedcompass import FedCompass
from strategies.fedqueue import FedQueue
from strategies.scaffold import Scaffold
from strategies.streaming_diloco import StreamingDiLoCo

__all__ = [
    "SiteResult",
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
