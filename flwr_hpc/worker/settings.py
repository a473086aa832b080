"""What the worker of an allocation loads: checked where it is written, and where it is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from flwr_hpc.config.schema import DataConfig, ModelConfig, TrainConfig, decode
from flwr_hpc.spool import AllocationDir


@dataclass
class WorkerSettings:
    """An allocation's ``settings.json``."""

    facility: str
    facilities: list[str]  # Of the whole federation: data is dealt out among them
    seed: int
    rounds: int
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    codec: Any  # ``exchange.codec``: the job encodes what it has trained
    feedback: float  # ``exchange.feedback``
    idle_timeout_s: float
    progress_timeout_s: float  # See `flwr_hpc.worker.progress_watch`
    walltime_s: float | None  # What was asked for; None: no limit
    peak_tflops: float | None
    gpus_per_node: int
    internet: bool
    lora_r: int | None  # This facility's, if its adapters are of a smaller rank than the run's

    @classmethod
    def read(cls, allocation: AllocationDir) -> WorkerSettings:
        """Read an allocation's settings; a UserError names what is wrong with them."""
        return decode(cls, allocation.settings(), str(allocation.settings_file))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
