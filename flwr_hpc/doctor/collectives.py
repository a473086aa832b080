"""How fast the ranks of a job are together: collectives by group size and placement.

Runs in every rank, after they have met. As in training, all groups of a kind work at once, so
that those that share a node's network share it here, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from flwr_hpc.plan.bandwidth import MeasuredRow, placements

BYTES = {"cuda": 2**29, "cpu": 2**25}  # Of the whole array: latency no longer counts
REPEATS = 5
ENOUGH_S = 2.0  # Of one collective, over its repeats

Call = Callable[[], Any]


def measure(device: torch.device, seconds: float, size: int | None = None) -> dict[str, Any]:
    """Return the rows that were measured in time, and how many there would be; a collective call.

    Parameters
    ----------
    device : torch.device
    seconds : float
        No further row is begun after so long.
    size : int or None
        Bytes of an array; default: large.
    """
    began, world = time.monotonic(), dist.get_world_size()
    kinds = placements(world)
    rows: list[dict[str, Any]] = []
    for inner, members in kinds:
        if _largest(time.monotonic() - began, device) > seconds:
            break
        rows.append(_row(inner, members, device, size or BYTES[device.type]))
    return {"rows": rows, "kinds": len(kinds), "device": _name(device)}


def groups(world: int, inner: int, size: int) -> list[list[int]]:
    """Return the ranks of every group of `size` ranks that lie `inner` apart."""
    span = inner * size
    return [
        list(range(first + beside, first + span, inner))
        for first in range(0, world, span)
        for beside in range(inner)
    ]


def _row(inner: int, size: int, device: torch.device, nbytes: int) -> dict[str, Any]:
    world = dist.get_world_size()
    group, _ = dist.new_subgroups_by_enumeration(  # type: ignore[no-untyped-call]
        groups(world, inner, size)
    )
    count = nbytes // 4 // size * size
    whole = torch.ones(count, device=device)
    part = torch.ones(count // size, device=device)
    ring = 4 * count * (size - 1) / size / 1e9  # GB that pass through each member
    row = MeasuredRow(
        inner, size,
        all_gather=ring / _seconds(
            lambda: dist.all_gather_into_tensor(whole, part, group=group), device
        ),
        reduce_scatter=ring / _seconds(
            lambda: dist.reduce_scatter_tensor(part, whole, group=group), device
        ),
        all_reduce=2 * ring / _seconds(lambda: dist.all_reduce(whole, group=group), device),
    )  # fmt: skip
    dist.destroy_process_group(group)
    return vars(row)


def _seconds(call: Call, device: torch.device) -> float:
    """Return the best of some calls, of the slowest rank."""
    took = [_timed(call, device) for _ in range(2)]  # the first one connects
    times = int(_largest(min(REPEATS - 1, ENOUGH_S / max(took[1], 1e-9)), device))
    took += [_timed(call, device) for _ in range(times)]
    return _largest(min(took[1:]), device)


def _timed(call: Call, device: torch.device) -> float:
    _largest(0.0, device)  # all begin together
    _wait(device)
    began = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _largest(value: float, device: torch.device) -> float:
    """Return the largest of all ranks' values, so that they decide alike."""
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, NCCL"
    return "CPU, gloo"
