"""Centres that share nothing train one model, and nobody is in who does not belong."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest
from worlds.hosts.stranger import AS_NOBODY, needs_another_user, open_to_others
from worlds.jobs import below, command_line, connections
from worlds.network.ports import reserve_port
from worlds.runs.centres import Centres
from worlds.runs.run import ROOT

from flwr_hpc.config.invitation import read_invitation
from flwr_hpc.errors import UserError
from flwr_hpc.exchange.http_client.connection import Credential
from flwr_hpc.gate.certificate import new_certificate, new_key_pair
from flwr_hpc.join import server_door

pytestmark = pytest.mark.slow

# Small payloads, too, travel over the exchange; whoever waited for what is lost would do so long.
SETTINGS = (
    *("exchange.inline_below_mb=0", "federation.reply_grace_s=3600", "federation.wait_s=5"),
    *("federation.retries=10", "rounds=3", "train.steps=300"),  # goes on while it is looked at
)
ASK = """
import http.client, ssl, sys
context = ssl._create_unverified_context()
for path in ("/v1/control/start-run", "/v1/runtime/x", "/v1/fleet/pull-messages", "/v1/join", "/",
             "/v1/exchange/global/" + "a" * 64 + ".payload"):
    connection = http.client.HTTPSConnection("127.0.0.1", int(sys.argv[1]), context=context)
    connection.request("POST", path, body=b"x")
    print(connection.getresponse().status)
"""


@dataclass(frozen=True)
class Examined:
    """What the doctor found of an invitation."""

    code: int
    findings: dict[str, dict[str, str]]  # by check


@dataclass
class Seen:
    """What happened while the run went on."""

    centres: Centres
    codes: dict[str, int] = field(default_factory=dict)
    public: list[int] = field(default_factory=list)  # What strangers were answered, by socket
    local: list[int] = field(default_factory=list)
    node: str = ""  # What an unregistered SuperNode said
    invited: dict[str, object] = field(default_factory=dict)
    revoked: str = ""
    wrong_certificate: str = ""
    another_token: int = 0
    listening: dict[str, set[str]] = field(default_factory=dict)
    modes: dict[str, str] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)
    doctor: dict[str, Examined] = field(default_factory=dict)  # by what was examined


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    centres = Centres(tmp_path_factory.mktemp("centres"), *SETTINGS)
    seen = Seen(centres)
    try:
        _go_through(seen)
        yield seen
    finally:
        centres.end()


def _go_through(seen: Seen) -> None:
    centres = seen.centres
    centres.join("a", "json")
    centres.until(lambda: centres.events("supernode_started"))
    _knock(seen)  # the run waits for b meanwhile, however long it takes
    _invite_and_revoke(seen)
    centres.join("b", "logging")
    centres.until(lambda: all(_orders(centres, site) for site in "ab"))
    _look_around(seen)
    centres.kill_supernode("b")
    centres.commands["a"].kill()
    centres.join("a", "json")
    centres.until(lambda: all(_starts(centres, site) >= 2 for site in "ab"))
    centres.until(lambda: centres.events("aggregated"))
    centres.commands["server"].kill()
    centres.serve(f"resume={centres.run}")
    seen.codes = centres.codes()


def _starts(centres: Centres, site: str) -> int:
    return [e["facility"] for e in centres.events("supernode_started")].count(site)


def _orders(centres: Centres, site: str) -> list[Path]:
    return list((centres.base / site).glob("here/facilities/*/orders/*/progress.json"))


def _look_around(seen: Seen) -> None:
    centres = seen.centres
    local = 0
    for name, command in centres.commands.items():
        for process in below(psutil.Process(command.process.pid)):
            line = command_line(process)  # first: a fork has its parent's line, and its sockets
            for c in connections(process):
                if c.status == psutil.CONN_LISTEN and "submitit" not in line:
                    public = c.laddr.port == centres.port
                    seen.listening.setdefault(name, set()).add("public" if public else c.laddr.ip)
                    local = c.laddr.port if name == "server" and not public else local
    for port, answers in ((centres.port, seen.public), (local, seen.local)):
        command = [*AS_NOBODY, sys.executable, "-c", ASK, str(port)]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/")
        answers += [int(line) for line in done.stdout.split()]
        assert done.returncode == 0, done.stderr
    invitation = centres.base / "a" / "invitation.json"
    seen.modes = open_to_others(centres.run, centres.base / "a" / "here") | (
        {str(invitation): "others"} if invitation.stat().st_mode & 0o077 else {}
    )
    b = read_invitation(centres.base / "b" / "invitation.json")
    seen.another_token = _reads(centres, b.token, b.certificate, "a")


def _knock(seen: Seen) -> None:
    """Come to the public socket with what is not for this purpose, or no longer, or never was."""
    centres = seen.centres
    a = read_invitation(centres.base / "a" / "invitation.json")
    stranger, _ = new_certificate("127.0.0.1")
    with pytest.raises(UserError) as error:
        server_door.ask(replace(a, certificate=stranger))
    seen.wrong_certificate = str(error.value)
    seen.node = _unregistered_node(centres)
    seen.doctor["in use"] = _examine(centres, "a")


def _examine(centres: Centres, site: str) -> Examined:
    """Type what a person at a centre does before joining, or when something is odd."""
    command = [sys.executable, "-m", "flwr_hpc.doctor", "invitation.json", "--json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=centres.base / site, env=env)
    findings = json.loads(done.stdout)["facilities"][site]
    return Examined(done.returncode, {f["name"]: f for f in findings})


def _reads(centres: Centres, token: str, certificate: str, of: str) -> int:
    """Ask with one site's token for another's payload; return the answer's status."""
    import http.client

    credentials = json.loads((centres.run / "invitations" / "credentials.json").read_text())
    folder = centres.run / "exchange" / f"node-{credentials[of]['node_id']}"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{'b' * 64}.payload"
    (folder / name).write_bytes(b"weights of a")
    context = ssl.create_default_context(cadata=Credential(token, certificate).certificate)
    connection = http.client.HTTPSConnection("127.0.0.1", centres.port, context=context)
    headers = {"Authorization": f"Bearer {token}"}
    connection.request("GET", f"/v1/exchange/{folder.name}/{name}", headers=headers)
    answer = connection.getresponse()
    assert b"weights" not in answer.read()
    connection.close()
    (folder / name).unlink(missing_ok=True)
    return answer.status


def _unregistered_node(centres: Centres) -> str:
    key, said = centres.base / "stranger.key", centres.base / "stranger.log"
    key.write_text(new_key_pair().private_ssh)
    programs = Path(sys.executable).parent  # where it looks for its SuperExec, too
    env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    with reserve_port() as own, open(said, "wb") as out:
        command = [
            str(programs / "flower-supernode"),
            f"--superlink=127.0.0.1:{centres.port}",
            f"--root-certificates={centres.run}/tls/certificate.pem",
            f"--auth-supernode-private-key={key}",
            f"--port={own.getsockname()[1]}",
            "--max-retries=1",
        ]
        with subprocess.Popen(command, stdout=out, stderr=out, env=env) as node:
            try:
                centres.until(lambda: node.poll() is not None)
            finally:
                node.kill()
    return said.read_text()


def _invite_and_revoke(seen: Seen) -> None:
    seen.centres.change("invite", "c")
    c = read_invitation(seen.centres.invitation("c"))
    seen.invited = server_door.ask(c)
    seen.doctor["invited"] = _examine(seen.centres, "c")
    seen.centres.change("revoke", "c")
    with pytest.raises(server_door.NotInvited) as error:
        server_door.ask(c)
    seen.revoked = str(error.value)
    seen.doctor["revoked"] = _examine(seen.centres, "c")


@needs_another_user
def test_a_run_ends_well_although_a_site_and_the_server_were_killed(seen: Seen) -> None:
    """Protects a run of days: each process may die at any moment, and is started again by the same
    command; what was trained is not trained again."""
    assert seen.codes == {"server": 0, "a": 0, "b": 0}, seen.centres.said()
    assert (seen.centres.run / "model" / "model.safetensors").exists()
    done = [(e["facility"], e["order_id"]) for e in seen.centres.events("order_done")]
    assert {site for site, _ in done} == {"a", "b"}
    assert json.loads((seen.centres.run / "summary.json").read_text())["versions"] == 3
    for site in "ab":
        assert (
            len(list((seen.centres.base / site).glob("here/facilities/*/allocations/*/job"))) == 1
        )


@needs_another_user
def test_what_a_killed_supernode_held_is_asked_for_again(seen: Seen) -> None:
    """Protects a run from an hour's wait for a message that died with its SuperNode, also where the
    site's other processes live on; no order is trained or counted twice."""
    assert all(_starts(seen.centres, site) >= 2 for site in "ab")
    assert seen.centres.events("reply_lost") == []
    done = [e["order_id"] for e in seen.centres.events("order_done")]
    assert len(done) == len(set(done))


@needs_another_user
def test_strangers_get_nothing_on_either_socket(seen: Seen) -> None:
    """Protects against another user of the server's machine."""
    assert seen.public == [404, 404, 401, 404, 404, 401]
    assert set(seen.local) == {403}


@needs_another_user
def test_who_was_not_invited_is_refused(seen: Seen) -> None:
    """Protects against a SuperNode with a key of its own."""
    accepted = "SuperNode ID:"
    logs = [seen.centres.base / site / f"here/logs/supernode-{site}.log" for site in "ab"]
    assert all(accepted in log.read_text() for log in logs)
    assert "Starting Flower SuperNode" in seen.node
    assert accepted not in seen.node
    assert {e["facility"] for e in seen.centres.events("site_online")} <= {"a", "b"}


@needs_another_user
def test_a_site_reads_nothing_of_anothers(seen: Seen) -> None:
    """Protects one centre's weights from another's people."""
    assert seen.another_token == 404


@needs_another_user
def test_a_revoked_invitation_is_worth_nothing(seen: Seen) -> None:
    """Protects a run whose invitation went astray, without a restart."""
    assert seen.invited["site"] == "c"
    assert "revoked" in seen.revoked


@needs_another_user
def test_the_doctor_tells_a_good_line_from_a_used_and_a_revoked_invitation(seen: Seen) -> None:
    """Protects a centre's person before the first job: each trouble with the command for it."""
    good, used, revoked = (seen.doctor[name] for name in ("invited", "in use", "revoked"))
    assert (good.code, used.code, revoked.code) == (0, 0, 1)
    statuses = {name: f["status"] for name, f in good.findings.items()}
    assert set(statuses) == set(used.findings) == set(revoked.findings)
    assert {name for name, status in statuses.items() if status != "pass"} <= {"throughput"}
    assert statuses["throughput"] in ("pass", "warn")  # on a busy machine
    assert used.findings["credential"]["status"] == "warn"
    assert "serve revoke a RUN_DIR" in used.findings["credential"]["fix"]
    assert revoked.findings["credential"]["status"] == "fail"
    assert "serve invite c RUN_DIR" in revoked.findings["credential"]["fix"]
    assert revoked.findings["throughput"]["status"] == "skipped"
    credentials = json.loads((seen.centres.run / "invitations" / "credentials.json").read_text())
    folder = seen.centres.run / "exchange" / f"node-{credentials['c']['node_id']}"
    assert list(folder.glob("*")) == []  # what was sent to be measured


@needs_another_user
def test_a_wrong_certificate_is_explained(seen: Seen) -> None:
    """Protects a site from whoever answers in the server's place."""
    assert "another certificate" in seen.wrong_certificate


@needs_another_user
def test_one_public_port_and_no_readable_file(seen: Seen) -> None:
    """Protects all machines: what the page of ports says, and nothing else."""
    assert seen.listening == {
        "server": {"public", "127.0.0.1"}, "a": {"127.0.0.1"}, "b": {"127.0.0.1"},
    }  # fmt: skip
    assert seen.modes == {}
