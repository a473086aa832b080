"""A file to an SFTP server, from where the last attempt stopped, under another name until whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flwr_hpc.exchange.transfer import Interrupted, Transfer

PART = ".part"
# Bytes that have arrived before the next are sent. The blocks of a piece are written in any order:
# of what a cut has left there, the last piece may have holes, and no other.
PIECE = 8 << 20


def upload(fs: Any, path: Path, target: str, transfer: Transfer) -> None:
    """Have a file at `target`, whole at once; nobody else must be uploading it.

    Parameters
    ----------
    fs : sshfs.SSHFileSystem
    path : Path
    target : str
        A name that says what is in the file: what lies beside it as a part is continued.
    transfer : Transfer
    """
    part, size = target + PART, path.stat().st_size
    fs.makedirs(os.path.dirname(target), exist_ok=True)
    with fs.open(part, "ab"):  # is there from now on
        pass
    with open(path, "rb") as source, fs.open(part, "r+b") as there:
        begin = _whole_pieces(there.seek(0, os.SEEK_END), size)
        if begin == 0:
            there.truncate(0)  # it may have been longer
        source.seek(begin)
        there.seek(begin)
        transfer.total, transfer.done = size, begin
        while piece := source.read(PIECE):
            there.write(piece)
            transfer.advance(len(piece))
    try:
        found = fs.size(part)
        if found != size:
            raise Interrupted(f"{part} has {found} bytes after all {size} were sent")
        fs.mv(part, target)
    except FileNotFoundError:  # a new session of the server has swept its store meanwhile
        raise Interrupted(f"{part} was removed while it was uploaded") from None


def _whole_pieces(there: int, size: int) -> int:
    """Return how many of the bytes that are there are surely the file's."""
    return 0 if there > size else max(0, there - 1) // PIECE * PIECE
