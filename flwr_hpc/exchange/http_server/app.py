"""The exchange as an ASGI application, which the gate mounts on the public port.

| request | answer |
|---|---|
| ``HEAD KEY`` | 200 and the size; 404 and, of a payload that is coming, ``Upload-Offset`` |
| ``GET KEY``, with or without ``Range: bytes=FIRST-LAST`` | 200 or 206 and the bytes |
| ``PUT KEY``, ``Content-Range: bytes */TOTAL``, no body | 200 if the payload is whole, else 202 \
and ``Upload-Offset``; or refused, before any byte is sent |
| ``PUT KEY``, ``Content-Range: bytes FIRST-LAST/TOTAL`` | takes bytes: the same answers |
| ``PUT own``, ``Content-Range: bytes */TOTAL``, no body | 204; refused if payloads of so many \
bytes can never be there together |
| ``DELETE KEY``, ``DELETE own`` | 204; removes a payload, or all that the site has |

Uploads go by plain ``Content-Range`` and not by tus: a payload's name is its sha256, so there is
nothing to create and no upload URL to remember, which is most of tus; an announcement, bytes at an
offset and the offset as the answer are all that is left, and any HTTP client can send them.

Every request says who it is from by ``Authorization: Bearer TOKEN``. A site reads the server's
folder and its own and writes to its own; of all else it is told that it is not there.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, ParamSpec, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flwr_hpc.clock import Clock, SystemClock
from flwr_hpc.exchange.http_server.meter import Meter, Move
from flwr_hpc.exchange.http_server.ranges import Part, Span, read_content_range, read_range
from flwr_hpc.exchange.http_server.uploads import Limits, Refusal, Upload, Uploads
from flwr_hpc.exchange.store import GLOBAL, KEY, Reference
from flwr_hpc.exchange.stores.file import FileStore
from flwr_hpc.exchange.tensors import BadPayload
from flwr_hpc.files import is_disk_trouble
from flwr_hpc.protocol import PROTOCOL, PROTOCOL_HEADER

PREFIX = "/v1/exchange/"
PIECE = 1 << 19  # bytes a connection holds while as many more are written or sent
THREADS = 8  # for files, so that no disk holds up the loop
OFFSET = "Upload-Offset"
OWN = "own"  # in place of a key

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger("flwr_hpc")


def exchange_app(
    root: Path,
    authorize: Callable[[str], str | None],
    limits: Limits | None = None,
    clock: Clock | None = None,
    report: Callable[[Move], object] = lambda move: None,
) -> ASGIApp:
    """Return the application; it answers the paths under ``/v1/exchange/``.

    Parameters
    ----------
    root : Path
        Of the run's FileStore.
    authorize : callable
        ``authorize(token)``: the folder of the token's site, None if there is no such site. It is
        called in threads, for every request.
    limits : Limits or None
        For each site.
    clock : Clock or None
    report : callable
        Called in a thread, now and then, with what moves.
    """
    return _Exchange(root, authorize, limits or Limits(), clock or SystemClock(), report)


class _Exchange:
    def __init__(
        self,
        root: Path,
        authorize: Callable[[str], str | None],
        limits: Limits,
        clock: Clock,
        report: Callable[[Move], object],
    ) -> None:
        self._authorize, self._limits = authorize, limits
        self._store = FileStore(str(root))
        self._uploads = Uploads(root, self._store, limits, clock)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="exchange")
        self._busy: Counter[str] = Counter()  # requests by site
        # A copy: it counts on while the thread writes.
        self._meter = Meter(lambda move: self._threads.submit(report, replace(move)), clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def patient_send(message: Message) -> None:
            async with asyncio.timeout(self._limits.idle_s):
                await send(message)

        try:
            with ExitStack() as until_sent:
                response = await self._answer_or_refuse(Request(scope, receive), until_sent)
                await response(scope, receive, patient_send)
        except (TimeoutError, ClientDisconnect):
            log.info("a peer of the exchange went silent, and was cut off")

    async def _answer_or_refuse(self, request: Request, until_sent: ExitStack) -> Response:
        try:
            site = await self._site(request)
            _check_protocol(request)
            until_sent.enter_context(self._turn(site))
            return await self._answer(request, site)
        except Refusal as refusal:
            return _refuse(refusal)
        except OSError as exc:
            if not is_disk_trouble(exc):
                raise
            return _refuse(Refusal(507, f"the server cannot write: {exc.strerror}"))

    @contextmanager
    def _turn(self, site: str) -> Iterator[None]:
        if self._busy[site] >= self._limits.requests:
            raise Refusal(429, f"at most {self._limits.requests} requests at once")
        self._busy[site] += 1
        try:
            yield
        finally:
            self._busy[site] -= 1

    async def _site(self, request: Request) -> str:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        site = await self._run(self._authorize, token) if kind.lower() == "bearer" else None
        if site is None:
            raise Refusal(401, "this credential is not, or no longer, one of this server's")
        return site

    async def _answer(self, request: Request, site: str) -> Response:
        path = request.scope["path"]
        key = path.removeprefix(PREFIX)
        if key == OWN and request.method == "DELETE":
            await self._run(self._uploads.clear, site)
            return Response(status_code=204)
        if key == OWN and request.method == "PUT":
            self._uploads.check_size(_content_range(request).total)
            return Response(status_code=204)
        match = KEY.fullmatch(key)
        folder = key.partition("/")[0]
        reads = request.method in ("GET", "HEAD")
        if not match or folder not in ((site, GLOBAL) if reads else (site,)):
            raise Refusal(404, "not found")
        if reads:
            return await self._read(request, site, folder, match[1])
        if request.method == "PUT":
            return await self._write(request, folder, match[1])
        if request.method == "DELETE":
            await self._run(self._store.delete, Reference.of(folder, match[1], 0))
            return Response(status_code=204)
        raise Refusal(405, "valid are GET, HEAD, PUT and DELETE")

    async def _read(self, request: Request, site: str, folder: str, sha256: str) -> Response:
        ref = Reference.of(folder, sha256, 0)
        size = await self._run(self._store.size, ref)
        if size is None:
            raise Refusal(404, "not found", await self._run(self._uploads.offset, folder, sha256))
        headers = {"Accept-Ranges": "bytes", "ETag": f'"{sha256}"'}
        if request.method == "HEAD":
            return Response(headers={**headers, "Content-Length": str(size)})
        asked = request.headers.get("range")
        first, count = read_range(asked, size)
        headers["Content-Length"] = str(count)
        if asked is not None:
            headers["Content-Range"] = f"bytes {first}-{first + count - 1}/{size}"
        try:
            file = await self._run(self._store.open, ref)
        except (BadPayload, FileNotFoundError):  # deleted just now
            raise Refusal(404, "not found") from None
        pieces = self._pieces(file, first, count, site, Reference.of(folder, sha256, size))
        status = 200 if asked is None else 206
        return StreamingResponse(pieces, status, headers, "application/octet-stream")

    async def _pieces(
        self, file: IO[bytes], first: int, count: int, site: str, ref: Reference
    ) -> AsyncIterator[bytes]:
        with file, self._meter.request(site, "to_site", ref, 0) as sent:
            await self._run(file.seek, first)
            while count:
                piece = await self._run(file.read, min(count, PIECE))
                if not piece:
                    return  # cut short behind our back: the peer sees that bytes are missing
                count -= len(piece)
                yield piece
                sent(len(piece))

    async def _write(self, request: Request, folder: str, sha256: str) -> Response:
        part = _content_range(request)
        ref = Reference.of(folder, sha256, part.total)
        upload = await self._run(self._uploads.begin, ref)
        if upload is None:
            return _progress(200, part.total)
        if part.span:
            await self._take(request, upload, part.span)
        offset = await self._run(lambda: upload.offset)
        if offset < part.total:
            return _progress(202, offset)
        await self._run(self._uploads.publish, upload)
        return _progress(200, part.total)

    async def _take(self, request: Request, upload: Upload, span: Span) -> None:
        """Write a body as it comes; what came before a peer went stays."""
        at = span.first
        if at != (here := await self._run(lambda: upload.offset)):
            raise Refusal(409, f"{here} bytes are here, not {at}", here)
        with self._meter.request(upload.ref.folder, "from_site", upload.ref, at) as came:
            await self._take_body(request, upload, span, came)

    async def _take_body(
        self, request: Request, upload: Upload, span: Span, came: Callable[[int], None]
    ) -> None:
        at, end, buffer = span.first, span.first + span.length, bytearray()
        writing: asyncio.Future[None] | None = None
        try:
            async for data in self._body(request):
                buffer += data
                came(len(data))
                if at + len(buffer) > end:
                    raise Refusal(400, f"more than the {span.length} bytes that were announced")
                if len(buffer) >= PIECE:
                    if writing:
                        await writing
                    writing = asyncio.ensure_future(self._run(upload.append, at, buffer))
                    at, buffer = at + len(buffer), bytearray()
        except (ClientDisconnect, TimeoutError):
            log.info("an upload was cut off after %d bytes", at + len(buffer))
            end = at + len(buffer)
        if writing:
            await writing
        if buffer:
            await self._run(upload.append, at, buffer)
        if end < span.first + span.length:
            raise Refusal(408, "no byte came for too long", end)

    async def _body(self, request: Request) -> AsyncIterator[bytes]:
        stream = request.stream()
        while True:
            async with asyncio.timeout(self._limits.idle_s):
                data = await anext(stream, None)
            if data is None:
                return
            yield data

    async def _run(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: fn(*args, **kwargs))


def _check_protocol(request: Request) -> None:
    """Refuse a site of another version, which may have been updated since it has joined."""
    theirs = request.headers.get(PROTOCOL_HEADER, str(PROTOCOL))
    if theirs != str(PROTOCOL):
        raise Refusal(
            426,
            f"the server speaks protocol {PROTOCOL}, and the site {theirs[:20]}: end its join, and "
            "type it again, which says what to install",
        )


def _content_range(request: Request) -> Part:
    headers = request.headers
    return read_content_range(headers.get("content-range"), headers.get("content-length"))


def _progress(status: int, offset: int) -> Response:
    return Response(status_code=status, headers={OFFSET: str(offset)})


def _refuse(refusal: Refusal) -> Response:
    """Answer without reading what else the peer has to say."""
    headers = {"Connection": "close"}
    if refusal.offset is not None:
        headers[OFFSET] = str(refusal.offset)
    return Response(refusal.reason + "\n", refusal.status, headers, "text/plain")
