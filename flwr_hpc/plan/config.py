"""Settings of ``python -m flwr_hpc.plan``: those of a run, and what to plan for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flwr_hpc.config.compose import composed
from flwr_hpc.config.folder import conf_dir
from flwr_hpc.config.schema import Config, explain
from flwr_hpc.errors import UserError, one_of, positive, within

SEQ_LEN = 4096  # Where none is given, as far as the model takes so much


@dataclass
class PlanOptions:
    """What to plan for."""

    tokens: float = 1e9  # To be trained on; gives node-hours and energy
    batch_tokens: int = 2**20  # Per optimizer step; the nearest that the ranks can share
    # Share of the device's peak that matrix products reach, and of the computing time that can
    # hide communication: what transformers' models reach on GPUs; see docs/plan.md.
    efficiency: float = 0.5
    overlap: float = 0.8
    rows: int = 10  # Of the table


@dataclass
class PlanConfig(Config):
    """A run's settings, and what to plan for."""

    nodes: int | None = None  # Of the allocation; default: the facility's
    plan: PlanOptions = field(default_factory=PlanOptions)


def compose_plan(overrides: Sequence[str], config_dir: str | None = None) -> PlanConfig:
    """Compose and check the settings of a plan."""
    config = parse(composed(overrides, config_dir, "plan", PlanConfig))
    if not any(o.lstrip("+").startswith("data.seq_len=") for o in overrides):
        config.data.seq_len = SEQ_LEN
    if not config.facilities:
        names = ", ".join(sorted(p.stem for p in (conf_dir() / "facility").glob("*.yaml")))
        raise UserError(
            f"name the facility to plan for: +facility=NAME. Known: {names}. "
            "Example: python -m flwr_hpc.plan model=llama3_8b +facility=leonardo nodes=4"
        )
    return config


def parse(raw: DictConfig) -> PlanConfig:
    """Check what a plan needs; an account or a QOS, which a run needs, may be missing."""
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PlanConfig), raw))
    except OmegaConfBaseException as exc:
        raise UserError(explain(exc)) from None
    assert isinstance(config, PlanConfig)
    for key in ("tokens", "batch_tokens", "rows"):
        positive(f"plan.{key}", getattr(config.plan, key))
    within("plan.efficiency", config.plan.efficiency, "(0, 1]")
    within("plan.overlap", config.plan.overlap, "[0, 1]")
    positive("data.seq_len", config.data.seq_len)
    if config.data.target_len is not None:
        positive("data.target_len", config.data.target_len)
    one_of("train.precision", config.train.precision, ("auto", "fp32", "bf16"))
    if config.nodes is not None:
        positive("nodes", config.nodes)
    for name, facility in config.facilities.items():
        for key in ("nodes", "ranks_per_node"):
            positive(f"facilities.{name}.{key}", getattr(facility, key))
    return config


def checkpoint_config(path: str) -> Path:
    """Return the ``config.json`` of a checkpoint's directory."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise UserError(
            f"model.path={path}: a plan reads config.json of a local directory, and there is none. "
            "Give a directory (hf download NAME --local-dir DIR), or a shape: model=llama3_8b"
        )
    return file
