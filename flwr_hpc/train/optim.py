"""The inner optimizer, its learning rate, and what is done to gradients before it steps."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flwr_hpc.config.schema import TrainConfig
from flwr_hpc.train.parallel.tensors import holders, local


def gradient(parameter: Tensor) -> Tensor:
    """Return this rank's shard of the gradient; zeros if the loss does not depend on it."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return local(parameter.grad)


def sum_gradients(parameters: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sum gradients that come in parts over a group of ranks, all in one reduction."""
    grads = [gradient(p) for p in parameters]
    if not grads:
        return
    together = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(together, group=group)
    parts = torch.split(together, [grad.numel() for grad in grads])
    for grad, part in zip(grads, parts, strict=True):
        grad.copy_(part.view_as(grad))


def clip(parameters: list[Tensor], largest: float, loss_sum: Tensor) -> Tensor:
    """Scale gradients down to a global norm of at most `largest` (0: leave them).

    The squares of what a rank holds add up over the ranks, each divided by the number of ranks
    that hold the same; the loss comes along in the same reduction, and the device is not waited
    for, unless gradients are on the host.

    Parameters
    ----------
    parameters : list of Tensor
    largest : float
    loss_sum : Tensor ()
        Of this rank.

    Returns
    -------
    Tensor (2,), float32
        Loss and gradient norm (before clipping) over all ranks.
    """
    ranks = dist.get_world_size()
    alike = defaultdict(list)
    for p in parameters:
        alike[holders(p, ranks)].append(gradient(p))
    squares = [
        torch.nn.utils.get_total_norm(grads).square() / count for count, grads in alike.items()
    ]
    stats = torch.stack([loss_sum, torch.stack(squares).sum().to(loss_sum.device)])
    dist.all_reduce(stats)
    stats[1].sqrt_()
    if largest > 0:
        scale = torch.clamp(largest / stats[1], max=1.0)
        for grads in alike.values():
            torch._foreach_mul_(grads, scale.to(grads[0].device))
    return stats


def adamw(parameters: list[Tensor], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101); weight decay on matrices only, not on norms and biases.

    One kernel takes parameters of one mesh, so these are groups, too.
    """
    groups: dict[tuple[bool, Any], list[Tensor]] = defaultdict(list)
    for p in parameters:
        groups[p.ndim >= 2, getattr(p, "device_mesh", None)].append(p)
    beta1, beta2 = config.betas
    optimizer = torch.optim.AdamW(
        [
            {"params": some, "weight_decay": config.weight_decay if is_matrix else 0.0}
            for (is_matrix, _), some in groups.items()
        ],
        lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True,
    )  # fmt: skip
    for p in parameters:  # before the first step, so that a checkpoint can be loaded in place
        optimizer.state[p] = {
            "step": torch.zeros((), device=local(p).device),
            "exp_avg": torch.zeros_like(p.detach()),
            "exp_avg_sq": torch.zeros_like(p.detach()),
        }
    return optimizer


def step_if_finite(optimizer: torch.optim.AdamW, stats: Tensor) -> None:
    """Step, or leave weights and moments as they are if a number of `stats` is not finite.

    The kernel decides, as under a gradient scaler: the device is not waited for.
    """
    bad = (~stats.isfinite().all()).float()
    where = next(iter(optimizer.state.values()))["step"].device  # the host, if it was offloaded
    optimizer.found_inf = bad.to(where)  # type: ignore[attr-defined]
    optimizer.step()


def schedule_steps(train: TrainConfig, rounds: int) -> int:
    """Return at which cumulative step the schedule ends: it spans the run, not one round."""
    return train.schedule_steps or rounds * train.steps


def learning_rate(step: int, train: TrainConfig, total: int) -> float:
    """Return the learning rate of cumulative step `step` (from 0).

    Linear warm-up to ``lr`` over ``warmup_steps``, then cosine (arXiv 1608.03983, without
    restarts) down to ``lr * min_lr_ratio`` at step `total`, constant from there.
    """
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    progress = min(1.0, (step - train.warmup_steps) / max(1, total - train.warmup_steps))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return train.lr * (train.min_lr_ratio + (1.0 - train.min_lr_ratio) * cosine)
