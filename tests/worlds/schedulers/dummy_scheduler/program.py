"""The dummy batch system: ``submit HOME SCRIPT``, ``list HOME``, ``end HOME ID``, ``ranks N CMD``.

A job is a session of its own, led by ``work HOME ID``; HOME/ID.json is what is known of it.
A file HOME/away makes every command fail as if the server did not answer.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path


def main(verb, *args):
    if verb == "ranks":
        ranks(int(args[0]), args[1:])
    home = Path(args[0])
    home.mkdir(parents=True, exist_ok=True)
    if (home / "away").exists() and verb != "work":
        sys.stderr.write("the dummy is away\n")
        sys.exit(3)
    {"submit": submit, "list": show, "end": end, "work": work}[verb](home, *args[1:])


def save(home, job):
    draft = home / f".{job['id']}.draft"
    draft.write_text(json.dumps(job))
    draft.replace(home / f"{job['id']}.json")


def jobs(home):
    return [json.loads(path.read_text()) for path in sorted(home.glob("*.json"))]


def submit(home, script):
    text = Path(script).read_text()
    job = {"id": str(len(jobs(home)) + 1), "word": "at work", "began": time.time(), "ended": None}
    save(home, job | {"name": re.search("^#DUMMY (.*)$", text, re.M)[1]})
    (home / f"{job['id']}.sh").write_text(text)
    command = [sys.executable, __file__, "work", str(home), job["id"]]
    leader = subprocess.Popen(command, stdin=-3, stdout=-3, stderr=-3, start_new_session=True)
    (home / f"{job['id']}.pid").write_text(str(leader.pid))
    print(job["id"])


def work(home, number):
    env = os.environ | {"DUMMY_ID": number}
    code = subprocess.call(["bash", str(home / f"{number}.sh")], env=env)
    finish(home, number, "failed" if code else "completed")


def finish(home, number, word):
    job = json.loads((home / f"{number}.json").read_text())
    save(home, job | {"word": word, "ended": time.time()})


def show(home):
    print(json.dumps(jobs(home)))


def end(home, number):
    os.killpg(int((home / f"{number}.pid").read_text()), signal.SIGKILL)
    finish(home, number, "cancelled")


def ranks(count, command):
    started = [
        subprocess.Popen(command, env={**os.environ, "PMI_RANK": str(rank)})
        for rank in range(count)
    ]
    while any(r.poll() is None for r in started) and not any(r.poll() for r in started):
        time.sleep(0.03)
    for rank in started:
        rank.kill()
    sys.exit(max(abs(rank.wait()) for rank in started))


if __name__ == "__main__":
    main(*sys.argv[1:])
