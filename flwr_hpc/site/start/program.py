"""``flwr-clientapp`` as SuperExec finds it: asks the fork server for a process, and waits for it.

Run as ``python -S -E program.py SOCKET PROGRAM [arguments]``. Without a fork server it becomes
Flower's own program. Standard library only, and little of it.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys

LENGTH = struct.Struct("!I")


def main(path: str, program: str, *arguments: str) -> int:
    """Return the exit code of the process that was forked."""
    request = {"arguments": arguments, "folder": os.getcwd(), "env": dict(os.environ)}
    body = json.dumps(request).encode("utf-8", "surrogateescape")
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(path)
            socket.send_fds(connection, [LENGTH.pack(len(body))], [0, 1, 2])
            connection.sendall(body)
        except OSError:  # none there, or none any more
            os.execv(program, [program, *arguments])
        # While this process lives, and no longer, the fork may.
        code = connection.recv(1)
    return code[0] if code else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
