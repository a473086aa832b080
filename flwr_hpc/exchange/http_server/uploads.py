"""Payloads on their way into the store: partial files that survive every end of every process.

A partial file's name says whose payload it is and how long it will be, its length how much of it
has come: nothing else has to be remembered. Bytes are taken only at the end of what is there, so
that of two writers, one perhaps on a connection that is dead but not closed, each byte is taken
from one of them, and the other learns how far the file is.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flwr_hpc.clock import Clock
from flwr_hpc.exchange.store import KEY, SHA256, Reference, Store
from flwr_hpc.files import private_folder, seal, sync_dir

SETTING = "exchange.quota_gb"
PIECE = 1 << 20  # bytes hashed at a time where a partial file is read again
PARTIAL = re.compile(rf"\.({SHA256.pattern})\.([0-9]{{1,18}})\.partial")
SWEEP_S = 3600.0
ABANDONED_S = 3600.0  # the server fetches what a message names long before


class Refusal(Exception):
    """What a peer is answered in place of what it asked for."""

    def __init__(self, status: int, reason: str, offset: int | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.offset = status, reason, offset


@dataclass(frozen=True)
class Limits:
    """What one site may take of the server."""

    quota_bytes: int = 10**12  # in the store and announced
    partials: int = 16  # unfinished uploads: the oldest goes when one more is begun
    partial_age_s: float = 7 * 86400.0  # an upload that has not moved for so long is forgotten
    requests: int = 32  # at once; each holds up to 1 MB
    idle_s: float = 60.0  # a peer that neither sends nor takes a byte for so long is cut off


class Upload:
    """One partial file; its methods may be called from any thread.

    Parameters
    ----------
    path : Path
    ref : Reference
        Of the payload that it will be.
    """

    def __init__(self, path: Path, ref: Reference) -> None:
        self.ref = ref
        self._path = path
        self._lock = threading.Lock()
        self._digest = hashlib.sha256()
        self._hashed = 0  # bytes

    @property
    def offset(self) -> int:
        """How many bytes are there; 0 if the file has been given up meanwhile."""
        with suppress(FileNotFoundError):
            return self._path.stat().st_size
        return 0

    def append(self, offset: int, data: bytes | bytearray) -> None:
        """Take bytes that follow what is there; any others are refused."""
        with self._lock:
            if offset != (here := self.offset):
                raise Refusal(409, f"{here} bytes are here, not {offset}", here)
            try:
                file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            except FileNotFoundError:
                raise Refusal(409, "this upload has been given up: begin it again", 0) from None
            try:
                left = memoryview(data)
                while left:
                    left = left[os.write(file, left) :]
            finally:
                os.close(file)
            if self._hashed == offset:
                self._digest.update(data)
                self._hashed += len(data)

    def publish(self, target: Path) -> None:
        """Check what has come, and let it appear in the store whole."""
        with self._lock:
            if not self._path.exists():  # another writer was faster
                if target.exists():
                    return
                raise Refusal(409, "this upload has been given up: begin it again", 0)
            self._hash_the_rest()
            if (found := self._digest.hexdigest()) != self.ref.sha256:
                self._path.unlink()
                raise Refusal(422, f"what came has the sha256 {found}, not {self.ref.sha256}", 0)
            seal(self._path, found)
            self._path.chmod(0o400)  # what is published is never written to again
            with open(self._path, "rb") as file:
                os.fsync(file.fileno())
            self._path.replace(target)
            sync_dir(target.parent)

    def _hash_the_rest(self) -> None:
        """Hash what came before this process did, or just before a disk was full."""
        with open(self._path, "rb") as file:
            file.seek(self._hashed)
            while piece := file.read(PIECE):
                self._digest.update(piece)
                self._hashed += len(piece)


class Uploads:
    """All partial files under the store's root; its methods may be called from any thread.

    Parameters
    ----------
    root : Path
    store : Store
        On that folder.
    limits : Limits
    clock : Clock
    """

    def __init__(self, root: Path, store: Store, limits: Limits, clock: Clock) -> None:
        self._root, self._store = root, store
        self._limits, self._clock = limits, clock
        self._lock = threading.Lock()
        self._open: dict[Path, Upload] = {}  # those with a file, for their hashes so far
        self._swept_at = float("-inf")

    def begin(self, ref: Reference) -> Upload | None:
        """Begin an upload, or go on with it; None if the payload is there already."""
        self._sweep()
        if self._store.size(ref) == ref.bytes:
            return None
        folder = private_folder(self._root / ref.folder)
        path = folder / f".{ref.sha256}.{ref.bytes}.partial"
        with self._lock:  # what is announced counts at once
            self._check_quota(ref, path)
            if not path.exists():
                if self._store.size(ref) == ref.bytes:  # another writer has just published it
                    return None
                self._make_room(folder)
                path.touch(mode=0o600)
                self._open.pop(path, None)  # its hash is of a file that is gone
            upload = self._open.setdefault(path, Upload(path, ref))
        self._check_disk(ref.bytes - upload.offset)
        return upload

    def check_size(self, size: int) -> None:
        """Refuse what a site can never have here, however long it waits for room."""
        if size > (quota := self._limits.quota_bytes):
            raise Refusal(413, f"{size} bytes are above the quota of {quota} ({SETTING})")

    def publish(self, upload: Upload) -> None:
        """Publish a whole upload; refuse and forget one that is not what its name says."""
        target = self._root / upload.ref.key
        try:
            upload.publish(target)
        finally:
            with self._lock:
                self._forget()

    def offset(self, folder: str, sha256: str) -> int | None:
        """Return how much of a payload has come, None if nothing of it was announced."""
        sizes = []
        for path, found, _ in self._partials(folder):
            if found == sha256:
                with suppress(FileNotFoundError):  # published just now
                    sizes.append(path.stat().st_size)
        return max(sizes, default=None)

    def clear(self, folder: str) -> None:
        """Remove all that a site has, whole or not."""
        with self._lock:
            for path in self._files(folder):
                if PARTIAL.fullmatch(path.name) or path.suffix == ".payload":
                    path.unlink(missing_ok=True)
            self._forget()

    def _check_quota(self, ref: Reference, mine: Path) -> None:
        self.check_size(ref.bytes)
        quota = self._limits.quota_bytes
        others = self._others(ref.folder, {mine, self._root / ref.key})
        used = sum(size for _, size, _ in others)
        abandoned = self._clock.wall() - ABANDONED_S
        for moved_at, size, path in sorted(others):
            if used + ref.bytes > quota and moved_at < abandoned:
                path.unlink(missing_ok=True)
                used -= size
        self._forget()
        if used + ref.bytes > quota:
            more = f"{ref.bytes} bytes more than the {used} in use"
            raise Refusal(507, f"{more} are above the quota of {quota} ({SETTING})")

    def _others(self, folder: str, mine: Collection[Path]) -> list[tuple[float, int, Path]]:
        """Return what a site has, whole or announced: when it last moved, bytes, path."""
        sizes = {path: total for path, _, total in self._partials(folder)}
        for path in self._files(folder):
            if path.suffix == ".payload":
                with suppress(FileNotFoundError):
                    sizes[path] = path.stat().st_size
        return [(_moved_at(path), size, path) for path, size in sizes.items() if path not in mine]

    def _check_disk(self, missing: int) -> None:
        if shutil.disk_usage(self._root).free < missing:
            raise Refusal(507, f"the server's disk has no room for the {missing} bytes to come")

    def _make_room(self, folder: Path) -> None:
        """Have one partial file less than may be."""
        paths = [path for path, *_ in self._partials(folder.name)]
        paths.sort(key=_moved_at)
        for path in paths[: max(0, len(paths) + 1 - self._limits.partials)]:
            path.unlink(missing_ok=True)
        self._forget()

    def _sweep(self) -> None:
        """Remove partial files that have not moved for too long, whosever they are."""
        now = self._clock.now()
        with self._lock:
            if now - self._swept_at < SWEEP_S or not self._root.is_dir():
                return
            self._swept_at = now
            oldest = self._clock.wall() - self._limits.partial_age_s
            for folder in os.listdir(self._root):
                for path, *_ in self._partials(folder):
                    if _moved_at(path) < oldest:
                        path.unlink(missing_ok=True)
            self._forget()

    def _forget(self) -> None:
        """Keep the hashes of those that still have a file."""
        self._open = {path: upload for path, upload in self._open.items() if path.exists()}

    def _partials(self, folder: str) -> Iterator[tuple[Path, str, int]]:
        """Yield path, sha256 and announced size of every partial file of a folder."""
        for path in self._files(folder):
            if match := PARTIAL.fullmatch(path.name):
                yield path, match[1], int(match[2])

    def _files(self, folder: str) -> list[Path]:
        try:
            return sorted((self._root / folder).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []


def adopt(root: Path, before: str, now: str) -> None:
    """Let a site that is given another folder go on with what it had sent into the one before.

    What was whole becomes an upload that lacks nothing: its sender announces it again.
    """
    source = root / before
    if source.is_symlink() or not source.is_dir():
        return
    for path in source.iterdir():
        if KEY.fullmatch(f"{before}/{path.name}"):
            path.rename(source / f".{path.stem}.{path.stat().st_size}.partial")
    source.rename(root / now)


def _moved_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
