"""``python -m flwr_hpc.server.wandb_follow RUN_DIR``: the event log, to Weights & Biases.

A process of its own, so that neither the driver nor the ServerApp imports wandb, and nothing
that wandb does can hold up or end the run.
"""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.tracking.events import follow
from flwr_hpc.tracking.wandb_writer import WandbWriter

POLL_S = 1.0


def main(path: str) -> None:
    """Log every event that comes, until the run has finished or SIGTERM came."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    run = RunDir(Path(path))
    config = run.config()
    follower = follow(run.events)
    history = follower.poll()
    with WandbWriter(config.tracking, run.path, run.key, asdict(config), history) as writer:
        finished = False
        while not finished:
            for event in follower.poll():
                writer.log(event)
                finished = event["event"] == "run_finished"
            time.sleep(POLL_S)


if __name__ == "__main__":
    main(sys.argv[1])
