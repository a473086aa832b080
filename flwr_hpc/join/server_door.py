"""What a site asks its server before it starts, and now and then: does the invitation hold?"""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import unquote, urlsplit

from requests.utils import get_environ_proxies

from flwr_hpc.config.invitation import Invitation
from flwr_hpc.errors import UserError

ANSWER_S = 15.0
MAX_ANSWER = 1 << 16


class Away(Exception):
    """The server cannot be reached now; it may be later."""


class NotInvited(UserError):
    """The server does not know this invitation, or does not any more."""


@dataclass(frozen=True)
class Answer:
    """What the server said to a site."""

    status: int
    body: bytes
    # This host's clock less the server's, to a second; None if the server did not say its time.
    ahead_s: float | None = None


def ask(invitation: Invitation) -> dict[str, Any]:
    """Return what the server says of the run; raise `Away`, `NotInvited`, or a UserError."""
    try:
        answer = knock(invitation)
    except ssl.SSLCertVerificationError as exc:
        raise UserError(
            f"who answers at {invitation.address} has another certificate than the invitation "
            f"names ({exc.verify_message}): not the server, or its run directory is a new one. "
            "Ask the one who sent the invitation; nothing was sent"
        ) from None
    except (OSError, http.client.HTTPException) as exc:
        raise Away(f"{invitation.address}: {exc}") from None
    return read(invitation, answer)


def knock(invitation: Invitation) -> Answer:
    """Return the server's answer as it came; OSError or HTTPException if there is none."""
    connection = _connection(invitation)
    try:
        headers = {"Authorization": f"Bearer {invitation.token}"}
        connection.request("GET", "/v1/join", headers=headers)
        answer = connection.getresponse()
        came_at = time.time()
        date = answer.headers.get("Date")
        return Answer(answer.status, answer.read(MAX_ANSWER), _ahead_s(date, came_at))
    finally:
        connection.close()


def read(invitation: Invitation, answer: Answer) -> dict[str, Any]:
    """Return what an answer says of the run; `NotInvited` or a UserError if it is none."""
    if answer.status == 401:
        raise NotInvited(
            f"the server at {invitation.address} does not accept this invitation: it was revoked, "
            "or replaced by a newer one. Ask the one who sent it"
        )
    try:
        found = json.loads(answer.body) if answer.status == 200 else None
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("run_key") != invitation.run_key:
        raise UserError(
            f"{invitation.address} answers, but not as the server of this run "
            f"(HTTP {answer.status})"
        )
    return found


def proxy(address: str) -> str:
    """Return the proxy that the environment names for HOST:PORT, as the transfers use it, too."""
    proxies = get_environ_proxies(f"https://{address}")
    return str(proxies.get("https") or proxies.get("all") or "")


def _connection(invitation: Invitation) -> http.client.HTTPSConnection:
    """Return a connection that trusts the invitation's certificate and no other."""
    host, _, port = invitation.address.rpartition(":")
    context = ssl.create_default_context(cadata=invitation.certificate)
    own = host.strip("[]"), int(port)
    url = proxy(invitation.address)
    if not url:
        return http.client.HTTPSConnection(*own, timeout=ANSWER_S, context=context)
    parts = urlsplit(url if "://" in url else f"http://{url}")
    connection = http.client.HTTPSConnection(
        parts.hostname or "", parts.port or 80, timeout=ANSWER_S, context=context
    )
    connection.set_tunnel(*own, headers=_authorization(parts.username, parts.password))
    return connection


def _authorization(user: str | None, password: str | None) -> dict[str, str]:
    if not user:
        return {}
    pair = f"{unquote(user)}:{unquote(password or '')}".encode()
    return {"Proxy-Authorization": f"Basic {base64.b64encode(pair).decode()}"}


def _ahead_s(date: str | None, now: float) -> float | None:
    try:
        # The server left away what is below a second.
        return None if date is None else now - parsedate_to_datetime(date).timestamp() - 0.5
    except ValueError:
        return None
