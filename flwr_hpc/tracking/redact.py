"""Keep secrets of a configuration out of what people share."""

from __future__ import annotations

import re
from typing import Any

MASK = "***"
SECRET = r"(?:token|secret|passw(?:or)?d|api_?key|access_?key|credentials?)"
NAMED = re.compile(rf"{SECRET}$", re.IGNORECASE)
GIVEN = re.compile(rf"({SECRET}['\"]?\s*[:=]\s*)(?!null\b)([^\s,}}]+)", re.IGNORECASE)


def redact_text(text: str) -> str:
    """Mask what follows ``..._token:``, ``..._API_KEY=`` and the like."""
    return GIVEN.sub(rf"\1{MASK}", text)


def redact(value: Any) -> Any:
    """Return nested dicts and lists with the values of secret keys masked."""
    if isinstance(value, dict):
        return {
            k: MASK if v and NAMED.search(str(k)) and isinstance(v, str) else redact(v)
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(v) for v in value]
    return redact_text(value) if isinstance(value, str) else value
