"""How a facility's fields have to go together; every mistake is answered with its fix.

What depends on the batch system is checked by its rules, see `flwr_hpc.schedulers.registry`.
"""

from __future__ import annotations

import re
from dataclasses import replace

from flwr_hpc.config.facility import (
    QUEUE,
    FacilityConfig,
    QueueConfig,
    queue_of,
    rows,
    walltime_s,
)
from flwr_hpc.errors import UserError, not_negative, one_of, positive

GPU_VENDORS = ("nvidia", "amd", "intel")


def check_shape(name: str, f: FacilityConfig) -> None:
    """Check a facility's fields and how they go together."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_]*", name):
        raise UserError(f"facility name '{name}' may hold letters, digits and '_' only")
    for key in ("nodes", "ranks_per_node", "cpus_per_rank"):
        positive(f"facilities.{name}.{key}", getattr(f, key))
    positive(f"facilities.{name}.poll_s", f.poll_s)
    not_negative(f"facilities.{name}.gpus_per_node", f.gpus_per_node)
    for queue in f.queues:
        walltime_s(queue.walltime or "1")
    _check_walltime(f"facilities.{name}.walltime", f.walltime)
    one_of(f"facilities.{name}.gpu_vendor", f.gpu_vendor, GPU_VENDORS)
    _check_required(f"facilities.{name}", f)
    _check_shape(f"facilities.{name}", f)
    _check_queue(f"facilities.{name}", f)


def _check_walltime(key: str, text: str) -> None:
    try:
        seconds = walltime_s(text)
    except UserError:
        raise UserError(
            f"{key}={text} is not HH:MM:SS or D-HH:MM:SS. Example: {key}=02:30:00"
        ) from None
    if seconds <= 0:
        raise UserError(f"{key}={text} must be longer than zero")


def _check_required(key: str, f: FacilityConfig) -> None:
    for name in f.required:
        if getattr(f, name, None) is None:
            known = {str(getattr(q, name)) for q in f.queues if getattr(q, name, None)}
            listed = f" Known: {', '.join(sorted(known))}." if known else ""
            raise UserError(
                f"{key}.{name} must be given.{listed} Add it to the command: {key}.{name}=VALUE"
            )


def _check_shape(key: str, f: FacilityConfig) -> None:
    """Check that ranks, GPUs and CPUs go together on a node."""
    if 0 < f.gpus_per_node < f.ranks_per_node:
        raise UserError(
            f"{key}.ranks_per_node={f.ranks_per_node} is more than its {f.gpus_per_node} GPUs per "
            f"node: a rank drives one GPU. Add to the command: "
            f"{key}.ranks_per_node={f.gpus_per_node}"
        )
    cpus = f.ranks_per_node * f.cpus_per_rank
    if f.cpus_per_node is not None and cpus > f.cpus_per_node:
        most = f.cpus_per_node // f.ranks_per_node
        fix = f"cpus_per_rank={most}" if most else f"ranks_per_node={f.cpus_per_node}"
        raise UserError(
            f"{key}: {f.ranks_per_node} ranks x {f.cpus_per_rank} CPUs are {cpus} CPUs; a node has "
            f"{f.cpus_per_node} for jobs. Add to the command: {key}.{fix}"
        )


def _check_queue(key: str, f: FacilityConfig) -> None:
    """Check nodes and walltime against the queue, and name the queues that would take them."""
    known = rows(f)
    queue = queue_of(f)
    nodes = "1 node" if f.nodes == 1 else f"{f.nodes} nodes"
    if not known or (queue is not None and _gives(queue, f.walltime)):
        return
    name = " ".join(f"{n} {v}" for n in QUEUE if (v := getattr(f, n))) or "the default partition"
    if queue is None:
        spans = ", ".join(f"{q.min_nodes} to {q.max_nodes or 'any number of'}" for q in known)
        ends = [n for q in known for n in (q.min_nodes, q.max_nodes) if n is not None]
        found = f"nodes={f.nodes}: {name} takes {spans} nodes"
        fix = f"nodes={min(ends, key=lambda n: abs(n - f.nodes))}"
    else:
        found = f"walltime={f.walltime}: {name} gives {nodes} at most {queue.walltime}"
        fix = f"walltime={queue.walltime}"
    others = "; ".join(_choose(key, f, q) for q in f.queues if _would_do(q, f))
    more = f" Or one of the queues that take {nodes} for {f.walltime}: {others}"
    raise UserError(f"{key}.{found}. Add to the command: {key}.{fix}.{more if others else ''}")


def _gives(queue: QueueConfig, walltime: str) -> bool:
    return queue.walltime is None or walltime_s(walltime) <= walltime_s(queue.walltime)


def _would_do(queue: QueueConfig, f: FacilityConfig) -> bool:
    there = replace(f, partition=queue.partition, qos=queue.qos)
    return queue_of(there) is queue and _gives(queue, f.walltime)


def _choose(key: str, f: FacilityConfig, queue: QueueConfig) -> str:
    wanted = {n: getattr(queue, n) for n in QUEUE if getattr(queue, n) != getattr(f, n)}
    return " ".join(f"{key}.{n}={value or 'null'}" for n, value in wanted.items())
