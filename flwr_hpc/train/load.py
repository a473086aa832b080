"""Everything an allocation loads once: data, model, shards, and the newest checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from flwr_hpc.config import batch_size
from flwr_hpc.config.schema import DataConfig, ModelConfig, TrainConfig
from flwr_hpc.config.validate import check_objective
from flwr_hpc.data.batches import check_tokenizer, load_corpus
from flwr_hpc.errors import UserError
from flwr_hpc.exchange.compression.encoder import make_encoder
from flwr_hpc.protocol import BASE_FILE
from flwr_hpc.spool import AllocationDir
from flwr_hpc.train.base_model import base_sha256, frozen_factors, in_precision, with_factors
from flwr_hpc.train.metrics import Meter
from flwr_hpc.train.model import Built, build, checkpoint_folder, is_encoder_decoder
from flwr_hpc.train.optim import schedule_steps
from flwr_hpc.train.order import OrderRunner
from flwr_hpc.train.rendezvous import Group
from flwr_hpc.train.runtime.compiling import check_compiler
from flwr_hpc.train.runtime.device import set_product_precision
from flwr_hpc.train.runtime.garbage import freeze
from flwr_hpc.train.state.background import Background
from flwr_hpc.train.state.checkpoint import Checkpoints
from flwr_hpc.train.state.site_state import SiteState
from flwr_hpc.train.trainer import Trainer
from flwr_hpc.worker.deadline import Deadline
from flwr_hpc.worker.phase_timer import PhaseTimer
from flwr_hpc.worker.reporter import Reporter
from flwr_hpc.worker.settings import WorkerSettings

MASKED_ATTENTION = ("sdpa", "eager", "flex_attention")  # transformers makes a mask for these


def load(
    settings: WorkerSettings,
    allocation: AllocationDir,
    group: Group,
    timer: PhaseTimer,
    reporter: Reporter,
    deadline: Deadline,
) -> OrderRunner:
    """Return what carries out orders, from files to shards."""
    _check_device(settings, group.device)
    spool = allocation.spool
    torch.set_num_threads(group.ranks.cpu_threads())
    set_product_precision(settings.train, group.device)
    if settings.train.compile:
        check_compiler(group.device)
    tokenizer = settings.data.tokenizer or settings.model.path
    corpus = load_corpus(
        dataclasses.replace(settings.data, tokenizer=tokenizer),
        settings.facility, settings.facilities, settings.seed, spool.cache,
    )  # fmt: skip
    if settings.model.path and settings.data.tokenizer:
        check_tokenizer(corpus.tokenizer, settings.model.path)
    train = batch_size.shared(settings.train, group.ranks.world_size, settings.facility)
    built = build(
        settings.model, corpus.tokenizer, settings.seed, settings.data.seq_len,
        train.activation_checkpointing, settings.lora_r, draw_later=True,
    )  # fmt: skip
    check_objective(is_encoder_decoder(built.model), settings.data.objective)
    check_document_mask(built.model, settings.data, train)
    base = _base(settings.model, built, group, spool.cache)
    checkpoints = Checkpoints(spool.checkpoints, group, writer=allocation.name)
    checkpoints.sweep(lambda name: spool.allocation(name).has_job_ended)
    meter = Meter(
        timer, reporter, group, train, settings.data, built.flops_per_token, settings.peak_tflops
    )
    encoder = make_encoder(settings.codec, settings.feedback, spool.feedback)
    trainer = Trainer(
        built, corpus, train, schedule_steps(train, settings.rounds), group, encoder=encoder
    )
    freeze()
    return OrderRunner(
        SiteState(
            trainer, checkpoints, Background(group), train, meter,
            notes=[corpus.too_long] if corpus.too_long else [],
        ),
        files=built.files | ({BASE_FILE: json.dumps({"sha256": base})} if base else {}),
        deadline=deadline,
        base=base,
    )  # fmt: skip


def check_document_mask(model: Any, data: DataConfig, train: TrainConfig) -> None:
    """Refuse an attention that would silently look over the borders of documents."""
    attention = model.config._attn_implementation
    if data.document_mask and train.micro_batch > 1 and attention not in MASKED_ATTENTION:
        raise UserError(
            f"attn_implementation={attention} keeps the documents of a sequence apart for one "
            f"sequence at a time alone, found train.micro_batch={train.micro_batch}. Give "
            "train.micro_batch=1, or data.document_mask=false, or one of "
            f"{', '.join(MASKED_ATTENTION)}"
        )


def _base(model: ModelConfig, built: Built, group: Group, cache: Path) -> str:
    """Return the hash of an adapter's base, with what of it is frozen, as rank 0 finds it."""
    if not model.path or not model.lora.r:
        return ""
    sha256 = ""
    if group.ranks.rank == 0:
        factors = frozen_factors(built.model)
        sha256 = with_factors(
            in_precision(base_sha256(checkpoint_folder(model.path), cache), model.lora.quantize),
            ((built.frozen[name], factors[name]) for name in sorted(factors)),
        )
    return str(group.broadcast(sha256))


def _check_device(settings: WorkerSettings, device: torch.device) -> None:
    if settings.model.lora.quantize != "none" and device.type == "cpu":
        raise UserError(
            f"model.lora.quantize={settings.model.lora.quantize} trains on GPUs, and PyTorch "
            f"{torch.__version__} sees none in the job of {settings.facility}. Give "
            "model.lora.quantize=none"
        )
    if settings.gpus_per_node and device.type == "cpu":
        here = f"facilities.{settings.facility}"
        raise UserError(
            f"{here} has gpus_per_node={settings.gpus_per_node}, but PyTorch {torch.__version__} "
            f"sees no GPU in the job. It takes a build for CUDA or ROCm, in {here}.python or "
            f".container. To train on CPUs: {here}.gpus_per_node=0"
        )
