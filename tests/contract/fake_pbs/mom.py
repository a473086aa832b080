"""The supervisor of one job of the fake PBS: waits, runs it, and ends it in PBS's manner."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pbs import CPUS, HOME, SERVER, path, save, seconds


def pbs_mom(args):
    job = json.loads(path(args[0]).read_text())
    while job["state"] != "F":
        if wait_for_start(job):
            run(job)


def todo(job):
    file, mine = HOME / f"{job['number']}.do", HOME / f"{job['number']}.doing"
    if not file.exists() or not file.read_text():  # it may be just being written
        return ""
    file.replace(mine)  # a word that comes now is for the next look
    return mine.read_text()


def wait_for_start(job):
    """Stay queued; return False if the job was deleted."""
    if int(job["chunk"].get("ncpus", 0)) > CPUS:
        job["comment"] = (
            "Can Never Run: Insufficient amount of resource: ncpus (R: 4096 A: 64 T: 64)"
        )
        save(job)
    while True:
        word = todo(job)
        if word == "delete":
            end(job, 91)
            return False
        if word in ("hold", "release"):
            job["state"] = "H" if word == "hold" else "Q"
            save(job)
        free = not (HOME / "full").exists() and "Never" not in job["comment"]
        if free and job["state"] == "Q":
            return True
        if job["state"] == "Q" and not job["comment"]:
            job["comment"] = "Not Running: Insufficient amount of resource: ncpus"
            save(job)
        time.sleep(0.03)


def run(job):
    job["runs"] += 1
    job |= {"state": "R", "stime": time.time(), "comment": "Job run at " + time.ctime()}
    job.pop("used", None)
    save(job)
    spool = HOME / f"{job['number']}.OU"
    with open(spool, "ab") as out:
        batch = subprocess.Popen(
            ["bash", HOME / f"{job['number']}.sh"], stdin=-3, stdout=out, stderr=out,
            env=environment(job), cwd=os.environ["HOME"], umask=0o077, start_new_session=True,
        )  # fmt: skip
    limit = job["stime"] + seconds(job["resources"]["walltime"])
    word, stood, now = "", 0.0, time.time()
    while batch.poll() is None:
        word = todo(job)
        if word in ("delete", "rerun", "nodefail"):
            break
        if word in ("suspend", "resume"):
            send(batch.pid, signal.SIGSTOP if word == "suspend" else signal.SIGCONT)
            job["state"] = "S" if word == "suspend" else "R"
            save(job)
        if time.time() - stood > limit:
            word = "walltime"
            break
        if time.time() - job["stime"] > 0.5:
            job["used"] = time.time() - job["stime"] - stood  # suspended time is not walltime
            save(job)
        time.sleep(0.03)
        now, before = time.time(), now
        stood += now - before if job["state"] == "S" else 0.0
    job["used"] = time.time() - job["stime"] - stood
    if job["state"] == "S":
        send(batch.pid, signal.SIGCONT)
    job["state"] = "E"
    save(job)
    code = stop(batch, 0 if word == "nodefail" else kill_delay())
    with open(job["output"], "ab") as out:
        out.write(spool.read_bytes())
    spool.unlink()
    job["obit"] = time.time()
    if word == "rerun" or (word == "nodefail" and job["rerun"]):
        job |= {"state": "Q", "comment": "", "exit": -11 if word == "rerun" else -20}
        save(job)
    elif word == "walltime":
        job["comment"] += " and exceeded resource walltime"
        end(job, 93, -29)
    elif word == "nodefail":
        end(job, 93, -20)
    elif word == "delete":
        end(job, 91, code)
    else:
        end(job, 93 if code else 92, code)


def environment(job):
    """A job gets what its script and -v give it, not the submitter's environment."""
    number = job["number"]
    hosts = [f"node{chr(97 + k)}" for k in range(job["nodes"])]
    nodefile = HOME / f"{number}.nodes"
    nodefile.write_text("".join(f"{h}\n" for h in hosts * int(job["chunk"].get("mpiprocs", 1))))
    programs = Path(sys.argv[0]).parent
    return {
        "FAKE_PBS": str(HOME), "HOME": os.environ["HOME"], "PATH": f"{programs}:{os.defpath}",
        "PBS_JOBID": f"{number}.{SERVER}", "PBS_JOBNAME": job["name"],
        "PBS_NODEFILE": str(nodefile), "PBS_O_WORKDIR": job["workdir"],
        "PBS_ENVIRONMENT": "PBS_BATCH", "PBS_QUEUE": job["queue"], "TMPDIR": "/tmp",
        "NCPUS": job["chunk"].get("ncpus", "1"), "OMP_NUM_THREADS": job["chunk"].get("ncpus", "1"),
        **job["variables"],
    }  # fmt: skip


def end(job, substate, code=None):
    job |= {"state": "F", "substate": substate, "obit": time.time()}
    job |= {} if code is None else {"exit": code}
    save(job)


def kill_delay():
    file = HOME / "kill_delay"
    return float(file.read_text()) if file.exists() else 1.0


def stop(batch, delay):
    """End what is left of the session: SIGTERM, then SIGKILL."""
    pid = batch.pid
    if delay:
        send(pid, signal.SIGTERM)
        until = time.time() + delay
        while session(pid) and time.time() < until:
            batch.poll()
            time.sleep(0.03)
    while session(pid):
        send(pid, signal.SIGKILL)
        batch.poll()
        time.sleep(0.03)
    code = batch.wait()
    return 256 - code if code < 0 else code


def send(session_id, signum):
    for pid in session(session_id):
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue


def session(session_id):
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue
        if fields[3] == str(session_id) and fields[0] != "Z":
            found.append(int(entry.name))
    return found
