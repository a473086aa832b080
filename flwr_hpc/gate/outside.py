"""What the public socket serves: a few paths, to the sites of the run, and nothing to others.

An ASGI application around Flower's own. What is not on the list is refused before Flower sees a
byte of it; of what is, only the headers have been read when it is decided who asks.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request

from flwr_hpc.gate.credentials import Guests
from flwr_hpc.gate.replies import in_own_name

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# The raw path, to the letter: what is encoded, doubled or climbs is none of these.
FLEET = re.compile(rb"/v1/fleet/[a-z]+(-[a-z]+)*")
EXCHANGE = re.compile(rb"/v1/exchange(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)+")
JOIN = b"/v1/join"
ACTIVATE = b"/v1/fleet/activate-node"  # which a SuperNode of Flower's says once, as it starts
PUSH = b"/v1/fleet/push-messages"  # a node's replies
PUBLIC_KEY = b"flwr-public-key"  # by which a SuperNode of Flower's shows who it is
MAX_HEADERS = 16 << 10  # bytes
MAX_FLEET_BYTES = 64 << 20  # Flower sends arrays in pieces of 5 MB
BODY_S = 120.0  # A request's body of which nothing comes for so long is given up


@dataclass(frozen=True)
class Refused(Exception):
    """What a request is answered that is not served."""

    status: int
    reason: str


class PublicApp:
    """Serves Flower's Fleet API to registered nodes, and the exchange to sites with their token.

    Parameters
    ----------
    flower : App
    guests : Guests
    exchange : App or None
        Serves ``/v1/exchange/``; None: there is none.
    welcome : dict
        What a site is told that asks, with its token, what it joins.
    on_start : callable
        Called, from any thread, with the site whose SuperNode has started.
    """

    def __init__(
        self,
        flower: App,
        guests: Guests,
        exchange: App | None,
        welcome: dict[str, Any],
        on_start: Callable[[str], object],
    ) -> None:
        self._flower, self._guests, self._exchange = flower, guests, exchange
        self._welcome, self._on_start = welcome, on_start
        self._heard_at: dict[str, float] = {}  # when a site's SuperNode last spoke

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        try:
            app = self._app(scope)
        except Refused as refused:
            await _answer(send, refused.status, refused.reason.encode() + b"\n")
            return
        await app(scope, _impatient(receive), send)

    def _app(self, scope: Scope) -> App:
        """Return what serves a request; raise `Refused`."""
        path = scope["raw_path"] if scope["type"] == "http" else b""
        if sum(len(name) + len(value) for name, value in scope.get("headers", ())) > MAX_HEADERS:
            raise Refused(431, f"at most {MAX_HEADERS} bytes of headers")
        headers = _headers(scope)
        if FLEET.fullmatch(path):
            site = self._check_node(scope["method"], headers)
            if path == ACTIVATE:
                return self._activation(site)
            return self._replies if path == PUSH else self._flower
        if path == JOIN and scope["method"] == "GET":
            return self._join(*self._site(headers))
        if EXCHANGE.fullmatch(path) and self._exchange is not None:
            self._site(headers)
            return self._exchange
        raise Refused(404, "there is nothing here")

    def _check_node(self, method: str, headers: dict[bytes, list[bytes]]) -> str:
        """Return a node's site, or refuse it; that it has the key, too, Flower checks."""
        if method != "POST":
            raise Refused(405, "POST only")
        keys, lengths = headers.get(PUBLIC_KEY, []), headers.get(b"content-length", [])
        try:
            (encoded,) = keys
            site = self._guests.site_of_key(base64.b64decode(encoded, validate=True))
        except (ValueError, binascii.Error):
            site = None
        if site is None:
            raise Refused(401, "no node of this run, or its site was revoked")
        self._heard_at[site] = time.monotonic()
        framed = len(lengths) == 1 and lengths[0].isdigit()
        if not framed or b"transfer-encoding" in headers:
            raise Refused(411, "content-length must be given")
        if len(lengths[0]) > 12 or int(lengths[0]) > MAX_FLEET_BYTES:
            raise Refused(413, f"at most {MAX_FLEET_BYTES} bytes")
        return site

    def _activation(self, site: str) -> App:
        """Have Flower answer, and take its yes for the start of the site's SuperNode."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            async def heard(message: Message) -> None:
                if message["type"] == "http.response.start" and message["status"] == 200:
                    await asyncio.to_thread(self._on_start, site)
                await send(message)

            await self._flower(scope, receive, heard)

        return app

    async def _replies(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have Flower take a node's replies, unless they are in another's name."""
        try:
            body = await Request(scope, receive).body()
        except ClientDisconnect:
            return
        if in_own_name(body):
            await self._flower(scope, _once_more(body, receive), send)
        else:
            await _answer(send, 403, b"a node replies in its own name alone\n")

    def _site(self, headers: dict[bytes, list[bytes]]) -> tuple[str, str]:
        """Return the site whose token a request bears, and the token."""
        values = headers.get(b"authorization", [])
        scheme, _, token = (values[0] if len(values) == 1 else b"").partition(b" ")
        text = token.decode("ascii", "replace").strip()
        site = self._guests.site_of_token(text)
        if scheme.lower() != b"bearer" or site is None:
            raise Refused(401, "the token is not known here, or it was revoked")
        return site, text

    def _join(self, site: str, token: str) -> App:
        heard_at = self._heard_at.get(site)
        own = {
            "site": site,
            "folder": self._guests.folder_of_token(token),  # of the exchange; None: not yet
            "heard_s": None if heard_at is None else round(time.monotonic() - heard_at, 1),
        }

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            body = json.dumps({**self._welcome, **own}).encode()
            await _answer(send, 200, body, b"application/json")

        return app


def _headers(scope: Scope) -> dict[bytes, list[bytes]]:
    headers: dict[bytes, list[bytes]] = {}
    for name, value in scope.get("headers", []):
        headers.setdefault(name, []).append(value)
    return headers


def _once_more(body: bytes, receive: Receive) -> Receive:
    """Give a body that has been read, and then whatever comes."""
    given = False

    async def received() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return received


def _impatient(receive: Receive) -> Receive:
    """Take a body that stands still for a connection that was closed."""
    complete = False

    async def received() -> Message:
        nonlocal complete
        if complete:  # what comes now is the end of the connection, which may take its time
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), BODY_S)
        except TimeoutError:
            return {"type": "http.disconnect"}
        complete = not message.get("more_body", False)
        return message

    return received


async def _answer(
    send: Send, status: int, body: bytes, kind: bytes = b"text/plain; charset=utf-8"
) -> None:
    """Answer and close: what else the peer sends is not read."""
    headers = [
        (b"content-type", kind),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
