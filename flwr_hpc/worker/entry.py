"""What submitit runs in every rank of an allocation. Imports nothing heavy by itself."""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr_hpc.files import keep_files_private

# Known by name alone: jobs do not depend on training, nor login nodes on torch.
WORKER = "flwr_hpc.train.worker"

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def work(allocation_dir: str) -> None:
    """Be one rank of the allocation in `allocation_dir`, until it ends.

    The environment holds ``FLWR_HPC_T0``, when the job began in monotonic seconds of the first
    node, and ``FLWR_HPC_WALLTIME_S``, the seconds the scheduler grants from there on.
    """
    keep_files_private()
    importlib.import_module(WORKER).run(Path(allocation_dir))


def run_rank(function: Callable[..., Any], *args: Any) -> None:
    """Call `function` in a rank that does not outlive the controller of its local job."""
    die_with(int(os.environ["FLWR_HPC_CONTROLLER"]))
    function(*args)


def die_with(parent: int) -> None:
    """Be killed when the parent process ends, however it does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        raise SystemExit("the process that started this one is gone")
