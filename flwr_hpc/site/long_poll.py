"""Long polls on an injected clock."""

from __future__ import annotations

from collections.abc import Callable, Collection

from flwr_hpc.clock import Clock
from flwr_hpc.protocol import Status

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 0.5
QUEUED_PAUSE_S = 5.0


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
