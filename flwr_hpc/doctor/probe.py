"""What the probe job runs in every rank: look around, write down what there is.

Nothing is judged here, and nothing may raise: a rank that dies takes its report along. Runs
with whatever the compute nodes have, so torch is imported late.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flwr_hpc
from flwr_hpc.doctor.outside import reach, versions
from flwr_hpc.files import keep_files_private, publish, read_json
from flwr_hpc.worker.ranks import Ranks

PACKAGES = (
    *("flwr", "submitit", "numpy", "safetensors"),
    *("torch", "transformers", "peft", "datasets"),
)
PING_S = 120.0  # for a file of the login node to be seen
LOOK_S = 240.0  # for everything after that
MEET_S = 120.0  # for the ranks to find each other
MEASURE_S = 300.0  # for their bandwidths, where these are asked for
MEGABYTES = 64


def run(folder: str) -> None:
    """Be one rank of the probe job; `folder` is on the shared file system."""
    keep_files_private()
    here, ranks = Path(folder), Ranks.detect()
    asked = read_json(here / "ask.json") or {}
    said = _place(ranks) | {"token": asked.get("token")}
    _tell(here, "hello", ranks, {"wall": time.time()})
    said["ping"] = _await_ping(here / f"ping-{ranks.rank}.json")
    _tell(here, "pong", ranks, {"wall": time.time()})
    measuring = bool(asked.get("bandwidth"))
    look_s = LOOK_S + (MEASURE_S if measuring else 0.0)
    late = threading.Timer(look_s, _give_up, (here, ranks, said, look_s))
    late.daemon = True
    late.start()
    for key, look in (("torch", _torch), ("gpus", _gpus)):
        said[key] = _tried(look)
    said["unreachable"] = {url: reach(url) for url in asked.get("urls", [])}
    said["meeting"] = _tried(lambda: _meet(here, ranks, said, measuring))
    late.cancel()
    _tell(here, "report", ranks, said)


def _tell(here: Path, what: str, ranks: Ranks, said: dict[str, Any]) -> None:
    publish(here / f"{what}-{ranks.rank}.json", json.dumps(said))


def _tried(look: Callable[[], Any]) -> Any:
    """Return what was found; whatever goes wrong is a finding, too."""
    try:
        return look()
    except Exception as exc:
        return {"error": f"{type(exc).__name__}: {exc}"}


def _place(ranks: Ranks) -> dict[str, Any]:
    return {
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "nodes": ranks.nodes,
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "flwr_hpc": flwr_hpc.__version__,
        "packages": versions(PACKAGES),
        "cores": _cores(),
        "tmp": tempfile.gettempdir(),
        "tmp_free": shutil.disk_usage(tempfile.gettempdir()).free,
    }


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _await_ping(path: Path) -> bool:
    deadline = time.monotonic() + PING_S
    while time.monotonic() < deadline:
        os.listdir(path.parent)  # makes NFS look again
        if path.exists():
            return True
        time.sleep(0.02)
    return False


def _give_up(here: Path, ranks: Ranks, said: dict[str, Any], after_s: float) -> None:
    stages = {"meeting": "bandwidth", "unreachable": "meeting"}
    stage = next((after for before, after in stages.items() if before in said), "torch")
    said.setdefault(stage, {"error": f"no end after {after_s:.0f} s"})
    _tell(here, "report", ranks, said)
    os._exit(0)  # a collective call that hangs cannot be left otherwise


def _torch() -> dict[str, Any]:
    began = time.monotonic()
    import torch
    import transformers  # noqa: F401

    return {"cuda": bool(torch.cuda.is_available()), "seconds": time.monotonic() - began}


def _gpus() -> list[dict[str, Any]]:
    import torch

    devices = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
    return [
        {"name": d.name, "bytes": d.total_memory, "uuid": str(getattr(d, "uuid", ""))}
        for d in devices
    ]


def _meet(here: Path, ranks: Ranks, said: dict[str, Any], measuring: bool) -> dict[str, Any]:
    """Meet the other ranks as the trainer does, and time an all-reduce, or all collectives."""
    from flwr_hpc.train.rendezvous import join

    began = time.monotonic()
    group = join(here, ranks, MEET_S)
    met = {
        "ranks": round(group.total([1.0])[0]),
        "seconds": time.monotonic() - began,
        "device": group.device.type,
    }
    if ranks.world_size > 1:
        met["gigabytes_s"] = _bandwidth(group.device)
        if measuring:
            said["meeting"] = met  # should the rest hang
            said["bandwidth"] = _tried(lambda: _measure(group.device))
    group.close()
    return met


def _measure(device: Any) -> dict[str, Any]:
    from flwr_hpc.doctor.collectives import measure

    return measure(device, MEASURE_S / 2)


def _bandwidth(device: Any) -> float:
    """Return the bus bandwidth of an all-reduce in GB/s, the best of three."""
    import torch
    import torch.distributed as dist

    n = dist.get_world_size()
    data = torch.ones(MEGABYTES * 2**18 // (1 if device.type == "cuda" else 8), device=device)
    best = float("inf")
    for _ in range(4):  # the first one connects
        began = time.monotonic()
        dist.all_reduce(data)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.monotonic() - began)
    return float(data.nbytes * 2 * (n - 1) / n / best / 1e9)
