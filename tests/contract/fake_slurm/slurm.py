"""A Slurm of one host that really runs jobs: sbatch, srun, squeue, sacct and scancel.

Which of them it is tells the name it was called by. Everything is kept in ``$FAKE_SLURM``;
a file ``down`` there makes every command fail as if slurmctld did not answer, a file ``reset``
makes sbatch fail after the job was taken, as Slurm 22.05.8 was seen to on 2026-11-21 while its
slurmctld died.
"""

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(os.environ["FAKE_SLURM"])


def jobs():
    return [json.loads(p.read_text()) for p in sorted(HOME.glob("*.json"))]


def save(job):
    draft = HOME / f".{job['id']}.tmp"
    draft.write_text(json.dumps(job))
    draft.replace(HOME / f"{job['id']}.json")


def sbatch(args):
    test = args == ["--test-only"]
    text = sys.stdin.read() if test else Path(args[-1]).read_text()
    lines = re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.M)
    options = {key: "".join(shlex.split(value)) for key, value in lines}
    if options.get("partition") == "refused":
        sys.exit("sbatch: error: invalid partition specified: refused")
    job_id = str(len(jobs()) + 1)
    if test:
        when = f"sbatch: Job {job_id} to start at {int(time.time()) + 60} using 1 processors"
        sys.stderr.write(f"{when} on nodes n1 in partition debug\n")
        return
    env = {
        **os.environ,
        "SLURM_JOB_ID": job_id,
        "SLURM_JOB_END_TIME": str(int(time.time()) + 600),
        "SLURM_NTASKS": options["ntasks-per-node"],
        "SLURM_JOB_NUM_NODES": options["nodes"],
    }
    outputs = [options[k].replace("%j", job_id) for k in ("output", "error")]
    command = ["bash", "-c", 'bash "$0"; echo $? >"$1"', args[-1], HOME / f"{job_id}.code"]
    with open(outputs[0], "ab") as out, open(outputs[1], "ab") as err:
        batch = subprocess.Popen(
            command, stdin=-3, stdout=out, stderr=err, env=env, start_new_session=True
        )
    now = int(time.time())
    job = {"id": job_id, "name": options["job-name"], "pid": batch.pid, "submit": now}
    save({**job, "state": "RUNNING", "nodes": options["nodes"], "end": "N/A"})
    if (HOME / "reset").exists():
        sys.exit("sbatch: error: Batch job submission failed: Connection reset by peer")
    print(f"Submitted batch job {job_id}")


def srun(args):
    command = args[next(i for i, a in enumerate(args) if not a.startswith("-")) :]
    options = dict(a[2:].split("=", 1) for a in args if a.startswith("--") and "=" in a)
    tasks = []
    for rank in range(int(os.environ["SLURM_NTASKS"])):
        env = {**os.environ, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        env["SLURM_NODEID"] = "0"
        names = [options[k].replace("%j", env["SLURM_JOB_ID"]) for k in ("output", "error")]
        out, err = (open(n.replace("%t", str(rank)), "ab") for n in names)  # noqa: SIM115
        tasks.append(subprocess.Popen(command, env=env, stdout=out, stderr=err))
    while any(t.poll() is None for t in tasks) and not any(t.poll() for t in tasks):
        time.sleep(0.05)
    for task in tasks:
        task.kill()
    sys.exit(max(abs(t.wait()) for t in tasks))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it may end while this is read
        return False


def select(args):
    ids = args[args.index("--jobs") + 1].split(",") if "--jobs" in args else None
    name = args[args.index("--name") + 1] if "--name" in args else None
    for job in jobs():
        if job["state"] == "RUNNING" and not alive(job["pid"]):
            code = HOME / f"{job['id']}.code"
            well = code.exists() and code.read_text().strip() == "0"
            state = "COMPLETED" if well else "FAILED"
            save(job | {"state": state, "end": int(time.time())})
    found = [j for j in jobs() if name in (None, j["name"]) and (ids is None or j["id"] in ids)]
    if ids is not None and len(ids) == 1 and not found:  # of several it just leaves some out
        sys.exit("slurm_load_jobs error: Invalid job id specified")
    return found


def squeue(args):
    with open(HOME / "asked.log", "a") as log:
        log.write(" ".join(args) + "\n")
    for j in select(args):
        when = f"{j['submit']}|{j['submit']}|{j['submit']}|{j['end']}"
        print(f"{j['id']}|{j['name']}|{j['state']}|{when}|{j['nodes']}|0|None|")


def sacct(args):
    sys.exit("Slurm accounting storage is disabled")


def scancel(args):
    name = next(a for a in args if a.startswith("--jobname=")).split("=", 1)[1]
    for job in jobs():
        if job["id"] == args[-1] and job["name"] == name and alive(job["pid"]):
            save(job | {"state": "CANCELLED", "end": int(time.time()) + 1})
            os.killpg(job["pid"], signal.SIGKILL)


if __name__ == "__main__":
    if (HOME / "down").exists():
        sys.exit("error: Unable to contact slurm controller (connect failure)")
    command = {f.__name__: f for f in (sbatch, srun, squeue, sacct, scancel)}[
        Path(sys.argv[0]).name
    ]
    with open(HOME / "lock", "a") as lock:
        if command is not srun:  # of two at once, one would undo what the other has saved
            fcntl.flock(lock, fcntl.LOCK_EX)
        command(sys.argv[1:])
