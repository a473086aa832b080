"""What the two range headers say; anything else is refused."""

from __future__ import annotations

import re
from typing import NamedTuple

from flwr_hpc.exchange.http_server.uploads import Refusal

NUMBER = "([0-9]{1,18})"  # no digits of other scripts, and no number that takes long to read
RANGE = re.compile(rf"bytes={NUMBER}-{NUMBER}?")
CONTENT_RANGE = re.compile(rf"bytes (?:{NUMBER}-{NUMBER}|\*)/{NUMBER}")


class Span(NamedTuple):
    """Bytes of a payload."""

    first: int
    length: int


class Part(NamedTuple):
    """What a PUT brings: no span where it only announces the payload."""

    span: Span | None
    total: int


def read_range(header: str | None, size: int) -> Span:
    """Return what a GET asks for of `size` bytes; without the header, all of them."""
    if header is None:
        return Span(0, size)
    match = RANGE.fullmatch(header)
    first = int(match[1]) if match else size
    last = int(match[2]) if match and match[2] else size - 1
    if not match or first >= size or last < first:
        raise Refusal(416, f"one range of bytes, bytes=FIRST-LAST, of {size} is what there is")
    return Span(first, min(last, size - 1) - first + 1)


def read_content_range(header: str | None, length: str | None) -> Part:
    """Return what a PUT brings, if that agrees with its Content-Length."""
    match = CONTENT_RANGE.fullmatch(header or "")
    if not match:
        raise Refusal(400, "Content-Range must be 'bytes FIRST-LAST/TOTAL' or 'bytes */TOTAL'")
    total = int(match[3])
    span = None if match[1] is None else Span(int(match[1]), int(match[2]) - int(match[1]) + 1)
    if span and (span.length < 1 or span.first + span.length > total):
        raise Refusal(400, f"there is no such range in {total} bytes")
    if length is not None and length != str(span.length if span else 0):
        raise Refusal(400, "Content-Length and Content-Range do not agree")
    return Part(span, total)
