"""What it means that sbatch, squeue or scancel fails: a table of Slurm's words.

The commands exit with 1 and print the words of an error number: ``slurm_errno.c`` of Slurm 20.02
to 26.11, where they have hardly changed; options that sbatch itself refuses: ``slurm_opt.c`` and
``opt.c`` of 22.05. What is not in the table is no answer.
"""

from __future__ import annotations

import re

from flwr_hpc.schedulers.base import Failure
from flwr_hpc.schedulers.command import Answer

# Of a living job; of an ended one, where the cluster keeps no accounting.
_ABSENT = ("invalid job id", "accounting storage is disabled")

# Of a job that is not taken now. Above the words of ESLURM_ACCOUNTING_POLICY slurmctld puts which
# limit it is; one on how many jobs may be submitted passes as others end.
_NOT_YET = re.compile(
    r"max_?submit_?jobs?|grp_?submit_?jobs?|job_?count limit reached|job queue full"
    r"|requested nodes are busy|required ports are in use"
    r"|required partition not available|partition in down state|required node not available"
    r"|system submissions disabled|reservation not usable now|requested reservation is in use"
)
_REFUSED = (
    "invalid partition name specified",
    "no partition specified or system default partition",
    "access/permission denied",
    "user's group not permitted to use this partition",
    "requested nodes not in this partition",
    "more processors requested than permitted",
    "node count specification invalid",
    "job size specification needs to be provided",
    "job script not specified",
    "pathname of a file, directory or other parameter too long",
    "requested node configuration is not available",
    "requested partition configuration not available now",
    "task distribution specification invalid",
    "task count specification invalid",
    "invalid feature specification",
    "invalid preferred feature specification",
    "invalid extra constraints specification",
    "requested operation not supported on this system",
    "job dependency problem",
    "only batch jobs are accepted or processed",
    "memory required by task is not available",
    "invalid account",
    "invalid qos specification",
    "invalid wckey specification",
    "invalid license specification",
    "job violates accounting/qos policy",
    "requested time limit is invalid",
    "time limit specification required",
    "invalid time-min specification",
    "invalid time specified",
    "access denied to requested reservation",
    "requested reservation is invalid",
    "job cannot be submitted without the current working directory",
    "cpu count specification invalid",
    "invalid generic resource (gres) specification",
    "invalid gres specification",
    "duplicate generic resource (gres) specification",
    "requested gres option unsupported",
    "invalid trackable resource (tres) specification",
    "invalid node name specified",
    "burst buffer permission denied",
    "burst buffer request invalid",
    "invalid mcs_label specified",
    "job --batch option is invalid",
    "multiple partition job request not supported",
    "cannot request more threads per core than the job allocation",
    "container support is not configured",
    "restrictedcorespergpu",
    "invalid cluster name",
    "unspecified error",  # a job_submit plugin of the centre, below its own words
    "cli_filter plugin terminated with error",
)
# sbatch's own, before it asks slurmctld.
_USAGE = re.compile(
    r"unrecognized option|invalid option|option '.*' (is ambiguous|requires an argument)"
    r"|invalid --?\S+ (specification|argument|option)|is not a valid node count"
    r"|(are|is) mutually exclusive|invalid number of (tasks|cpus|nodes)"
    r"|invalid directive found in batch script|does not look like a batch script"
    r"|invalid partition specified|too few processes for the requested"
)


def classify(answer: Answer) -> Failure:
    """Return what a command's failure says; one that was killed says nothing."""
    words = answer.err.lower()
    if answer.program != "sbatch":
        return "absent" if any(known in words for known in _ABSENT) else "no answer"
    if _NOT_YET.search(words):
        return "not yet"
    refused = any(known in words for known in _REFUSED) or _USAGE.search(words)
    return "refused" if refused else "no answer"
