"""``python -m flwr_hpc.schedulers.local.controller FOLDER``: runs the ranks of one local job.

submitit's controller, with what a batch system does besides: one failed rank ends the job
(as ``srun --kill-on-bad-exit``), SIGTERM ends it too, and nothing is left behind.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from submitit.local.local import Controller

from flwr_hpc.schedulers.local.adapter import kill, members


class RankController(Controller):  # type: ignore[misc]
    """Starts the ranks and watches them."""

    grace_s = 5.0  # for the ranks beside a failed one to write down what they saw

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        os.environ["FLWR_HPC_CONTROLLER"] = str(os.getpid())
        signal.signal(signal.SIGTERM, self._terminate)

    def _terminate(self, signum: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not stop the clean-up
        os.write(2, b"cancelled\n")  # now: who cancels does not wait for the clean-up for ever
        raise SystemExit(1)

    def wait(self, freq: int = 24) -> Sequence[int | None]:
        """Return the exit codes once all ranks ended, one failed, or the walltime is over."""
        end = time.monotonic() + self.timeout_s
        warn = end - self.signal_delay_s
        while (now := time.monotonic()) < end:
            codes = [task.poll() for task in self.tasks]
            if None not in codes:
                break
            if any(codes):  # neither running (None) nor well ended (0)
                end = min(end, now + self.grace_s)
            elif now >= warn:
                self._forward_signal(signal.SIGUSR2)
                warn = end
            time.sleep(1.0 / freq)
        codes = [task.poll() for task in self.tasks]
        print(_verdict(codes), file=sys.stderr, flush=True)
        return codes


def _verdict(codes: Sequence[int | None]) -> str:
    bad = [f"rank {k} exited with code {code}" for k, code in enumerate(codes) if code]
    if bad:
        return ", ".join(bad)
    return "walltime exceeded" if None in codes else "completed"


def main(folder: str) -> None:
    """Run the job to its end."""
    try:
        RankController(Path(folder)).run()
    finally:
        others = members(os.environ["FLWR_HPC_JOB"], folder)
        kill([p for p in others if p.pid != os.getpid()])


if __name__ == "__main__":
    main(sys.argv[1])
