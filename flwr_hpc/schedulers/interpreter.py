"""What the Python of a job lacks, as far as this host can tell, before a wait in the queue."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.errors import UserError

TIMEOUT_S = 60.0


def probe(modules: Sequence[str]) -> str:
    """Return code that prints Python's version and which modules are missing; imports none."""
    return (
        "import sys, importlib.util as u; print('%d.%d.%d' % sys.version_info[:3], "
        f"*[m for m in {tuple(modules)} if u.find_spec(m) is None])"
    )


def check_interpreter(name: str, f: FacilityConfig, modules: Sequence[str], package: str) -> None:
    """Refuse a Python without what a job needs; pass where only the job can tell.

    Parameters
    ----------
    name : str
        The facility's.
    f : FacilityConfig
    modules : sequence of str
        What is imported in the job.
    package : str
        What to install to get them.
    """
    if f.python is None or f.container or f.setup:  # this one; or what is made in the job
        return
    try:
        done = subprocess.run(
            [f.python, "-c", probe(modules)], stdin=subprocess.DEVNULL, capture_output=True,
            text=True, errors="replace", timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):  # on the compute nodes alone, or made for them
        return
    missing = done.stdout.split()[1:]
    if done.returncode == 0 and missing:
        raise UserError(
            f"the Python of the jobs of {name}, {f.python}, lacks {', '.join(missing)}. "
            f"Fix it with: {f.python} -m pip install '{package}', or choose another one. "
            f"Add to the command: facilities.{name}.python=/path/to/python"
        )
