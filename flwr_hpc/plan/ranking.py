"""From settings to the ranking of a facility's plans."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.config.schema import Config
from flwr_hpc.config.validate import SEQ2SEQ
from flwr_hpc.data.span_corruption import target_length
from flwr_hpc.errors import UserError
from flwr_hpc.plan.bandwidth import MeasuredBandwidths, kept, measured_file
from flwr_hpc.plan.config import PlanConfig, checkpoint_config
from flwr_hpc.plan.machine import machine
from flwr_hpc.plan.search import candidates, global_batch
from flwr_hpc.plan.shape import ModelShape, model_shape
from flwr_hpc.plan.show import Ranking

BYTE_VOCABULARY = 259  # Of the tokenizer ``byte``: 256 and three special tokens


def rank(config: PlanConfig, name: str, overrides: Sequence[str] = ()) -> Ranking:
    """Rank the plans of one facility."""
    facility = config.facilities[name]
    shape = _with_adapters(shape_of(config), config)
    seq_len = min(config.data.seq_len, shape.longest or config.data.seq_len)
    if seq_len < config.data.seq_len and any("data.seq_len=" in o for o in overrides):
        raise UserError(
            f"data.seq_len={config.data.seq_len} is longer than the model takes. "
            f"Add to the command: data.seq_len={shape.longest}"
        )
    shape = replace(shape, target_len=_target_len(shape, config, seq_len))
    options = config.plan
    measured, origin = _measured(name, facility)
    made, assumed = machine(
        facility, config.nodes or facility.nodes, config.train.precision, options.efficiency,
        options.overlap, measured, config.train.cpu_offload,
    )  # fmt: skip
    wanted = config.train.batch_size
    sequences = wanted or global_batch(options.batch_tokens, seq_len, made.ranks)
    ranked = candidates(shape, made, sequences, seq_len)
    if not ranked:
        raise UserError(
            f"train.batch_size={wanted} cannot be shared by the {made.ranks} ranks of {name}. "
            f"Give a multiple, e.g. train.batch_size={made.ranks}"
        )
    model = next((o.partition("=")[2] for o in overrides if o.startswith("model=")), None)
    return Ranking(
        name, model or config.model.path or shape.model_type, shape, made, seq_len,
        options.tokens, ranked, assumed, origin,
    )  # fmt: skip


def _measured(name: str, f: FacilityConfig) -> tuple[MeasuredBandwidths | None, str]:
    """Return the bandwidths that were measured here, and where those of the plan come from."""
    measured = kept(name)
    if measured is not None and measured.is_of(f):
        return measured, f"measured {measured.origin}"
    said = "the facility's table and its links" if f.bandwidths else "80 % of the links"
    if measured is not None:
        said += (
            f"; {measured_file(name)} is of ranks_per_node={measured.ranks_per_node} "
            f"gpus_per_node={measured.gpus_per_node} and not used"
        )
    return None, f"{said}; to measure: python -m flwr_hpc.doctor --bandwidth +facility={name}"


def _with_adapters(shape: ModelShape, config: Config) -> ModelShape:
    lora = config.model.lora
    packed = lora.quantize != "none"
    splits = shape.splits and not (packed or lora.dora or config.train.cpu_offload)
    return replace(shape, adapter_rank=lora.r, packed=packed, splits=splits)


def _target_len(shape: ModelShape, config: Config, seq_len: int) -> int | None:
    """Return how many tokens a decoder behind an encoder writes."""
    if not shape.encoder_decoder:
        return None
    if config.data.objective == SEQ2SEQ:
        return config.data.target_len or seq_len
    return target_length(seq_len)  # by span corruption


def shape_of(config: Config) -> ModelShape:
    """Return the shape of the configured model, from its checkpoint's ``config.json`` if any."""
    model: Mapping[str, Any] = config.model.config
    if config.model.path:
        model = json.loads(checkpoint_config(config.model.path).read_text())
    byte = BYTE_VOCABULARY if config.data.tokenizer in (None, "byte") else None
    return model_shape(model, byte)
