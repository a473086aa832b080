"""End every process of a session once its driver is gone, however it went.

Run as ``python -S reaper.py NAME=TOKEN`` with a pipe from the driver as standard input. When the
pipe closes (the driver closed it, or died), every process of this user whose environment
holds this variable gets SIGTERM and, if it lingers, SIGKILL. Batch jobs do not
carry the mark and live on. Standard library only: it costs a few megabytes.
"""

from __future__ import annotations

import os
import signal
import sys
import time

GRACE_S = 4.0
GIVE_UP_S = 20.0
EXEC_S = 0.2  # after which what began another program shows what that got


def marked(mark: str) -> list[int]:
    """Return the live processes that carry the mark, this one excepted."""
    needle = mark.encode()
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        if int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as f:
                if needle in f.read().split(b"\0"):
                    found.append(int(name))
        except OSError:
            continue  # gone, or another user's
    return found


def end(mark: str) -> bool:
    """Terminate, then kill, what carries the mark; return whether nothing is left."""
    start = time.monotonic()
    while pids := marked(mark) or _look_again(mark):
        waited = time.monotonic() - start
        if waited > GIVE_UP_S:
            return False
        number = signal.SIGTERM if waited < GRACE_S else signal.SIGKILL
        for pid in pids:
            try:
                os.kill(pid, number)
            except OSError:
                continue
        time.sleep(0.2 if number == signal.SIGKILL else 0.5)
    return True


def _look_again(mark: str) -> list[int]:
    """A process has no environment for a moment, as it begins another program."""
    time.sleep(EXEC_S)
    return marked(mark)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while sys.stdin.buffer.read(4096):
        pass
    sys.exit(0 if end(sys.argv[1]) else 1)
