"""What the ranks of `test_residual` do; importable, so that it can be sent to processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from worlds.train.torch_ranks import tiny_trainer

from flwr_hpc.errors import UserError
from flwr_hpc.train.rendezvous import Group
from flwr_hpc.train.trainer import Trainer


def trained(
    group: Group,
    path: Path,
    weights: Path,
    residual: Path | None,
    site: int,
    to: Path,
    **options: Any,
) -> None:
    """Train a version's adapter on a site's own data, over the version's frozen weights."""
    trainer = tiny_trainer(group, lora=True, path=str(path), lr=0.05, **options)
    trainer.set_residual(residual)
    trainer.load_weights(weights)
    trainer.cursor.advance(1, 1000 * site)
    trainer.train(4 + site)
    trainer.save_weights(to)


def losses(
    group: Group, path: Path, weights: Path, residuals: list[Path | None], **options: Any
) -> list[float]:
    """Return the held-out loss of one job over one residual after the other."""
    trainer = tiny_trainer(group, lora=True, path=str(path), **options)
    trainer.load_weights(weights)
    return [_loss(trainer, residual) for residual in residuals]


def _loss(trainer: Trainer, residual: Path | None) -> float:
    trainer.set_residual(residual)
    return trainer.evaluate().loss


def plain_loss(group: Group, path: Path) -> float:
    """Return the held-out loss of a checkpoint without an adapter."""
    return tiny_trainer(group, path=str(path)).evaluate().loss


def refusal(group: Group, path: Path, residual: Path, **options: Any) -> str:
    """Return what a residual is refused with."""
    try:
        tiny_trainer(group, lora=True, path=str(path), **options).set_residual(residual)
    except UserError as exc:
        return str(exc)
    return ""
