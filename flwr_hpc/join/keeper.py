"""What a site needs on its host when it is started from another machine, over SSH.

``python -m flwr_hpc.join.keeper ACTION FOLDER`` is typed by `flwr_hpc.run`, not by people. The site
outlives the connection and the one who started it; its folder says which process it is. Each action
writes JSON, one object per line:

  look      whether the site is there, and how it ended
  start     `flwr_hpc.join` with the words that follow, unless it is there already
  follow    what it writes, from an offset of its log, until it ends
  release   end what is left of an earlier connection: it holds the port that the site knows
  end       end the site and its jobs
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from flwr_hpc.files import lock, publish, read_json

POLL_S = 0.25
BEAT_S = 15.0  # a word for who follows; where nobody does, it ends
START_S = 20.0  # for a new process to write down who it is
END_S = 90.0  # for a site to cancel its jobs
SSHD = "sshd"
LOG, HELD, ENDED, LINE = "site.log", "held.json", "ended.json", "line.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Do one action."""
    action, folder, *words = sys.argv[1:] if argv is None else argv
    os.umask(0o077)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    if action == "hold":
        return _hold(path, words)
    if action == "follow":
        return _follow(path, int(words[0]))
    actions = {"look": look, "start": start, "release": release, "end": end}
    print(json.dumps(actions[action](path, *words)), flush=True)
    return 0


def look(folder: Path) -> dict[str, Any]:
    """Return ``state`` (``running``, ``elsewhere``, ``ended``, ``none``), ``host`` and ``code``."""
    held = read_json(folder / HELD)
    if held is None:
        return {"state": "none", "host": _host(), "code": None}
    runs = _is_site(int(held["pid"]), folder)  # before its last word is looked for: it may end now
    ended = read_json(folder / ENDED)
    code = ended["code"] if ended else None
    if ended is None and held["host"] != _host():  # one of several login nodes
        return {"state": "elsewhere", "host": held["host"], "code": None}
    if runs:
        return {"state": "running", "host": _host(), "code": None}
    return {"state": "ended", "host": _host(), "code": code}


def start(folder: Path, *words: str) -> dict[str, Any]:
    """Start the site in a session of its own unless it is there; return what `look` says."""
    with lock(folder):  # two who start at once start one
        found = look(folder)
        if found["state"] in ("running", "elsewhere"):
            return found
        for name in (HELD, ENDED):
            (folder / name).unlink(missing_ok=True)
        command = [sys.executable, "-m", "flwr_hpc.join.keeper", "hold", str(folder), *words]
        with open(folder / LOG, "ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder,
                start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + START_S
        while not (folder / HELD).exists() and process.poll() is None:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return look(folder)


def release(folder: Path) -> dict[str, Any]:
    """End the server's end of an earlier connection, unless it is this one."""
    line = read_json(folder / LINE)
    mine = [pid for pid, name in _ancestors() if name.startswith(SSHD)]
    if line is None or line["host"] != _host() or line["pid"] in mine:
        return {"released": 0}
    try:
        name = Path(f"/proc/{line['pid']}/comm").read_text()
        if not name.startswith(SSHD):
            return {"released": 0}
        os.kill(int(line["pid"]), signal.SIGTERM)
    except OSError:
        return {"released": 0}
    return {"released": line["pid"]}


def end(folder: Path) -> dict[str, Any]:
    """End the site and its jobs; return what it was, and what could not be ended."""
    found = look(folder)
    if found["state"] in ("none", "elsewhere"):
        return {**found, "left": ""}
    pid, deadline = int((read_json(folder / HELD) or {})["pid"]), time.monotonic() + END_S
    if found["state"] == "running":
        with suppress(OSError):
            os.kill(pid, signal.SIGTERM)
    while _is_site(pid, folder):
        if time.monotonic() > deadline:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)
    return {**found, "left": _cancel(folder)}


def _hold(folder: Path, words: Sequence[str]) -> int:
    """Be the site; write down which process this is, and how it ended."""
    publish(folder / HELD, json.dumps({"pid": os.getpid(), "host": _host()}))
    code = 1
    try:
        from flwr_hpc.join.__main__ import main as join

        code = join(words)
    except SystemExit as exc:  # of argparse
        code = exc.code if isinstance(exc.code, int) else 1
    finally:
        publish(folder / ENDED, json.dumps({"code": code}))
    return code


def _follow(folder: Path, offset: int) -> int:
    """Write the site's log line by line, as JSON, and its exit code when it has ended."""
    sshd = next((pid for pid, name in _ancestors() if name.startswith(SSHD)), 0)
    publish(folder / LINE, json.dumps({"pid": sshd, "host": _host()}))
    parent, beat = os.getppid(), time.monotonic()
    with suppress(BrokenPipeError):
        while os.getppid() == parent:  # else nobody reads this any more
            found = look(folder)  # before the log, so that no last word is missed
            for line, end_of_line in _lines(folder / LOG, offset):
                offset = end_of_line
                _say(line=line, offset=offset)
            if found["state"] != "running":
                _say(code=1 if found["code"] is None else found["code"])
                return 0
            if time.monotonic() - beat > BEAT_S:
                beat = time.monotonic()
                _say(offset=offset)
            time.sleep(POLL_S)
    os._exit(0)  # standard output is closed: nothing is to be flushed


def _lines(log: Path, offset: int) -> Iterator[tuple[str, int]]:
    """Return the complete lines from an offset, each with where it ends."""
    if not log.exists():
        return
    with open(log, "rb") as file:
        file.seek(offset)
        data = file.read()
    for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
        offset += len(line)
        yield line.decode(errors="replace").rstrip(), offset


def _say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def _cancel(folder: Path) -> str:
    """Cancel what a site that was killed has left; return what could not be."""
    from flwr_hpc.errors import UserError
    from flwr_hpc.server.driver import cancel_jobs
    from flwr_hpc.server.run_dir import RunDir

    site = RunDir(folder / "site")
    if not (site.path / "config.yaml").exists():
        return ""
    try:
        with site.lock():
            return cancel_jobs(site, site.config())
    except (UserError, OSError) as exc:
        return str(exc)


def _is_site(pid: int, folder: Path) -> bool:
    """Whether a process is the site of this folder; numbers are given anew after a reboot."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z" and b"hold" in words and os.fsencode(str(folder)) in words


def _ancestors() -> Iterator[tuple[int, str]]:
    """Return number and name of the processes above this one."""
    pid = os.getppid()
    while pid > 1:
        try:
            name, rest = Path(f"/proc/{pid}/stat").read_text().split("(", 1)[1].rsplit(")", 1)
        except OSError:
            return
        yield pid, name
        pid = int(rest.split()[1])


def _host() -> str:
    return socket.gethostname()


if __name__ == "__main__":
    sys.exit(main())
