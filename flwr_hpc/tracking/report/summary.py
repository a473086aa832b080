"""summary.json: what a run came to, in numbers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from flwr_hpc.tracking.records import FacilityState, RunState


def summarize(state: RunState, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the summary of a run.

    Parameters
    ----------
    state : RunState
    extra : dict, optional
        Further keys, e.g. ``model`` (where the trained model lies); they win over those of the
        state, a None does not.

    Returns
    -------
    dict
        JSON types only. Losses are in nats per token, ``seconds`` by phase; what is unknown is
        None. ``held_out_loss_first`` and ``_last`` are of the first and last global model that
        the facility evaluated, ``steps``, ``tokens`` and ``orders`` of finished training
        orders, ``staleness`` the mean over the replies that were aggregated. ``node_hours`` as
        `Accounts.node_hours` tells; ``queue_wait_s`` by the scheduler's times, before how many
        ``starts`` of a job (the median and the longest of the newest ones).
    ``codec`` has the orders that one has encoded, their mean ``sent_share`` of the weights' bytes,
    and ``error_last``, ``error_mean`` and ``error_max``: what it left out of an update, by norm.
    ``lora_inexactness`` is how far averages of adapters were from exact, over the versions, and
    its ``removed`` how far they would have been, in the mean, had the strategy not made them exact.
    """
    curve = state.held_out_curve()
    base: dict[str, Any] = {
        "status": state.status,
        "error": state.error or None,
        "run_key": state.run_key or None,
        "strategy": state.strategy or None,
        "rounds": state.rounds or None,
        "versions": state.version,
        "wall_s": round(state.wall_s, 3),
        "sessions": len(state.sessions),
        "model": None,
        "held_out_loss_first": curve[0][2] if curve else None,
        "held_out_loss_last": curve[-1][2] if curve else None,
        "lora_inexactness": _inexactness(state),
        "facilities": {n: _facility(f) for n, f in state.facilities.items()},
    }
    return base | {k: v for k, v in (extra or {}).items() if v is not None}


def _inexactness(state: RunState) -> dict[str, Any] | None:
    """Return the inexactness of averaged adapters, None of a run without."""
    found, unknown = state.lora_inexactness, state.lora_inexactness_unknown or None
    if not found:
        return {"unknown": unknown} if unknown else None
    values = list(found.values())
    last = found[max(found)]
    told = {"last": last, "mean": statistics.fmean(values), "max": max(values), "unknown": unknown}
    if removed := state.lora_inexactness_removed:
        told["removed"] = statistics.fmean(removed.values())
    return told


def _facility(f: FacilityState) -> dict[str, Any]:
    curve = f.held_out_curve
    seconds, node_hours = f.seconds(), f.accounts.node_hours()
    return {
        "held_out_loss_first": curve[0][2] if curve else None,
        "held_out_loss_last": curve[-1][2] if curve else None,
        "train_loss_last": f.train_loss[-1][2] if f.train_loss else None,
        "steps": f.steps,
        "tokens": f.tokens,
        "tokens_per_s": f.tokens_per_s,
        "peak_memory_gb": f.peak_memory_gb,
        "mfu": f.mfu,
        "orders": f.orders,
        "rejected": f.rejected,
        "failed": f.failed,
        "excluded": f.excluded or None,
        "staleness": f.staleness / f.merged if f.merged else None,
        "codec": _codec(f),
        "allocations": f.accounts.allocations or None,
        "node_hours": {k: round(v, 4) for k, v in node_hours.items()} if node_hours else None,
        "queue_wait_s": _waits(f),
        "seconds": {k: round(v, 3) for k, v in seconds.items()} if seconds else None,
    }


def _codec(f: FacilityState) -> dict[str, float] | None:
    if not f.encoded:
        return None
    shares = [share for _, share, _ in f.encoded]
    told = {"orders": len(shares), "sent_share": round(statistics.fmean(shares), 6)}
    if errors := [error for *_, error in f.encoded if error is not None]:
        figures = {"last": errors[-1], "mean": statistics.fmean(errors), "max": max(errors)}
        told |= {f"error_{name}": round(value, 6) for name, value in figures.items()}
    return told


def _waits(f: FacilityState) -> dict[str, float] | None:
    waits = f.accounts.queue_waits()
    if not waits:
        return None
    median, longest = round(statistics.median(waits), 3), round(max(waits), 3)
    return {"starts": f.accounts.starts, "median": median, "max": longest}
