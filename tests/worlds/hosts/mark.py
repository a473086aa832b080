"""What tests run on a host to see which folders it shares with another; imports nothing of ours.

``write WORD`` leaves a file of that name in every folder that can be written to, and prints those
folders; ``find WORD`` prints where such a file can be seen; ``mounts`` prints what is mounted.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path


def mounts() -> dict[str, tuple[str, str, bool]]:
    """Return by mount point: the device, which part of it, and whether it can be written to."""
    found = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        _, _, device, part, point, options, *_ = line.split()
        if os.path.isdir(point) and not point.startswith("/proc"):
            found[point] = (device, part, "rw" in options.split(","))  # the last one is on top
    return found


def folders() -> list[str]:
    """Return every folder of what is mounted to be written to; of the rest, the upper ones."""
    tops = ["/", *(f"{top}/{name}" for top in ("", "/var", "/work") for name in _names(top or "/"))]
    points = [point for point, (_, _, writable) in mounts().items() if writable]
    below = [at for point in points for at, _, _ in os.walk(point)]
    return sorted({os.getcwd(), str(Path(__file__).parent), *tops, *below} - {"/proc"})


def _names(folder: str) -> list[str]:
    return os.listdir(folder) if os.path.isdir(folder) else []


def write(word: str) -> list[str]:
    """Leave a file wherever that is possible."""
    done = []
    for folder in folders():
        with contextlib.suppress(OSError):
            os.close(os.open(f"{folder}/{word}", os.O_CREAT | os.O_WRONLY))
            done.append(folder)
    return done


def main() -> None:
    match sys.argv[1:]:
        case ["write", word]:
            print(json.dumps(write(word)))
        case ["find", word]:
            print(json.dumps([f for f in folders() if os.path.lexists(f"{f}/{word}")]))
        case ["mounts"]:
            print(json.dumps(mounts()))


if __name__ == "__main__":
    main()
