"""Checks of the line from a centre to the server that its invitation names."""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flwr_hpc.config.invitation import Invitation, check_versions, read_invitation
from flwr_hpc.doctor.door import Door, Rates
from flwr_hpc.doctor.findings import Checks, Finding, failed, passed, skipped, warned
from flwr_hpc.errors import UserError
from flwr_hpc.join import server_door

# Flower signs what a SuperNode asks with the time, and refuses what is from the future or old.
MOST_AHEAD_S, MOST_BEHIND_S = 5.0, 300.0
DOUBTFUL_S = 2.0
HEARD_S = 60.0  # a SuperNode that runs speaks every few seconds
SLOW_MB_S = 1.0
ANOTHER = "ask who sent the invitation for a new one, which is made there by: "
FIX = "Fix it with: "


@dataclass
class Line:
    """What is looked at, and what the server said so far."""

    invitation: Invitation
    door: Door
    answer: server_door.Answer | Exception = field(init=False)
    said: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            self.answer = self.door.knock()
        except (OSError, http.client.HTTPException) as exc:
            self.answer = exc

    @property
    def new_invitation(self) -> str:
        """What the server's person types to invite this site again."""
        return f"python -m flwr_hpc.serve invite {self.invitation.site} RUN_DIR"


line: Checks[Line] = Checks("line to the server")


@line("proxy")
def _proxy(context: Line) -> Finding:
    address, env = context.invitation.address, context.door.environment()
    host = address.rpartition(":")[0].strip("[]")
    url = context.door.proxy()
    if not url:
        if env.get("https_proxy"):
            return passed(f"none: no_proxy={env.get('no_proxy', '')} says so for {host}")
        if env.get("http_proxy"):
            return warned(
                f"http_proxy={_public(env['http_proxy'])} is set and https_proxy is not: "
                f"connections to {address} go without a proxy",
                f"if it cannot be reached so, export https_proxy={_public(env['http_proxy'])}",
            )
        return passed("none is set")
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if not parts.hostname:
        return failed(
            f"https_proxy={_public(url)} names no host", "export https_proxy=http://HOST:PORT"
        )
    if parts.scheme not in ("http", "https"):
        return failed(
            f"https_proxy={_public(url)} is no HTTP proxy, and no other kind is supported",
            "export https_proxy=http://HOST:PORT, or without one: export no_proxy=" + host,
        )
    return passed(f"https_proxy={_public(url)}")


@line("reach", needs=("proxy",))
def _reach(context: Line) -> Finding:
    address, answer = context.invitation.address, context.answer
    proxy = _public(context.door.proxy())
    if not isinstance(answer, Exception) or isinstance(answer, ssl.SSLError):
        return passed(f"{address} through {proxy}" if proxy else address)
    host, _, port = address.rpartition(":")
    by = f" through {proxy}" if proxy else ""
    words = f"{address} cannot be reached{by}: {answer or type(answer).__name__}"
    if proxy:
        direct = f"export no_proxy={host.strip('[]')}"
        return failed(words, f"have the proxy let CONNECT {address} pass; without it: {direct}")
    if isinstance(answer, socket.gaierror):
        return failed(words, f"getent hosts {host}   (the name is the server's serve.address)")
    if isinstance(answer, ConnectionError):
        return failed(words, "start it there: python -m flwr_hpc.serve resume=RUN_DIR")
    return failed(
        words,
        f"have TCP to port {port} opened, outgoing here and incoming there; where a proxy leads "
        "out: export https_proxy=http://HOST:PORT",
    )


@line("TLS", needs=("reach",))
def _tls(context: Line) -> Finding:
    answer, address = context.answer, context.invitation.address
    if isinstance(answer, ssl.SSLCertVerificationError):
        words = f"{address} shows another certificate than the invitation's"
        return failed(
            f"{words} ({answer.verify_message}): it is not the server, or another run's",
            f"send nothing; {ANOTHER}{context.new_invitation}",
        )
    if isinstance(answer, Exception):
        return failed(
            f"{address} does not speak TLS: {answer}",
            f"openssl s_client -connect {address}   (who answers there?)",
        )
    return passed("the server has the certificate that the invitation names")


@line("clock", needs=("TLS",))
def _clock(context: Line) -> Finding:
    assert isinstance(context.answer, server_door.Answer)
    ahead_s = context.answer.ahead_s
    if ahead_s is None:
        return skipped("the server did not say its time")
    size = f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the server's"
    fix = "chronyc tracking   (or timedatectl; here and at the server, to see which one is wrong)"
    if ahead_s > MOST_AHEAD_S or -ahead_s > MOST_BEHIND_S:
        return failed(f"this host's clock is {size}: Flower refuses what this site signs", fix)
    if ahead_s > DOUBTFUL_S:
        return warned(f"this host's clock is {size}; Flower refuses {MOST_AHEAD_S:.0f} s", fix)
    return passed(f"as the server's, within {max(1.0, abs(ahead_s)):.0f} s")


@line("credential", needs=("TLS",))
def _credential(context: Line) -> Finding:
    assert isinstance(context.answer, server_door.Answer)
    site = context.invitation.site
    try:
        context.said = server_door.read(context.invitation, context.answer)
    except server_door.NotInvited:
        return failed(
            "the server does not accept this invitation: it was revoked, or replaced by another",
            ANOTHER + context.new_invitation,
        )
    except UserError as exc:
        return failed(str(exc), f"{ANOTHER}{context.new_invitation}")
    heard_s = context.said.get("heard_s")
    if isinstance(heard_s, int | float) and heard_s < HEARD_S:
        return warned(
            f"it is in use: a SuperNode of {site} spoke to the server {heard_s:.0f} s ago",
            "all is well if that is your own join; else somebody has your invitation, and at the "
            f"server it is ended by: python -m flwr_hpc.serve revoke {site} RUN_DIR",
        )
    return passed(f"the server expects {site}")


@line("versions")
def _versions(context: Line) -> Finding:
    server = context.said.get("versions") or context.invitation.versions
    here = context.door.versions()
    try:
        check_versions(server, here)
    except UserError as exc:
        words, _, command = str(exc).partition(FIX)
        return failed(words.strip(), command)
    same = ", ".join(f"{name} {here[name]}" for name in ("flwr_hpc", "flwr") if name in here)
    other = [
        f"{name} {here.get(name, 'is missing')} (there {server[name]})"
        for name in ("python", "torch")
        if name in server and here.get(name) != server[name]
    ]
    return passed("; ".join([same, *other]) + (", which may differ" if other else ""))


@line("throughput", needs=("credential",))
def _throughput(context: Line) -> Finding:
    folder = context.said.get("folder")
    if not folder:
        return skipped("the server is just starting; try again in a minute")
    try:
        rates = context.door.rates(str(folder))
    except (OSError, UserError) as exc:
        return failed(
            f"a test payload did not make it to the server and back: {exc}",
            f"openssl s_client -connect {context.invitation.address}   (does something on the way "
            "end long connections or large requests?)",
        )
    words = f"{rates.up_mb_s:.1f} MB/s to the server, {rates.down_mb_s:.1f} MB/s from it"
    if min(rates.up_mb_s, rates.down_mb_s) < SLOW_MB_S:
        return warned(
            f"{words}: 1 GB takes {_minutes(rates)} min",
            "have less sent: at the server, exchange.codec='[topk,int2]' or LoRA",
        )
    return passed(f"{words}: 1 GB takes {_minutes(rates)} min")


def _minutes(rates: Rates) -> str:
    return f"{1000 / min(rates.up_mb_s, rates.down_mb_s) / 60:.1f}"


def _public(url: str) -> str:
    """Return a proxy's URL without a password."""
    rest, at, host = url.rpartition("@")
    return f"{rest.partition('://')[0]}://***@{host}" if at else url


def names_invitation(overrides: Sequence[str]) -> bool:
    """Whether a file is named, and no setting."""
    return any("=" not in word and word[:1] not in ("+", "~") for word in overrides)


def examine(
    overrides: Sequence[str], make: Callable[[Invitation], Door] = Door
) -> dict[str, list[Finding]]:
    """Make all checks of the line that an invitation stands for."""
    if len(overrides) > 1:
        raise UserError(
            "an invitation is looked at alone: python -m flwr_hpc.doctor INVITATION. The facility: "
            "python -m flwr_hpc.doctor +facility=NAME ..."
        )
    invitation = read_invitation(Path(overrides[0]))
    return {invitation.site: look(invitation, make)}


def look(invitation: Invitation, make: Callable[[Invitation], Door]) -> list[Finding]:
    """Make all checks of one line."""
    return line.run(Line(invitation, make(invitation)))
