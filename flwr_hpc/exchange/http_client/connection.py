"""Requests to the server's exchange, made again while it is away."""

from __future__ import annotations

import errno
import random
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies

from flwr_hpc.clock import Clock, SystemClock
from flwr_hpc.errors import UserError
from flwr_hpc.exchange.tensors import BadPayload
from flwr_hpc.exchange.transfer import Interrupted, Transfer
from flwr_hpc.files import read_json
from flwr_hpc.protocol import PROTOCOL, PROTOCOL_HEADER

PREFIX = "/v1/exchange/"
CONNECT_S = 30.0
LEAST_S = 1.0  # for an answer, whatever `stall_s` is
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
# A line that is dead but not closed is noticed by the kernel, whatever it is waited for.
SILENCE_S = 30
# After a line was dead one way the server's kernel may answer again, and yet send nothing for as
# long as the cut took and longer: a body that stands still is asked for anew.
BODY_S = 45.0
SOCKET_OPTIONS = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE_S // 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENCE_S // 6),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_S * 1000),
]
AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
DISK_FULL = 507

T = TypeVar("T")


@dataclass(frozen=True)
class Credential:
    """What lets a site in: a token, and the certificate by which it knows the server."""

    token: str = field(repr=False)
    certificate: str  # PEM

    @classmethod
    def read(cls, path: Path) -> Credential:
        """Read a credential file, which nobody else may read."""
        try:
            mode = path.stat().st_mode & 0o077
            raw = read_json(path)
        except (OSError, ValueError) as exc:
            raise UserError(f"the credential {path} cannot be read: {exc}") from None
        if mode:
            raise UserError(f"others can read the credential {path}. Fix it with: chmod 600 {path}")
        token, certificate = ((raw or {}).get(key) for key in ("token", "certificate"))
        if not isinstance(token, str) or not token or not isinstance(certificate, str):
            raise UserError(f"{path} is no credential: it lacks 'token' or 'certificate'")
        return cls(token, certificate)


class Connection:
    """Speaks to one server; safe for threads, each of which has a line of its own.

    Proxies are taken from the environment (``https_proxy``, ``no_proxy``), and nothing else is:
    no further certificates, no passwords of ``~/.netrc``.

    Parameters
    ----------
    url : str
        Of the server; plain ``http`` to this host alone, where an SSH tunnel begins.
    credential : Credential
    stall_s : float
        An attempt is made again until nothing has moved for so long.
    clock : Clock
    """

    def __init__(
        self, url: str, credential: Credential, stall_s: float, clock: Clock | None = None
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme != "https" and not _is_this_host(parts.hostname or ""):
            raise UserError(
                f"{url} would send the site's credential in the clear. Use https://, or http:// "
                "to localhost through an SSH tunnel"
            )
        self._origin = f"{parts.scheme}://{parts.netloc}"
        self._credential, self._stall_s = credential, stall_s
        self.clock = clock or SystemClock()
        self._mine = threading.local()

    @contextmanager
    def request(
        self, method: str, key: str, headers: Mapping[str, str] | None = None, data: Any = None
    ) -> Iterator[Any]:
        """Make a request and yield the response, whose body has not been read.

        `Interrupted` if another attempt may help; BadPayload if there is no such payload, or it is
        not what it should be; OSError if the server does not want it, or its disk is full.
        """
        patience = self._stall_s if method == "PUT" else min(self._stall_s, BODY_S)  # it may hash
        try:
            with self._line().request(
                method,
                self._origin + PREFIX + key,
                headers={"Accept-Encoding": "identity", **(headers or {})},
                data=data,
                stream=True,
                timeout=(CONNECT_S, max(patience, LEAST_S)),
                allow_redirects=False,
            ) as response:
                _check(response, self._origin)
                yield response
        except (requests.RequestException, urllib3.exceptions.HTTPError) as exc:
            self._mine.__dict__.pop("line", None)
            if "CERTIFICATE_VERIFY_FAILED" in str(exc):
                raise PermissionError(
                    f"{self._origin} is not the server of this site's credential: {exc}"
                ) from None
            raise Interrupted(str(exc)) from exc

    def persist(
        self,
        attempt: Callable[[], T],
        transfer: Transfer,
        progress: Callable[[], int] | None = None,
    ) -> T:
        """Attempt until it succeeds, or there is no progress for too long; Cancelled in between."""
        progress = progress or (lambda: transfer.done)
        moved, moved_at, pause = progress(), self.clock.now(), FIRST_PAUSE_S
        while True:
            try:
                return attempt()
            except Interrupted as exc:
                now = self.clock.now()
                if progress() != moved:
                    moved, moved_at, pause = progress(), now, FIRST_PAUSE_S
                left = self._stall_s - (now - moved_at)
                if left <= 0:
                    raise TimeoutError(
                        errno.ETIMEDOUT,
                        f"nothing moved between here and {self._origin} for {self._stall_s:g} s, "
                        f"after {transfer.done} bytes: {exc}",
                    ) from exc
            transfer.advance(0)
            self.clock.sleep(min(left, pause * random.uniform(0.5, 1.0)))
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _line(self) -> requests.Session:
        line: requests.Session | None = getattr(self._mine, "line", None)
        if line is None:
            line = self._mine.line = requests.Session()
            line.trust_env = False
            line.proxies = get_environ_proxies(self._origin)
            line.headers["Authorization"] = f"Bearer {self._credential.token}"
            line.headers[PROTOCOL_HEADER] = str(PROTOCOL)
            line.mount("https://", _Adapter(self._context()))
            line.mount("http://", _Adapter(None))
        return line

    def _context(self) -> ssl.SSLContext:
        try:
            return ssl.create_default_context(cadata=self._credential.certificate)
        except ssl.SSLError as exc:
            raise UserError(f"the credential's certificate is no PEM certificate: {exc}") from None


class _Adapter(HTTPAdapter):  # type: ignore[misc]
    """Trusts one certificate, and notices dead lines."""

    def __init__(self, context: ssl.SSLContext | None) -> None:
        self._options: dict[str, Any] = {"socket_options": SOCKET_OPTIONS}
        if context:
            self._options["ssl_context"] = context
        super().__init__()

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options, **self._options)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        return super().proxy_manager_for(proxy, **options, **self._options)

    def cert_verify(self, *_: Any) -> None:
        """Leave it to the context: no other certificates are added."""


def _check(response: Any, origin: str) -> None:
    """Make an error of an answer that is one."""
    status = response.status_code
    if status < 300:
        return
    words = response.raw.read(500, decode_content=False).decode(errors="replace").strip()
    if status in AGAIN:
        raise Interrupted(f"{status}: {words}")
    if status in (404, 422):
        raise BadPayload(words)
    if status == DISK_FULL:
        raise OSError(errno.ENOSPC, f"the server has no room: {words}", origin)
    if status == 401:
        raise PermissionError(errno.EACCES, words)
    raise OSError(errno.EPROTO, f"the server refuses: {status}: {words}")


def _is_this_host(name: str) -> bool:
    try:
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False
