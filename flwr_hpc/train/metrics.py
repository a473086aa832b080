"""What an order took and brought: seconds by phase, progress while it runs, numbers at its end."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from flwr_hpc.config.schema import DataConfig, TrainConfig
from flwr_hpc.spool import OrderDir
from flwr_hpc.train.base_model import size_of
from flwr_hpc.train.progress import OrderProgress, Progress
from flwr_hpc.train.rendezvous import Group
from flwr_hpc.train.runtime.device import peak_bytes
from flwr_hpc.worker.phase_timer import PhaseTimer
from flwr_hpc.worker.reporter import Reporter

REPORT_EVERY_S = 1.0


@dataclass
class Meter:
    """Measures one order after the other; called on every rank."""

    timer: PhaseTimer
    reporter: Reporter
    group: Group
    train: TrainConfig
    data: DataConfig
    flops_per_token: float
    peak_tflops: float | None = None  # Of one device, for MFU
    seconds: dict[str, float] = field(default_factory=dict)  # Of the running order
    _began: float = 0.0

    def begin(self) -> None:
        """Begin an order."""
        self._began, self.seconds = time.perf_counter(), {}

    def first_step(self) -> None:
        """Note that all is in place for the first step."""
        self.seconds["first_step"] = time.perf_counter() - self._began

    @contextmanager
    def phase(self, phase: str, name: str) -> Iterator[None]:
        """Count the body as a phase of the allocation, and as `name` of the order."""
        began = time.perf_counter()
        try:
            with self.timer.during(phase):
                yield
        finally:
            ran = time.perf_counter() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + ran

    def progress(self, folder: OrderDir, first: int, steps: int) -> Progress:
        """Report about once a second, on rank 0: reading the loss waits for the device."""
        began = reported = time.perf_counter()

        def report(step: int, loss: Callable[[], float]) -> None:
            nonlocal reported
            self.reporter.progressed()
            now = time.perf_counter()
            if self.group.ranks.rank or (now - reported < REPORT_EVERY_S and step > first + 1):
                return
            reported, value = now, loss()
            speed = (step - first) * self._tokens_per_step() / (time.perf_counter() - began)
            progress = {"step": step, "steps": steps, "tokens_per_s": speed}
            if math.isfinite(value):
                progress["loss"] = value
            self.reporter.set_progress(folder, progress)

        return report

    def note(self, folder: OrderDir, note: str) -> None:
        """Report at once what a person should know of a running order."""
        if self.group.ranks.rank == 0:
            self.reporter.set_progress(folder, {"note": note})

    def metrics(self, trained: OrderProgress) -> dict[str, float]:
        """Return an order's numbers."""
        if not trained.steps:
            return {}
        speed = trained.steps * self._tokens_per_step() / max(trained.seconds, 1e-9)
        metrics = {
            "train_loss": trained.loss_sum / max(1, trained.tokens),
            "last_loss": trained.last_loss,
            "grad_norm": trained.last_grad_norm,
            "tokens_per_s": speed,
        }
        devices = self.group.ranks.world_size
        used = mfu(speed, self.flops_per_token, devices, self.peak_tflops)
        return metrics if used is None else metrics | {"mfu": used}

    def memory(self) -> dict[str, float]:
        """Return the most any rank had in memory; a collective call."""
        return {"peak_memory_gb": self.group.largest(peak_memory_gb(self.group.device))}

    def _tokens_per_step(self) -> int:
        sequences = self.train.micro_batch * self.train.accumulation
        copies = self.group.ranks.world_size // self.train.tensor
        return sequences * copies * self.data.seq_len


def flops_per_token(config: Any, model: nn.Module, seq_len: int) -> float:
    """Return the floating-point operations of one training step per token.

    ``6 N + 6 L heads (d_qk + d_v) seq_len`` (PaLM, arXiv 2204.02311, appendix B), N the
    parameters that are multiplied with: an embedding, of words or positions, is looked up and
    counts only when it is the head, too; of a mixture's experts only those a token goes to.
    Frozen parameters (LoRA) cost 4 and not 6, as they get no gradient.
    Returns 0 if the configuration does not name the shape of its attention, and for an
    encoder-decoder, whose halves see different numbers of tokens.
    """
    if getattr(config, "is_encoder_decoder", False):
        return 0.0
    head = model.get_output_embeddings()  # type: ignore[operator]
    looked_up = {
        id(m.weight)
        for m in model.modules()
        if isinstance(m, nn.Embedding) and (head is None or m.weight is not head.weight)
    }
    active = active_experts(config)
    trained = frozen = 0.0
    for name, p in model.named_parameters():
        if id(p) not in looked_up:
            used = size_of(p) * (active if "experts" in name.split(".") else 1.0)
            trained += used if p.requires_grad else 0.0
            frozen += 0.0 if p.requires_grad else used
    try:
        heads, depth = config.num_attention_heads, config.num_hidden_layers
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    except AttributeError:
        return 0.0
    attention = 12.0 * float(depth * heads * head_dim) * seq_len
    return 6.0 * trained + 4.0 * frozen + attention


def active_experts(config: Any) -> float:
    """Return the share of a mixture's routed experts that one token goes to; 1 without any."""
    keys = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    experts = next((n for key in keys if (n := getattr(config, key, None))), None)
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None)
    return chosen / experts if experts and chosen else 1.0


def mfu(tokens_per_s: float, flops: float, devices: int, peak_tflops: float | None) -> float | None:
    """Return the model FLOP/s utilisation in percent, or None if it cannot be told.

    Parameters
    ----------
    tokens_per_s : float
        Over all devices.
    flops : float
        Per token.
    peak_tflops : float or None
        Of one device.
    """
    if not peak_tflops or not flops:
        return None
    return 100.0 * flops * tokens_per_s / (devices * peak_tflops * 1e12)


def peak_memory_gb(device: torch.device) -> float:
    """Return the most memory this rank held so far, in GB: the device's, or resident."""
    if (allocated := peak_bytes(device)) is not None:
        return allocated / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
