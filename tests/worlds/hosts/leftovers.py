"""What is left of a part of the lab after its end."""

from __future__ import annotations

from pathlib import Path

import psutil
from lab import host


def left_of(name: str, index: int | None = None) -> list[str]:
    """Return what there is of it: files, its link (and so its routes), processes, mounts."""
    paths = [host.HOME / name]
    if index is not None:
        paths.append(Path(f"/sys/class/net/lab{index}"))
    found = [str(p) for p in paths if p.exists()]
    for process in psutil.process_iter(["cmdline", "environ"]):
        words = [*(process.info["cmdline"] or []), *(process.info["environ"] or {}).values()]
        if any(f"{host.HOME}/{name}/" in word for word in words):
            found.append(f"{process.pid} {process.info['cmdline']}")
    with open("/proc/mounts") as mounts:
        return found + [line for line in mounts if f"/{name}/" in line]
