"""submitit's part in a submission: the pickle of what is to run, and the names of its files."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

from submitit.core.core import InfoWatcher, Job, PicklingExecutor

from flwr_hpc.config.facility import walltime_s
from flwr_hpc.schedulers.base import JobSpec


class SubmittedJob(Job):  # type: ignore[misc]
    """What submitit returns; the scheduler asks after it, not submitit's own watcher."""

    watcher = InfoWatcher()


class ScriptExecutor(PicklingExecutor):  # type: ignore[misc]
    """submitit's pickles and folders, with our job script and our way to submit it."""

    job_class = SubmittedJob

    def __init__(self, spec: JobSpec, script: str, submit: Callable[[Path], str]) -> None:
        super().__init__(spec.folder, max_num_timeout=0)
        self.spec, self.script, self.submit_file = spec, script, submit
        self.update_parameters(timeout_min=walltime_s(spec.facility.walltime) / 60)

    def _num_tasks(self) -> int:
        return self.spec.facility.nodes * self.spec.facility.ranks_per_node

    def _submit_command(self, command: str) -> SubmittedJob:
        draft = self.folder / f".submission_file_{uuid.uuid4().hex}.sh"
        draft.write_text(self.script)
        tasks = list(range(self._num_tasks()))
        job = SubmittedJob(self.folder, self.submit_file(draft), tasks=tasks)
        job.paths.move_temporary_file(draft, "submission_file", keep_as_symlink=True)
        return job

    # What submitit's own `_submit_command` would call.
    _make_submission_file_text = _make_submission_command = None
    _get_job_id_from_submission_command = None
