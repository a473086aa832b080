"""``python -m flwr_hpc.report FOLDER``: the report of a run, or the table and plots of a sweep."""

from __future__ import annotations

import argparse
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from flwr_hpc.errors import UserError
from flwr_hpc.sweep.folder import SweepDir
from flwr_hpc.sweep.show import report as sweep_report
from flwr_hpc.tracking.report.page import REPORT, SUMMARY, rebuild


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m flwr_hpc.report",
        description=f"Rebuild {REPORT} and {SUMMARY} of a run from its event log. "
        "Also while the run goes on, and after it was killed. Of a sweep: its table and plots.",
    )
    parser.add_argument(
        "run_dir", type=Path, help="folder of a run or a sweep, e.g. runs/2026-01-31_120000"
    )
    parser.add_argument("--open", action="store_true", help="show the report in the browser")
    options = parser.parse_args(argv)
    try:
        sweep = SweepDir.at(str(options.run_dir))
        if sweep.exists:
            sweep_report(sweep, Console())
            return 0
        rebuild(options.run_dir)
    except UserError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except OSError as exc:
        print(f"error: cannot write the report: {exc}", file=sys.stderr)
        return 2
    report = options.run_dir.resolve() / REPORT
    print(report)
    if options.open:
        webbrowser.open(report.as_uri())
    return 0


if __name__ == "__main__":
    sys.exit(main())
