"""A site's folder on its facility's shared file system: how launcher and worker talk.

Compute nodes need nothing but this folder. Every file is written under another name, synced
and renamed, so whoever sees a file sees all of it, and every process may be killed at any
moment. Every name in the folder is spelled here, and here alone. Standard library only.

::

    SITE/lock                            launcher: one at a time
        /answering.json                  launcher: `Answering`, its sign of life
        /released                        launcher: the server said that the run is over
        /left_out.json                   launcher: `LeftOut`, what the server was told
        /job_states.json                 launcher: `SchedulerAnswer`, asked for all jobs at once
        /weights/<sha256>.safetensors    launcher: received weights and extra arrays
                /<sha256>.received       launcher: as old as their arrival
        /feedback/feedback.json          worker: whose error goes with which order
                 /<order>/error-<k>-of-<n>.safetensors, error.json      worker: what a lossy
                                      codec left out of the order's update, in shards
        /cache/                          worker: prepared data
        /app/                            batch mod: the user's app
        /checkpoints/<order>@<step>/     worker: trainer state (sharded), with meta.json last
        /orders/<order>/order.json       launcher: `Order` and the files it starts from, once
                       /progress.json    worker: {"step", "steps", "loss", "tokens_per_s"}
                       /weights.safetensors, /<key>.safetensors    worker: what it trained, or,
                       /weights-<k>-of-<n>.safetensors, /weights.json     written by all ranks,
                                      their shards, and then the manifest (<key> likewise)
                       /weights-<k>-of-<n>.payload, /weights.json     or what a codec makes of it
                       /result.waits.json     worker: `Result` whose checkpoint is not written yet
                       /result.json      worker, last: `Result`
                       /result.failed.json                 launcher: the order is tried again
                       /request.pkl, reply.pkl, rank-*.pkl      batch mod: message and reply
        /allocations/<name>/settings.json     launcher: what the worker loads
                           /submitting.json   launcher: `SubmissionMark`, may be submitted
                           /job.json          launcher: the scheduler's job
                           /job/              launcher: its script, pickles and logs
                           /times.json        launcher: `JobTimes`
                           /heartbeat.json    launcher: `Heartbeat` as last seen
                           /cancelling        launcher: from here on we may have cancelled it
                           /job_ended         launcher: the scheduler called the job ended
                           /verdict.json      launcher: `Verdict`, once: of no more use
                           /reported          launcher: its failed start was answered with
                           /inbox/<order>     launcher: this allocation works on it
                           /release           launcher: end when idle
                           /state.json        worker: `WorkerState`, about once a second
                           /rendezvous-<attempt>.json    worker: where rank 0 listens, its secret
                           /turn.json         batch mod's worker: what its ranks do
"""

from flwr_hpc.spool.folders import (
    CHECKPOINT_META,
    AllocationDir,
    OrderDir,
    Spool,
    checkpoint_name,
    latest_checkpoint,
    order_of_checkpoint,
)
from flwr_hpc.spool.records import (
    Answering,
    Consequence,
    Heartbeat,
    JobTimes,
    LeftOut,
    QueueCycle,
    RecordFile,
    SchedulerAnswer,
    SubmissionMark,
    Verdict,
    WorkerState,
)

__all__ = [
    "CHECKPOINT_META",
    "AllocationDir",
    "Answering",
    "Consequence",
    "Heartbeat",
    "JobTimes",
    "LeftOut",
    "OrderDir",
    "QueueCycle",
    "RecordFile",
    "SchedulerAnswer",
    "Spool",
    "SubmissionMark",
    "Verdict",
    "WorkerState",
    "checkpoint_name",
    "latest_checkpoint",
    "order_of_checkpoint",
]
