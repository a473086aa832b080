"""What a stranger runs on a host of the lab; imports nothing of ours.

``http|https HOST PORT SECONDS`` and, on standard input, a JSON list of ``[method, path, headers]``;
prints the list of the answers' statuses, 0 where none came in so many seconds.
"""

from __future__ import annotations

import http.client
import json
import ssl
import sys


def status(
    server: tuple[str, str, int, float], method: str, path: str, headers: dict[str, str]
) -> int:
    """Ask whoever answers, with whatever certificate."""
    scheme, host, port, wait_s = server
    connection: http.client.HTTPConnection
    if scheme == "https":
        context = ssl._create_unverified_context()
        connection = http.client.HTTPSConnection(host, port, timeout=wait_s, context=context)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=wait_s)
    try:
        connection.request(method, path, body=b"", headers=headers)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


if __name__ == "__main__":
    scheme, host, port, wait_s = sys.argv[1:]
    server = (scheme, host, int(port), float(wait_s))
    print(json.dumps([status(server, *words) for words in json.load(sys.stdin)]))
