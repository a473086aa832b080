"""A fork in place of a program: it looks, prints, ends and dies as the program would."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flwr_hpc.site.launcher import SESSION_MARK
from flwr_hpc.site.start import program

SERVER = """
import os, socket, sys, time
from flwr_hpc.site.start.fork_server import ForkServer
with socket.socket(socket.AF_UNIX) as door:
    door.bind(sys.argv[1] + ".deaf")
    door.listen()
    os.rename(sys.argv[1] + ".deaf", sys.argv[1])  # who sees it is heard
    request = ForkServer(door).serve()
request.become()
word = sys.argv[1]
if word == "tell":
    print(os.getcwd(), os.environ["WORD"], sys.argv[2:], sys.stdin.read(), flush=True)
    print("a warning", file=sys.stderr)
    print(os.environ["MARK_NAME"] in os.environ, flush=True)
elif word == "die":
    os.kill(os.getpid(), 9)
elif word == "wait":
    print(os.getpid(), flush=True)
    time.sleep(600)
sys.exit(7)
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "socket"
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(path)])
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.01)
    yield path
    process.kill()
    process.wait()


def start(path: Path, *words: str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-S", "-E", program.__file__, str(path), "/bin/echo", *words]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        **options,  # type: ignore[call-overload]
    )  # fmt: skip


def test_a_fork_is_like_the_program(server: Path, tmp_path: Path) -> None:
    """Protects ClientApps from the server they are forks of: arguments, folder, environment and
    files are the caller's, and the exit code comes back."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    env = {**os.environ, "WORD": "\udcff x", SESSION_MARK: "m", "MARK_NAME": SESSION_MARK}
    process = start(server, "tell", "a b", "-c", cwd=folder, env=env, encoding="utf-8",
                    errors="surrogateescape")  # fmt: skip
    out, err = process.communicate("input")
    assert out.splitlines() == [f"{folder} \udcff x ['a b', '-c'] input", "False"]
    assert err == "a warning\n"
    assert process.returncode == 7


def test_many_at_once(server: Path) -> None:
    """Protects a host with many sites: forks do not wait for each other."""
    processes = [start(server, "wait") for _ in range(5)]
    pids = {int(p.stdout.readline()) for p in processes if p.stdout}
    assert len(pids) == 5
    for process in processes:
        process.kill()
        process.communicate()
    while any(map(psutil.pid_exists, pids)):
        time.sleep(0.01)


def test_a_fork_that_is_killed(server: Path) -> None:
    """Protects SuperExec from waiting for ever: the program ends as its fork did."""
    process = start(server, "die")
    process.communicate()
    assert process.returncode == 128 + 9
    assert start(server, "end").wait() == 7  # and the server lives


def test_a_program_that_is_killed(server: Path) -> None:
    """Protects from ClientApps that nobody waits for any more."""
    process = start(server, "wait")
    assert process.stdout
    pid = int(process.stdout.readline())
    process.kill()
    process.communicate()
    while psutil.pid_exists(pid):
        time.sleep(0.01)


def test_without_a_server_the_program_itself_runs(tmp_path: Path) -> None:
    """Protects from a server that is not up yet, or has died."""
    out, _ = start(tmp_path / "none", "it is", "me").communicate()
    assert out == "it is me\n"
