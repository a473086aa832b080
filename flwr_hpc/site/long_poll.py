"""Long polls on an injected clock."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from flwr_hpc.clock import Clock
from flwr_hpc.files import explain_disk_trouble, is_disk_trouble
from flwr_hpc.protocol import Status

T = TypeVar("T")

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 0.5
QUEUED_PAUSE_S = 5.0
DISK_PAUSE_S = 5.0


def wait(
    poll: Callable[[], Status],
    wait_s: float | None,
    until: Collection[str],
    clock: Clock,
    poll_s: float = 0.5,
) -> Status:
    """Poll until the state is one of `until`, or for `wait_s` seconds (None: without limit).

    The pauses grow from 0.05 s to 0.5 s. While a job is queued on a batch system, which is
    asked every `poll_s` seconds, they go up to 5 s: the next word may come in hours, and the
    login node is shared.
    """
    began, pause = clock.now(), FIRST_PAUSE_S
    while True:
        status = poll()
        longest = QUEUED_PAUSE_S if status.state == "queued" else LONGEST_PAUSE_S
        longest = min(longest, max(poll_s, LONGEST_PAUSE_S))
        left = longest if wait_s is None else wait_s - (clock.now() - began)
        if status.state in until or left <= 0:
            return status
        if longest > LONGEST_PAUSE_S:
            pause = max(pause, LONGEST_PAUSE_S)
        pause = min(pause, longest)
        clock.sleep(min(pause, left))
        pause *= 1.3


def once_writable(
    work: Callable[[], T], wait_s: float | None, clock: Clock, folder: Path
) -> T | Status:
    """Do a piece of work, again from the start while the disk does not let it.

    Returns
    -------
    T or Status
        What `work` returns; ``blocked`` with the reason after `wait_s` seconds (None: no limit).
    """
    began = clock.now()
    while True:
        try:
            return work()
        except OSError as exc:
            if not is_disk_trouble(exc):
                raise
            reason = explain_disk_trouble(exc, folder)
        left = DISK_PAUSE_S if wait_s is None else wait_s - (clock.now() - began)
        if left <= 0:
            return Status("blocked", reason=reason)
        clock.sleep(min(DISK_PAUSE_S, left))
