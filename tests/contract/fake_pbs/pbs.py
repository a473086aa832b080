"""The commands of a PBS of one host that really runs jobs, and what is kept of them.

What it answers, codes and words, is what a real OpenPBS 23.06.06 was seen to answer on
2026-11-21 (server, scheduler, comm, three MoMs); words that were not written down then are those
of its source of that version (tag v23.06.06): ``pbs_messages.c``, ``qsub.c``, ``qstat.c``.

Everything lies in ``$FAKE_PBS``:

    N.json       job N.pbshost, written by its supervisor alone
    N.do         what is done to it: delete, rerun, nodefail, hold, release, suspend, resume
    down         the server does not answer
    full         jobs stay queued; the text, if any, is when they are planned to start (Unix time)
    no_history   job_history_enable is off, as it is by default
    refuse       a code of `REFUSALS` that qsub answers with
    max_queued   so many jobs a user may have in the queue, running ones included
    asked.log    every qstat
    kill_delay   seconds between SIGTERM and SIGKILL (1)
"""

import getpass
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(os.environ["FAKE_PBS"])
SERVER = "pbshost"
RESOURCES = {"select", "place", "walltime", "filesystems"}
IN_CHUNK = {"ncpus", "ngpus", "mpiprocs", "mem", "system"}
CPUS = 64  # of a node
# Refusals that pass; of 39, 196 and 198 the codes were seen, the words are the source's.
REFUSALS = {
    38: "would exceed queue {queue}'s per-user limit",
    39: "would exceed user {user}'s limit on resource ncpus in queue {queue}",
    173: "Queue is not enabled",
    196: "Resource temporarily unavailable",
    198: "Maximum number of jobs already in queue {queue}",
}
NO_HISTORY = "PBS is not configured to maintain job history"
SUBSTATES = {"Q": 10, "H": 20, "R": 42, "S": 45, "E": 50}


def fail(code, text):
    sys.stderr.write(text + "\n")
    sys.exit(code)


def path(number):
    return HOME / f"{number}.json"


def save(job):
    job["mtime"] = time.time()
    draft = HOME / f".{job['number']}.tmp"
    draft.write_text(json.dumps(job))
    draft.replace(path(job["number"]))


def jobs():
    found = sorted(HOME.glob("*.json"), key=lambda p: int(p.stem))
    return [json.loads(p.read_text()) for p in found]


def find(job_id):
    """Return a job by ``21`` or ``21.pbshost``."""
    number = job_id.partition(".")[0]
    if not path(number).exists():
        return None
    return json.loads(path(number).read_text())


def qsub(args):
    if (HOME / "down").exists():
        fail(162, f"qsub: cannot connect to server {SERVER} (errno=15010)")
    if not Path(args[-1]).exists():
        fail(1, "qsub: script file:: No such file or directory")
    if not args[args.index("-o") + 1].isascii():
        fail(2, "qsub: illegal -o value\nusage: qsub [-a date_time] [-A account_string]")
    text = Path(args[-1]).read_text()
    options = list(zip(args[:-1:2], args[1:-1:2], strict=True))
    for line in re.findall(r"^#PBS (.*)$", text, re.M):
        words = shlex.split(line)
        options += zip(words[::2], words[1::2], strict=True)
    resources = dict(v.split("=", 1) for k, v in options if k == "-l")
    given = {k: v for k, v in options if k != "-l"}
    check(given, resources)
    number = 1
    while True:
        try:
            os.close(os.open(HOME / f"{number}.sh", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            break
        except FileExistsError:
            number += 1
    (HOME / f"{number}.sh").write_text(text)
    now = time.time()
    nodes, chunk = chunks(resources["select"])
    save(
        {
            "number": number, "name": given["-N"], "queue": given.get("-q", "workq"),
            "account": given.get("-A"), "resources": resources, "nodes": nodes, "chunk": chunk,
            "variables": dict([given["-v"].split("=", 1)]) if "-v" in given else {},
            "rerun": given.get("-r", "y") == "y", "output": given["-o"], "state": "Q",
            "ctime": now, "etime": now, "runs": 0, "workdir": os.getcwd(), "comment": "",
        }
    )  # fmt: skip
    subprocess.Popen(
        [Path(sys.argv[0]).with_name("pbs_mom"), str(number)],
        stdin=-3, stdout=-3, stderr=-3, start_new_session=True, cwd="/",
    )  # fmt: skip
    print(f"{number}.{SERVER}")


def check(given, resources):
    queue, refuse, limit = given.get("-q", "workq"), HOME / "refuse", HOME / "max_queued"
    living = sum(job["state"] != "F" for job in jobs())
    full = limit.exists() and living >= int(limit.read_text())
    if full or refuse.exists():
        code = int(refuse.read_text()) if refuse.exists() else 38
        fail(code, "qsub: " + REFUSALS[code].format(queue=queue, user=getpass.getuser()))
    if given.get("-q") == "refused":
        fail(170, "qsub: Unknown queue")
    if len(given["-N"]) > 15:
        fail(165, "qsub: Job name is too long")
    for name in {*resources, *chunks(resources["select"])[1]} - RESOURCES - IN_CHUNK:
        fail(187, f"qsub: Unknown resource Resource_List.{name}")
    if not re.fullmatch(r"\d+:\d\d:\d\d", resources["walltime"]):
        fail(166, "qsub: Illegal attribute or resource value Resource_List.walltime")
    if seconds(resources["walltime"]) > 1000 * 3600:
        fail(188, "qsub: Job violates queue and/or server resource limits")


def chunks(select):
    count, _, rest = select.partition(":")
    return int(count), dict(part.split("=") for part in rest.split(":") if part)


def seconds(text):
    hours, minutes, rest = map(int, text.split(":"))
    return 3600 * hours + 60 * minutes + rest


def qstat(args):
    with open(HOME / "asked.log", "a") as log:
        log.write(" ".join(args) + "\n")
    history = "-x" in args
    if "-u" in args:
        fail(2, "qstat: conflicting options")
    answer = {"timestamp": int(time.time()), "pbs_version": "23.06.06", "pbs_server": SERVER}
    if (HOME / "down").exists():
        print(json.dumps(answer, indent=4))
        fail(255, f"qstat: cannot connect to server {SERVER} (errno=111)")
    if history and (HOME / "no_history").exists():
        print(json.dumps(answer, indent=4))
        sys.stderr.write(f"{NO_HISTORY}\n")  # and exits with 0: qstat.c makes it one
        return
    ids = [a for a in args if a[0].isdigit()]
    found = [find(i) for i in ids[:1]] if ids else jobs()
    for job_id, job in zip(ids, found, strict=False):
        if job is None or (job["state"] == "F" and (HOME / "no_history").exists()):
            print(json.dumps(answer, indent=4))
            fail(153, f"qstat: Unknown Job Id {job_id}")
        if job["state"] == "F" and not history:
            print(json.dumps(answer, indent=4))
            words = "use -x or -H to obtain historical job information"
            fail(35, f"qstat: {job_id} Job has finished, {words}")
    shown = {f"{j['number']}.{SERVER}": show(j) for j in found if history or j["state"] != "F"}
    print(json.dumps({**answer, **({"Jobs": shown} if shown else {})}, indent=4))


def show(job):
    hosts = [f"node{chr(97 + k)}" for k in range(job["nodes"])]
    cpus = int(job["chunk"].get("ncpus", CPUS))
    body = {
        "Job_Name": job["name"],
        "Job_Owner": f"{getpass.getuser()}@login",
        "job_state": job["state"],
        "queue": job["queue"],
        "server": SERVER,
        "ctime": time.ctime(job["ctime"]),
        "mtime": time.ctime(job["mtime"]),
        "qtime": time.ctime(job["ctime"]),
        "etime": time.ctime(job["etime"]),
        "Rerunable": str(job["rerun"]),
        "Resource_List": {
            **job["resources"],
            "ncpus": cpus * job["nodes"],
            "nodect": job["nodes"],
        },
        "substate": job.get("substate", SUBSTATES.get(job["state"])),
        "Variable_List": {k: int(v) if v.isdigit() else v for k, v in job["variables"].items()},
    }
    if job["comment"]:
        body["comment"] = job["comment"]
    if job["runs"]:
        body |= {"run_count": job["runs"], "stime": time.ctime(job["stime"])}
    if job["state"] in "RESF" and job["runs"]:
        body["exec_host"] = "+".join(f"{h}/0*{cpus}" for h in hosts)
        body["exec_vnode"] = "+".join(f"({h}:ncpus={cpus})" for h in hosts)
    if "used" in job:
        minutes, rest = divmod(int(job["used"]), 60)
        used = f"{minutes // 60:02}:{minutes % 60:02}:{rest:02}"
        body["resources_used"] = {"cput": "00:00:01", "mem": "16768kb", "walltime": used}
    if "exit" in job:
        body["Exit_status"] = job["exit"]
    if "obit" in job:  # also of a run before this one
        body["obittime"] = time.ctime(job["obit"])
    plan = HOME / "full"
    if job["state"] == "Q" and plan.exists() and plan.read_text():
        start = time.ctime(float(plan.read_text()))
        body["estimated"] = {"exec_vnode": "(nodea:ncpus=1)", "start_time": start}
    return body


def qdel(args):
    if (HOME / "down").exists():
        fail(162, f"qdel: cannot connect to server {SERVER} (errno=15010)")
    job = find(args[-1])
    if job is None:
        fail(153, f"qdel: Unknown Job Id {args[-1]}")
    if job["state"] == "F":
        if (HOME / "no_history").exists():
            fail(153, f"qdel: Unknown Job Id {args[-1]}")
        fail(35, f"qdel: Job has finished {args[-1]}")
    (HOME / f"{job['number']}.do").write_text("delete")
