"""What every command makes of an error: one message on stderr, and its exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable

from flwr_hpc.errors import UserError


def exit_code(run: Callable[[], int]) -> int:
    """Return what `run` returns, 2 for a user's mistake, 1 for a failing disk, 130 for Ctrl-C."""
    try:
        return run()
    except UserError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except OSError as exc:  # a full or vanished file system
        print(f"error: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
