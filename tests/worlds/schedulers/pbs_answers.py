"""What qstat says in tests."""

from __future__ import annotations

import json
import time
from typing import Any

NOBODY = '{"timestamp": 1, "pbs_version": "23.06.06", "pbs_server": "pbshost"}'
AT = "Fri Nov 20 08:23:49 2026"
AT_S = time.mktime((2026, 11, 20, 8, 23, 49, 0, 0, -1))


def job(**attributes: Any) -> dict[str, Any]:
    """A job of ours as qstat shows it."""
    mine = {"PBS_O_HOME": "/home/me", "FLWR_HPC_JOB": "mine"}
    return {"Job_Name": "flwr-mine", "job_state": "R", "Variable_List": mine, **attributes}


def answer(**jobs: dict[str, Any]) -> str:
    """qstat's answer; a job is named by its number: ``j21``."""
    return json.dumps({"Jobs": {f"{key[1:]}.pbshost": value for key, value in jobs.items()}})
