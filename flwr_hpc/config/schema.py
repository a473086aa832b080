"""The whole configuration as dataclasses, validated. Standard library and omegaconf only."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flwr_hpc.config.facility import FacilityConfig, QueueConfig, walltime_s
from flwr_hpc.config.validate import check_values
from flwr_hpc.errors import UserError, closest

__all__ = [
    "AllocationConfig",
    "Config",
    "DataConfig",
    "ExchangeConfig",
    "FacilityConfig",
    "FederationConfig",
    "LoraConfig",
    "ModelConfig",
    "QueueConfig",
    "TrackingConfig",
    "TrainConfig",
    "explain",
    "parse",
    "walltime_s",
]


@dataclass
class LoraConfig:
    """Low-rank adapters (peft); only they are trained and exchanged. Rank 0: none."""

    r: int = 0
    alpha: int = 16
    dropout: float = 0.0
    target_modules: str = "all-linear"


@dataclass
class ModelConfig:
    """A transformers causal language model.

    Attributes
    ----------
    path : str or None
        Local directory or hub name of a checkpoint; its weights are the start.
    config : dict
        Arguments of ``transformers.AutoConfig.for_model`` (``model_type`` and its sizes),
        to start from random weights; used when `path` is not set. ``vocab_size`` defaults
        to the tokenizer's.
    lora : LoraConfig
        On with ``lora.r`` above 0; needs `path`.
    """

    path: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class DataConfig:
    """What each facility trains on.

    Attributes
    ----------
    kind : str
        ``stdlib`` (source code of the installed Python), ``text``, ``jsonl`` or ``parquet``.
    paths : dict of str to list of str
        Files or globs per facility name; for ``stdlib`` package names (default: the packages
        dealt out among the facilities).
    held_out_paths : dict of str to list of str
        Files kept for evaluation; default: `held_out_fraction` of the training documents.
    held_out_fraction : float
    tokenizer : str
        ``byte``, a local directory or a hub name.
    seq_len : int
        Tokens per training sequence.
    text_key, prompt_key, response_key : str
        Columns of jsonl and parquet records; a record with a prompt and a response takes the
        loss on the response alone.
    held_out_sequences : int
        At most so many sequences are evaluated.
    """

    kind: str = "stdlib"
    paths: dict[str, list[str]] = field(default_factory=dict)
    held_out_paths: dict[str, list[str]] = field(default_factory=dict)
    held_out_fraction: float = 0.05
    tokenizer: str = "byte"
    seq_len: int = 256
    text_key: str = "text"
    prompt_key: str = "prompt"
    response_key: str = "response"
    held_out_sequences: int = 64


@dataclass
class TrainConfig:
    """The trainer inside an allocation.

    Attributes
    ----------
    steps : int
        Inner optimizer steps per order (H).
    micro_batch : int
        Sequences per rank and forward pass.
    accumulation : int
        Micro batches per optimizer step; global batch = micro_batch x accumulation x ranks.
    lr, min_lr_ratio, warmup_steps, schedule_steps :
        Linear warm-up, then cosine to ``lr x min_lr_ratio`` at `schedule_steps` steps of this
        facility (default: rounds x steps), over the whole run and not one round.
    betas, eps, weight_decay, clip :
        AdamW; `clip` is the largest global gradient norm (0: no clipping).
    precision : str
        ``auto`` (bf16 where the device has it), ``fp32`` or ``bf16``.
    activation_checkpointing : str
        ``none`` or ``full``.
    reset_optimizer : bool
        Forget the inner optimizer's state at every order.
    checkpoint_every_orders : int
        Save the trainer's state after so many training orders (0: never).
    """

    steps: int = 110
    micro_batch: int = 4
    accumulation: int = 1
    lr: float = 3e-3
    min_lr_ratio: float = 0.1
    warmup_steps: int = 20
    schedule_steps: int | None = None
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    precision: str = "auto"
    activation_checkpointing: str = "none"
    reset_optimizer: bool = False
    checkpoint_every_orders: int = 1


@dataclass
class ExchangeConfig:
    """How weights travel.

    Attributes
    ----------
    store : str or None
        fsspec URL of a place both the server and the sites reach; default: a folder in the
        run directory.
    inline_below_mb : float
        Smaller payloads travel inside the Flower message.
    """

    store: str | None = None
    inline_below_mb: float = 1.0


@dataclass
class AllocationConfig:
    """Life of an allocation.

    Attributes
    ----------
    policy : str
        ``warm`` (one job works on order after order) or ``per_round`` (a job for each order).
    renew_ahead : str
        When the successor of a warm allocation is submitted: ``forecast`` (so that its
        expected start meets the end of the current one), ``off`` (when the current one has
        ended and an order waits) or a walltime before the end, e.g. ``02:00:00``.
    renew_quantile : float
        Of the forecast wait, for ``forecast``: above 0.5 the successor comes rather too early.
    queue_deadline_s : float
        A job that has waited longer is cancelled and counts as failed.
    idle_timeout_s : float
        The worker ends when no order came for so long.
    retries : int
        How often a job that died is replaced while the same order waits.
    """

    policy: str = "warm"
    renew_ahead: str = "forecast"
    renew_quantile: float = 0.5
    queue_deadline_s: float = 604800.0
    idle_timeout_s: float = 600.0
    retries: int = 2


@dataclass
class FederationConfig:
    """How the strategy and the sites keep in touch.

    Attributes
    ----------
    wait_s : float
        Longest time a site holds a message before it answers with the state so far.
    acquire_deadline_s : float or None
        Give up on an allocation that has not started by then (None: wait).
    order_deadline_s : float or None
        Give up on an order so long after it was handed in (None: wait).
    offline_grace_s : float
        How long a site may be unreachable before its order is given up.
    retries : int
        How often an order that failed is sent again.
    restarts : int
        How often the driver starts Flower anew, from the last aggregation, when SuperLink or
        the ServerApp died.
    """

    wait_s: float = 120.0
    acquire_deadline_s: float | None = None
    order_deadline_s: float | None = None
    offline_grace_s: float = 600.0
    retries: int = 2
    restarts: int = 2


@dataclass
class TrackingConfig:
    """Where metrics go besides the run directory."""

    wandb: bool = False
    project: str = "flwr-hpc"
    entity: str | None = None
    mode: str = "auto"  # auto: online when logged in, else offline


@dataclass
class Config:
    """One run."""

    rounds: int = 6
    seed: int = 0
    run_dir: str | None = None
    resume: str | None = None
    dry_run: bool = False
    facilities: dict[str, FacilityConfig] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    allocation: AllocationConfig = field(default_factory=AllocationConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def parse(raw: DictConfig | dict[str, Any]) -> Config:
    """Turn a composed configuration into a checked `Config`.

    Raises
    ------
    UserError
        Naming the key, the value found and what would be valid.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), raw)
        for facility in merged.facilities.values():
            if facility.scheduler == "local" and OmegaConf.is_missing(facility, "account"):
                facility.account = None
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as exc:
        raise UserError(explain(exc)) from None
    assert isinstance(config, Config)
    check_values(config)
    return config


def explain(exc: OmegaConfBaseException) -> str:
    """Say what is wrong with a setting, and what would be valid."""
    key = getattr(exc, "full_key", None) or ""
    first = str(exc).splitlines()[0]
    if "Key '" in first and "not in" in first:
        name = str(getattr(exc, "key", key))
        owner = getattr(exc, "object_type", None)
        valid = [f.name for f in fields(owner)] if is_dataclass(owner) else []
        choices = f" Valid keys: {', '.join(valid)}." if valid else ""
        return f"unknown configuration key '{key or name}'.{closest(name, valid)}{choices}"
    if "missing mandatory value" in first.lower():
        return f"{key} must be given. Add it to the command: {key}=VALUE"
    return f"'{key}': {first}"
