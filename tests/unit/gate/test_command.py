"""The command that puts Flower's programs behind the gate, and the ports it serves on."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
from worlds.hosts.stranger import AS_NOBODY, needs_another_user

from flwr_hpc.flower.processes import reserve_port
from flwr_hpc.gate import __main__ as command
from flwr_hpc.gate import peers

TAKE = """
import socket, sys
for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, option, 1)
        thief.bind((sys.argv[1], int(sys.argv[2])))
        print("taken")
"""


ENDS_ITS_WORK = """
import threading, time
from flwr_hpc.gate import __main__ as gate
gate._program = lambda name: threading.Thread(target=time.sleep, args=(3600,)).start
gate.leave(gate.main(["--shared-host", "flower-supernode"]))
"""


def test_a_program_that_has_ended_its_work_ends() -> None:
    """Protects a site whose SuperNode gives its server up over a bad line: its own server's thread
    kept the process, which did nothing any more and was never started again."""
    done = subprocess.run([sys.executable, "-c", ENDS_ITS_WORK], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ended its work" in done.stderr


def test_it_refuses_before_it_starts_where_owners_cannot_be_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects users of other systems: nothing listens before they have agreed to what it means."""
    monkeypatch.setattr(peers, "can_tell", lambda *_: False)
    monkeypatch.setattr(command, "_program", lambda _: pytest.fail("started"))
    assert command.main(["flower-superlink", "--insecure"]) == 2
    assert "--shared-host" in capsys.readouterr().err


def test_shared_host_starts_it_and_says_what_that_means(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects users from forgetting what they agreed to; the program gets its own arguments."""
    given = []
    monkeypatch.setattr(peers, "can_tell", lambda *_: False)
    monkeypatch.setattr(command, "keep_files_private", lambda: None)
    monkeypatch.setattr(command, "_program", lambda _: lambda: given.append(sys.argv))
    monkeypatch.setattr(sys, "argv", ["python"])
    assert command.main(["--shared-host", "flower-superlink", "--port=1", "--insecure"]) == 0
    assert given == [["flower-superlink", "--port=1", "--insecure"]]
    assert "can run code as you" in capsys.readouterr().err


@pytest.mark.parametrize("name", command.PROGRAMS)
def test_programs_are_those_of_flower(name: str) -> None:
    """Protects against Flower's moves inside its package: what counts is its console script."""
    assert command._program(name).__module__.startswith("flwr.")


@needs_another_user
@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_reserved_port_is_no_other_users(address: str) -> None:
    """Protects SuperNodes, which run what they are sent, from a stranger who takes the port of a
    SuperLink that died."""
    with reserve_port() as port:
        thief = [*AS_NOBODY, sys.executable, "-c", TAKE, address, str(port)]
        done = subprocess.run(thief, capture_output=True, text=True)
        assert "Address already in use" in done.stderr
        assert done.stdout == ""


def test_a_reserved_port_is_for_a_server_that_knows_of_it() -> None:
    """Protects against a server that came round the gate: it cannot even start."""
    with reserve_port() as port:
        with pytest.raises(OSError, match="in use"):
            socket.create_server(("127.0.0.1", port))
        for _ in range(2):  # and again, when it is restarted
            with socket.create_server(("127.0.0.1", port), reuse_port=True):
                pass
