"""The line to a server, before a site joins: each trouble is named, with what mends it."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from worlds.network.line import INVITATION, VERSIONS, FakeDoor

from flwr_hpc.doctor import __main__ as command
from flwr_hpc.doctor import line
from flwr_hpc.doctor.door import Rates
from flwr_hpc.doctor.findings import Finding
from flwr_hpc.join import server_door

CHECKS = ["proxy", "reach", "TLS", "clock", "credential", "versions", "throughput"]


def look(door: FakeDoor) -> dict[str, Finding]:
    found = line.look(INVITATION, lambda invitation: door)
    return {finding.name: finding for finding in found}


def bad_certificate() -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_message = "self-signed certificate"
    return error


def test_a_good_line_is_good() -> None:
    """Protects people from warnings about nothing."""
    found = look(FakeDoor())
    assert list(found) == CHECKS
    assert {f.status for f in found.values()} == {"pass"}
    assert "20.0 MB/s to the server, 40.0 MB/s from it: 1 GB takes 0.8 min" in str(found)


@pytest.mark.parametrize(
    ("change", "check", "status", "words", "fix"),
    [
        ({"error": socket.gaierror(-2, "Name or service not known")},
         "reach", "fail", "Name or service", "getent hosts vm.example.org"),
        ({"error": ConnectionRefusedError(111, "Connection refused")},
         "reach", "fail", "refused", "python -m flwr_hpc.serve resume=RUN_DIR"),
        ({"error": TimeoutError("timed out")},
         "reach", "fail", "timed out", "export https_proxy=http://HOST:PORT"),
        ({"error": OSError("Tunnel connection failed: 403 Forbidden"), "url": "http://p:3128"},
         "reach", "fail", "through http://p:3128: Tunnel connection failed",
         "let CONNECT vm.example.org:8443 pass; without it: export no_proxy=vm.example.org"),
        ({"error": bad_certificate()},
         "TLS", "fail", "self-signed", "python -m flwr_hpc.serve invite lumi RUN_DIR"),
        ({"error": ssl.SSLError(1, "wrong version number")},
         "TLS", "fail", "does not speak TLS", "openssl s_client -connect vm.example.org:8443"),
        ({"ahead_s": 9.0}, "clock", "fail", "9 s ahead", "chronyc tracking"),
        ({"ahead_s": 3.0}, "clock", "warn", "3 s ahead", "chronyc tracking"),
        ({"ahead_s": -400.0}, "clock", "fail", "400 s behind", "chronyc tracking"),
        ({"ahead_s": None}, "clock", "skipped", "did not say", ""),
        ({"status": 401}, "credential", "fail", "revoked, or replaced",
         "python -m flwr_hpc.serve invite lumi RUN_DIR"),
        ({"status": 404}, "credential", "fail", "not as the server of this run",
         "python -m flwr_hpc.serve invite lumi RUN_DIR"),
        ({"heard_s": 4.0}, "credential", "warn", "in use",
         "python -m flwr_hpc.serve revoke lumi RUN_DIR"),
        ({"folder": None}, "throughput", "skipped", "just starting", ""),
        ({"speed": Rates(0.5, 9.0)}, "throughput", "warn", "1 GB takes 33.3 min",
         "exchange.codec="),
        ({"speed": OSError("the server has no room")}, "throughput", "fail", "no room", "openssl"),
        ({"installed": {**VERSIONS, "flwr": "1.30.0"}}, "versions", "fail",
         "flwr 1.30.0 (the server has 1.41.0)", "-m pip install 'flwr=="),
        ({"env": {"http_proxy": "http://p:3128"}}, "proxy", "warn", "https_proxy is not",
         "export https_proxy=http://p:3128"),
        ({"url": "socks5h://p:1080"}, "proxy", "fail", "no HTTP proxy", "export https_proxy="),
        ({"url": "http://"}, "proxy", "fail", "names no host", "export https_proxy="),
    ],
)  # fmt: skip
def test_a_trouble_is_named_with_its_fix(
    change: dict[str, Any], check: str, status: str, words: str, fix: str
) -> None:
    """Protects whoever sits at a centre, without an account at the server."""
    door = FakeDoor()
    for name, value in change.items():
        if name in door.says:
            door.says[name] = value
        else:
            setattr(door, name, value)
    finding = look(door)[check]
    assert finding.status == status, finding
    assert words in finding.observed
    assert fix in finding.fix
    assert bool(finding.fix) == bool(fix)


def test_the_servers_newer_versions_count() -> None:
    """Protects a site whose server was updated after the invitation was written."""
    door = FakeDoor()
    door.says["versions"] = {**VERSIONS, "flwr": "1.42.0"}
    assert look(door)["versions"].status == "fail"


def test_what_needs_the_server_is_skipped_without_it() -> None:
    """Protects against a page of failures that are one."""
    door = FakeDoor()
    door.error = TimeoutError("timed out")
    found = look(door)
    statuses = [found[name].status for name in CHECKS]
    assert statuses == ["pass", "fail", "skipped", "skipped", "skipped", "pass", "skipped"]


def test_no_password_of_a_proxy_is_shown() -> None:
    """Protects what is pasted into a mail to the support."""
    door = FakeDoor()
    door.url = "http://me:secret@p:3128"
    assert "secret" not in str(look(door))
    assert "http://***@p:3128" in look(door)["proxy"].observed


@pytest.mark.parametrize(("status", "code"), [(200, 0), (401, 1)])
def test_the_command_prints_findings_and_says_by_its_code_how_it_went(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    status: int,
    code: int,
) -> None:
    """Protects scripts, and people who read."""
    path = tmp_path / "lumi.json"
    INVITATION.write(path)
    door = FakeDoor()
    door.status = status
    examine = line.examine
    monkeypatch.setattr(line, "examine", lambda overrides: examine(overrides, lambda _: door))
    assert command.main([str(path), "--json"]) == code
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] == (code == 0)
    assert [f["name"] for f in printed["facilities"]["lumi"]] == CHECKS
    assert command.main([str(path)]) == code
    out = capsys.readouterr().out
    assert "lumi, line to the server" in out
    assert ("serve invite lumi" in out) == (code == 1)


@pytest.mark.parametrize("more", [["+facility=local_a"], ["another.json"]])
def test_an_invitation_is_looked_at_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    """Protects against a look at half of what was named."""
    path = tmp_path / "lumi.json"
    INVITATION.write(path)
    assert command.main([str(path), *more]) == 2
    assert "python -m flwr_hpc.doctor INVITATION" in capsys.readouterr().err


def test_a_proxy_of_the_environment_leads_to_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects centres whose only way out is a proxy: the first question goes through it, too."""
    monkeypatch.setattr(server_door.ssl, "create_default_context", lambda **options: None)
    for name in ("https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def ends() -> tuple[str, int, Any]:
        connection: Any = server_door._connection(INVITATION)
        return connection.host, connection.port, connection._tunnel_host

    assert ends() == ("vm.example.org", 8443, None)
    monkeypatch.setenv("https_proxy", "http://me:secret@proxy.lumi:3128")
    assert ends() == ("proxy.lumi", 3128, "vm.example.org")
    monkeypatch.setenv("no_proxy", "localhost,.example.org")
    assert ends() == ("vm.example.org", 8443, None)


KNOCKS: list[tuple[str | None, float, float | None]] = [
    ("Sun, 22 Nov 2026 10:00:00 GMT", 1795341600.5, 0.0),
    ("Sun, 22 Nov 2026 10:00:00 GMT", 1795341610.5, 10.0),
    ("nonsense", 0.0, None),
    (None, 0.0, None),
]


@pytest.mark.parametrize(("date", "now", "ahead_s"), KNOCKS)
def test_clocks_are_compared_by_the_servers_date(
    date: str | None, now: float, ahead_s: float | None
) -> None:
    """Protects against a skew that is our own rounding."""
    compare: Callable[[str | None, float], float | None] = server_door._ahead_s
    assert compare(date, now) == ahead_s
