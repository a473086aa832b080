"""A folder that the server and all sites share."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from flwr_hpc.exchange.store import KEY, Reference, Store
from flwr_hpc.exchange.tensorfile import link_or_copy, sha256_of
from flwr_hpc.exchange.tensors import BadPayload
from flwr_hpc.files import draft

READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class FileStore(Store):
    """A folder of payloads; other parties write to it, so no link in it is ever followed.

    Payloads are hard links where that works, and read-only: nothing is copied on the way in, and
    a file that was put must not be written to again.

    Parameters
    ----------
    url : str
        A path, or ``file:///path``.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._root = Path(url.removeprefix("file://")).expanduser().absolute()

    def put(self, path: Path, folder: str = "shared", sha256: str | None = None) -> Reference:
        ref = Reference.of(folder, sha256 or sha256_of(path), path.stat().st_size)
        if self.size(ref) == ref.bytes:
            return ref
        with draft(self._root / ref.key) as temporary:
            link_or_copy(path, temporary)
            temporary.chmod(stat.S_IMODE(temporary.stat().st_mode) & ~0o222)
            _check_owner(temporary)
        return ref

    def size(self, ref: Reference) -> int | None:
        try:
            with self._folder(ref.folder) as folder:
                found = os.stat(_name(ref), dir_fd=folder, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def open(self, ref: Reference) -> IO[bytes]:
        if self.size(ref) is None:  # opening a device may do something
            raise BadPayload(f"payload {ref.key} is no regular file of the store {self.url}")
        with self._folder(ref.folder) as folder:
            # It may have become a pipe since: without O_NONBLOCK that would wait for a writer.
            file = os.fdopen(os.open(_name(ref), READ | os.O_NONBLOCK, dir_fd=folder), "rb")
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise BadPayload(f"payload {ref.key} is no regular file")
        return file

    def link(self, ref: Reference, target: Path) -> bool:
        try:
            with self._folder(ref.folder) as folder:
                os.link(_name(ref), target, src_dir_fd=folder, follow_symlinks=False)
        except OSError:  # another file system, a foreign owner, or no hard links here
            return False
        if stat.S_ISREG(target.lstat().st_mode):
            return True
        target.unlink()
        return False

    def delete(self, ref: Reference) -> None:
        with suppress(FileNotFoundError, NotADirectoryError), self._folder(ref.folder) as folder:
            os.unlink(_name(ref), dir_fd=folder)

    def sweep(self) -> None:
        for name in os.listdir(self._root) if self._root.is_dir() else ():
            with suppress(NotADirectoryError), self._folder(name) as folder:
                for file in os.listdir(folder):
                    if KEY.fullmatch(f"{name}/{file}"):
                        with suppress(FileNotFoundError):
                            os.unlink(file, dir_fd=folder)

    @contextmanager
    def _folder(self, name: str) -> Iterator[int]:
        """Open a folder itself: as a link it could be another party's; NotADirectoryError."""
        descriptor = os.open(self._root / name, READ | os.O_DIRECTORY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def _name(ref: Reference) -> str:
    return ref.key.partition("/")[2]


def _check_owner(path: Path) -> None:
    """Refuse a folder that another user made: what is put there would be theirs to replace."""
    folder = path.parent.lstat()
    if not stat.S_ISDIR(folder.st_mode) or folder.st_uid != path.stat().st_uid:
        raise PermissionError(
            f"{path.parent} belongs to user {folder.st_uid}. "
            "Name another exchange.store, or remove that folder"
        )
