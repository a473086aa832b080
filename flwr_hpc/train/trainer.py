"""Training and evaluating one model on the ranks of an allocation, with torch and FSDP2."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from flwr_hpc.config.schema import TrainConfig
from flwr_hpc.data.batches import Batch, Corpus, DataCursor
from flwr_hpc.errors import UserError
from flwr_hpc.exchange.codecs.full import FullWeights
from flwr_hpc.exchange.compression.encoder import Encoder, Start
from flwr_hpc.exchange.tensors import Layout, TensorInfo
from flwr_hpc.train.algorithms.base import Algorithm
from flwr_hpc.train.base_model import frozen_factors
from flwr_hpc.train.goldfish import training_batch
from flwr_hpc.train.lora.residual import FrozenResidual
from flwr_hpc.train.loss import CHUNK_BYTES, IGNORED, add_loss, count_tokens
from flwr_hpc.train.model import Built, exchanged
from flwr_hpc.train.optim import adamw, clip, learning_rate, step_if_finite, sum_gradients
from flwr_hpc.train.parallel.sharding import ONE_UNIT_BELOW, meshes, reshard, shard
from flwr_hpc.train.parallel.tensors import local
from flwr_hpc.train.progress import DivergedError, Evaluated, OrderProgress, Progress
from flwr_hpc.train.rendezvous import Group
from flwr_hpc.train.runtime.garbage import collect_at, uncollected
from flwr_hpc.train.runtime.prefetch import Prefetch
from flwr_hpc.train.weights import Named, Staged, WeightsWriter, layout_of, read_weights
from flwr_hpc.worker.deadline import Stop


class Trainer:
    """A sharded model, its inner optimizer and the facility's place in data and schedule.

    Parameters
    ----------
    built : Built
        Model on the CPU; sharded in place.
    corpus : Corpus
    config : TrainConfig
    total_steps : int
        Cumulative step at which the schedule ends.
    group : Group
    one_unit_below : int
        See `sharding.shard`.
    chunk_bytes : int
        See `loss.add_loss`.
    encoder : Encoder or None
        Of what is sent; None: weights are written as they are.

    Attributes
    ----------
    step : int
        Cumulative step of this facility: cursor of the schedule.
    cursor : DataCursor
        The facility's place in its data.
    lr_scale : float
        Factor on the schedule's learning rate.
    exchanged, trained : dict of str to Tensor
        This rank's view of what travels, and of what of it is trained, by name in the file.
    """

    def __init__(
        self,
        built: Built,
        corpus: Corpus,
        config: TrainConfig,
        total_steps: int,
        group: Group,
        one_unit_below: int = ONE_UNIT_BELOW,
        chunk_bytes: int = CHUNK_BYTES,
        encoder: Encoder | None = None,
    ) -> None:
        self.step = 0
        self.cursor = DataCursor()
        self.lr_scale = 1.0
        self._model = built.model
        self._corpus = corpus
        self._config = config
        self._total_steps = total_steps
        self._group = group
        # The ranks that split a copy's layers work on the same data.
        self._copies, self._copy = (
            n // config.tensor for n in (group.ranks.world_size, group.ranks.rank)
        )
        over = meshes(group.ranks.world_size, group.device, config.replicate, config.tensor)
        self._tensor = over.tensor
        unsummed = shard(
            built.model, over, group.device, config.precision, one_unit_below, config.compile,
            built.draw, config.cpu_offload,
        )  # fmt: skip
        self._summed_loss = add_loss(built.model, chunk_bytes, self._tensor)
        tensors = exchanged(built.model)
        self.exchanged = {file: tensors[name] for name, file in built.names.items()}
        factors = frozen_factors(built.model)
        self._initial = self.exchanged | {f: factors[name] for name, f in built.frozen.items()}
        self._rank = built.rank
        shards_above = math.inf if self._rank.is_smaller else 1e6 * config.shards_above_mb
        encoder = encoder or Encoder(FullWeights())
        self._writer = WeightsWriter(group, self._initial, shards_above, encoder)
        self.trained = {n: t for n, t in self.exchanged.items() if t.requires_grad}
        self._trained = {n: p for n, p in tensors.items() if p.requires_grad}
        self._unsummed = [p for n, p in self._trained.items() if n in unsummed]
        self._optimizer = adamw(list(self._trained.values()), config)
        self._residual = FrozenResidual(built.model)
        self._held_out: list[Batch] | None = None
        self._batches = Prefetch(self._make_batch)

    # Weights

    def layout(self, names: Collection[str] | None = None) -> dict[str, TensorInfo]:
        """Return names and shapes of the weights that travel, or of some of them."""
        if unknown := sorted(set(names or ()) - self.exchanged.keys()):
            raise UserError(
                f"the model has no tensor '{unknown[0]}'. "
                "All facilities must use the same model configuration."
            )
        chosen = self.exchanged.keys() if names is None else names
        return self._layout((n, t) for n, t in self.exchanged.items() if n in chosen)

    def _layout(self, tensors: Named) -> dict[str, TensorInfo]:
        return self._rank.layout(layout_of(tensors))

    def load_weights(self, path: Path, names: Collection[str] | None = None) -> None:
        """Take over weights, each rank its shards of them; a collective call.

        Parameters
        ----------
        path : Path
        names : collection of str or None
            Tensors that the file holds (None: all); the others stay as they are.
        """
        reshard(self._model)
        layout = self.layout(names)
        targets = {name: self.exchanged[name] for name in layout}

        def read() -> None:
            read_weights(path, layout, targets)
            self._rank.keep_rest(path, layout)

        self._group.refuse_together(read)

    def load_extra(self, path: Path, targets: Mapping[str, Tensor]) -> None:
        """Fill tensors, sharded as weights of the same names, from a file of all that travels."""
        layout = self.layout()
        self._group.refuse_together(lambda: read_weights(path, layout, targets))

    def set_residual(self, path: Path | None) -> None:
        """Set the frozen weights to what was loaded plus factors of a file; a collective call."""
        reshard(self._model)
        self._group.refuse_together(lambda: self._residual.set(path))

    def stage_weights(
        self, path: Path, names: Collection[str] | None = None, start: Start | None = None
    ) -> Staged:
        """Copy the weights, or those named, to be published in float32; a collective call.

        Parameters
        ----------
        path : Path
        names : collection of str or None
        start : Start or None
            What they are to be sent as an update of, by `start`; None: they are sent whole.
        """
        layout = self.layout(names)
        return self.stage(path, ((name, self.exchanged[name]) for name in layout), layout, start)

    def start(self, order_id: str, weights: Path | None) -> Start | None:
        """Return what an order's weights are to be sent as an update of; a collective call."""
        return self._writer.start(order_id, weights)

    def save_weights(self, path: Path, names: Collection[str] | None = None) -> str:
        """Publish the weights, or those named, at once; a collective call.

        Returns the sha256 of the file, or of its shards' manifest, on rank 0.
        """
        return self.stage_weights(path, names).publish()

    def stage_initial(self, path: Path) -> Staged:
        """Copy what a run begins with: the weights that travel, and frozen factors once."""
        return self.stage(path, self._initial.items(), self._layout(self._initial.items()))

    def stage(
        self,
        path: Path,
        tensors: Named,
        layout: Layout | None = None,
        start: Start | None = None,
    ) -> Staged:
        """Copy tensors that are as all of the weights, or as `layout` says, to be published."""
        reshard(self._model)
        layout = self.layout() if layout is None else layout
        wide = ((name, self._rank.widened(name, tensor)) for name, tensor in tensors)
        return self._writer.stage(path, wide, layout, start)

    def shards(self) -> list[Tensor]:
        """Return this rank's parts of the weights that travel, to be changed in place."""
        reshard(self._model)
        return [local(t).detach() for t in self.exchanged.values()]

    # Training

    def reset_optimizer(self) -> None:
        """Forget the inner optimizer's state (not the place in data and schedule)."""
        for state in self._optimizer.state.values():
            for tensor in state.values():
                local(tensor).zero_()

    def train(
        self,
        steps: int,
        so_far: OrderProgress | None = None,
        should_stop: Callable[[], Stop] = lambda: Stop.NO,
        report: Progress = lambda step, loss: None,
        algorithms: Sequence[Algorithm] = (),
    ) -> OrderProgress:
        """Take optimizer steps until the order has `steps`.

        Parameters
        ----------
        steps : int
        so_far : OrderProgress or None
            Where an interrupted order goes on.
        should_stop : callable
            Asked on every rank before each step; any rank's reason ends the order on all.
        report : callable
            Called after each step with its number and a function that waits for its loss.
        algorithms : sequence of Algorithm
            Change the gradients, one after the other.
        """
        done = dataclasses.replace(so_far or OrderProgress(), stopped=Stop.NO)
        stats: list[Tensor] = []
        tokens, began = 0, time.perf_counter()
        self._model.train()
        with uncollected():
            while done.steps < steps:
                batch = self._next_batch()
                counted, done.stopped = self._agree(batch, should_stop())
                if done.stopped:
                    break
                tokens = counted
                stats.append(self._train_step(batch, tokens, algorithms))
                if len(stats) > 1:  # of the step before: the device is busy with this one
                    self._check_finite(stats[-2], steps_ago=2)
                done.steps += 1
                done.tokens += tokens
                done.sequences += len(batch.input_ids) * self._copies
                report(done.steps, lambda at=tokens: float(stats[-1][0]) / max(1, at))  # type: ignore[misc]
        if stats:
            self._check_finite(stats[-1], steps_ago=1)
            self._account(done, stats, tokens)
        done.seconds += time.perf_counter() - began
        return done

    def _parameters(self) -> list[Tensor]:
        return list(self._trained.values())

    @property
    def _per_step(self) -> int:
        """Sequences of this rank (or group of tensor ranks) in a step."""
        return self._config.micro_batch * self._config.accumulation

    def _next_batch(self) -> Batch:
        first = self.cursor.first(self._copy, self._per_step)
        return self._batches.get(first, then=first + self._per_step * self._copies)

    def _make_batch(self, first: int) -> Batch:
        batch = training_batch(self._corpus.batch(first, self._per_step), self._config)
        return batch if self._group.device.type == "cpu" else batch.pinned()

    def _agree(self, batch: Batch, stop: Stop) -> tuple[int, Stop]:
        """Return the tokens of the global batch, and the most urgent reason of any rank to stop."""
        votes = [float(stop == reason) for reason in Stop]
        tokens, *counts = self._group.total([float(count_tokens(batch.labels)), *votes])
        return int(tokens) // self._config.tensor, max(reason for reason in Stop if counts[reason])

    def _train_step(self, batch: Batch, tokens: int, algorithms: Sequence[Algorithm]) -> Tensor:
        """Take one step; return (summed loss, gradient norm) over all ranks, float32 (2,)."""
        config, device = self._config, self._group.device
        _seed(self.step * self._copies + self._copy)
        # FSDP averages over the ranks; the loss is to be averaged over all tokens.
        scale = self._group.ranks.world_size / max(1, tokens)
        loss_sum = torch.zeros((), device=device)
        for i in range(config.accumulation):
            part = slice(i * config.micro_batch, (i + 1) * config.micro_batch)
            last = i == config.accumulation - 1
            if isinstance(self._model, FSDPModule):
                self._model.set_requires_gradient_sync(config.sync_every_micro_batch or last)
                self._model.set_requires_all_reduce(last)
            loss = self._loss(batch.part(part))
            (loss * scale).backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.detach()
        if self._tensor:
            sum_gradients(self._unsummed, self._tensor.get_group())
        for algorithm in algorithms:
            algorithm.gradients()
        stats = clip(self._parameters(), config.clip, loss_sum)
        for options in self._optimizer.param_groups:
            options["lr"] = self.lr_scale * learning_rate(self.step, config, self._total_steps)
        step_if_finite(self._optimizer, stats)
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.cursor.advance(self._copies, self._per_step)
        collect_at(self.step)
        return stats

    def _loss(self, batch: Batch) -> Tensor:
        device = self._group.device
        tensors = batch.input_ids, batch.labels, batch.position_ids, batch.attention_mask
        return self._summed_loss(
            *(t if t is None else t.to(device, non_blocking=True) for t in tensors)
        )

    def _account(self, done: OrderProgress, stats: list[Tensor], last_tokens: int) -> None:
        losses, norms = torch.stack(stats).double().cpu().unbind(1)
        done.loss_sum += float(losses.sum())
        done.last_loss = float(losses[-1]) / max(1, last_tokens)
        done.last_grad_norm = float(norms[-1])

    def _check_finite(self, stats: Tensor, steps_ago: int) -> None:
        """End training at a step that was not taken, on all ranks alike: they share its numbers."""
        if bool(stats.isfinite().all()):
            return
        config = self._config
        count = self._per_step * self._copies
        first = self.cursor.sequences - steps_ago * count
        raise DivergedError(
            f"training diverged: loss or gradient norm is not finite in step "
            f"{self.step - steps_ago + 1}, sequences {first} to {first + count - 1} of the "
            f"facility's data. Lower train.lr={config.lr} or train.clip={config.clip}"
        )

    # Evaluation

    @torch.no_grad()
    def evaluate(self) -> Evaluated:
        """Return the token-weighted loss on the held-out set; a collective call."""
        if self._held_out is None:
            # Equally many on every rank: a forward pass gathers parameters from all of them.
            self._held_out = list(
                self._corpus.held_out(self._copy, self._copies, self._config.micro_batch)
            )
        self._model.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        for batch in self._held_out:
            loss = self._loss(batch)
            counted = (batch.labels[:, 1:] != IGNORED).any(dim=1).sum()
            sums += torch.tensor([float(loss), count_tokens(batch.labels), float(counted)])
        reshard(self._model)
        self._model.train()
        loss_sum, tokens, sequences = self._group.total(sums.tolist())
        if not tokens:
            raise UserError("the held-out set has no tokens; raise data.held_out_fraction")
        tokens, sequences = (n / self._config.tensor for n in (tokens, sequences))
        return Evaluated(loss_sum / tokens, int(tokens), int(sequences))

    # Checkpoints

    def tensors(self, with_weights: bool = True) -> dict[str, Tensor]:
        """Return what a checkpoint holds besides `step`; loading fills them in place."""
        reshard(self._model)
        weights = self._trained if with_weights else {}
        found = {f"model.{name}": p.detach() for name, p in weights.items()}
        for name, parameter in self._trained.items():
            for key, value in self._optimizer.state[parameter].items():
                found[f"optimizer.{name}.{key}"] = value
        return found


def _seed(number: int) -> None:
    """Draw dropout, and what else a model draws, by the step.

    So another job goes on as this one would have, and no generator's state has to be saved.
    """
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)
