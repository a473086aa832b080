"""What a site asks its server before it starts, and now and then: does the invitation hold?"""

from __future__ import annotations

import http.client
import json
import ssl
from typing import Any

from flwr_hpc.config.invitation import Invitation
from flwr_hpc.errors import UserError

ANSWER_S = 15.0
MAX_ANSWER = 1 << 16


class Away(Exception):
    """The server cannot be reached now; it may be later."""


class NotInvited(UserError):
    """The server does not know this invitation, or does not any more."""


def ask(invitation: Invitation) -> dict[str, Any]:
    """Return what the server says of the run; raise `Away`, `NotInvited`, or a UserError."""
    host, _, port = invitation.address.rpartition(":")
    context = ssl.create_default_context(cadata=invitation.certificate)
    connection = http.client.HTTPSConnection(
        host.strip("[]"), int(port), timeout=ANSWER_S, context=context
    )
    try:
        headers = {"Authorization": f"Bearer {invitation.token}"}
        connection.request("GET", "/v1/join", headers=headers)
        answer = connection.getresponse()
        status, body = answer.status, answer.read(MAX_ANSWER)
    except ssl.SSLCertVerificationError as exc:
        raise UserError(
            f"who answers at {invitation.address} has another certificate than the invitation "
            f"names ({exc.verify_message}): not the server, or its run directory is a new one. "
            "Ask the one who sent the invitation; nothing was sent"
        ) from None
    except (OSError, http.client.HTTPException) as exc:
        raise Away(f"{invitation.address}: {exc}") from None
    finally:
        connection.close()
    if status == 401:
        raise NotInvited(
            f"the server at {invitation.address} does not accept this invitation: it was revoked, "
            "or replaced by a newer one. Ask the one who sent it"
        )
    try:
        found = json.loads(body) if status == 200 else None
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("run_key") != invitation.run_key:
        raise UserError(
            f"{invitation.address} answers, but not as the server of this run (HTTP {status})"
        )
    return found
