"""What it means that qsub, qstat or qdel fails: a table of PBS's error numbers.

A command exits with the number modulo 256; numbers and words: ``pbs_error.h``, ``pbs_messages.c``
and ``qsub.c`` of OpenPBS 23.06.06. What is not in the table is no answer.
"""

from __future__ import annotations

import re

from flwr_hpc.schedulers.base import Failure
from flwr_hpc.schedulers.command import Answer

UNKNOWN_JOB = 15001
FINISHED = 15139  # known to the history alone
NO_HISTORY = 15140  # asked with -x of a server that keeps none; qstat itself makes a 0 of it
_ABSENT = frozenset((UNKNOWN_JOB, FINISHED, NO_HISTORY))

# Of a job that is not taken now; the numbers that the server itself tries again after routing a
# job (`should_retry_route` in ``svr_movejob.c``) and that are no failure of its own.
_NOT_YET = frozenset(
    (
        15021,  # Queue is not enabled
        15044,  # Resource temporarily unavailable
        15046,  # Maximum number of jobs already in queue
        15142,  # would exceed a limit on jobs: of a user, group, project, or of all
        15143,  # would exceed such a limit on a resource
    )
)
_REFUSED = frozenset(
    (
        15002,  # Undefined attribute
        15003,  # Cannot set attribute, read only or insufficient permission
        15004,  # Invalid request
        15007,  # Unauthorized Request
        15008,  # Access from host not allowed, or unknown host
        15014,  # Illegal attribute or resource value
        15018,  # Unknown queue
        15022,  # Access to queue is denied
        15023,  # Bad UID for job execution
        15028,  # Queue name too long
        15029,  # No support for requested service
        15032,  # Bad attribute list structure
        15035,  # Unknown resource
        15036,  # Job violates queue and/or server resource limits
        15037,  # No default queue specified
        15039,  # Job rejected by all possible destinations
        15045,  # Bad GID for job execution
        15048,  # Resource limit exceeds allowable
        15049,  # Invalid Account
        15054,  # Invalid Job Dependency
        15055,  # Duplicate entry in list
        15108,  # Resource invalid in "select" specification
        15109,  # "-lresource=" cannot be used with "select" or "place"
        15110,  # Cannot be used with select or place
        15111,  # Cannot have "place" without "select"
        15116,  # duplicated resource within a section of a select specification
        15136,  # a hook of the centre rejected it, in its own words
        15144,  # attribute value is out of range
        15155,  # Invalid provisioning request in chunk(s)
        15156,  # Job and reservation have conflicting specification
        15162,  # Cannot have "max_walltime" without "min_walltime"
        15163,  # "min_walltime" can not be greater than "max_walltime"
        15172,  # Invalid object name
        15173,  # The job's name is too long
        15175,  # jobscript size exceeded the jobscript_max_size
        15180,  # soft_walltime is not supported with Shrink to Fit jobs
    )
)
# qsub's own, before it asks the server: it exits with 1 or 2.
_USAGE = re.compile(r"usage: qsub|qsub: illegal|directive error|illegally formed destination")
# A connection's errno may look like one of the numbers; a hook that breaks refuses nothing.
_UNANSWERED = re.compile(r"cannot connect to server|alarm call|encountered an exception")


def classify(answer: Answer) -> Failure:
    """Return what a command's failure says."""
    number = 15000 + (answer.code - 15000) % 256
    if answer.code < 0 or _UNANSWERED.search(answer.err):
        return "no answer"
    if answer.program != "qsub":
        return "absent" if number in _ABSENT else "no answer"
    if number in _NOT_YET:
        return "not yet"
    return "refused" if number in _REFUSED or _USAGE.search(answer.err) else "no answer"


def keeps_no_history(answer: Answer) -> bool:
    """Tell whether a server that was asked with -x forgets finished jobs; the code may be 0."""
    return answer.code == NO_HISTORY % 256 or "not configured to maintain job history" in answer.err
