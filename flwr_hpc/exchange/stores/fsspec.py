"""Every place that fsspec reaches: S3, SFTP, ..."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from flwr_hpc.errors import UserError, closest
from flwr_hpc.exchange.store import KEY, Reference, Store
from flwr_hpc.exchange.tensorfile import sha256_of
from flwr_hpc.exchange.tensors import BadPayload

PIECE = 1 << 20  # bytes moved at a time
BLOCK = 8 << 20  # bytes a remote file system may gather before it uploads


class FsspecStore(Store):
    """A folder of payloads at an fsspec URL.

    Parameters
    ----------
    url : str
        ``s3://bucket/path``, ``sftp://host/path``, ``memory://path``, ...
    """

    @cached_property
    def _place(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs  # slow to import, and not needed to plan a run

        fs, root = url_to_fs(self.url)
        return fs, root.rstrip("/")

    def check(self) -> None:
        import fsspec

        scheme = self.url.partition("://")[0]

        for protocol in scheme.split("::"):
            known = fsspec.available_protocols()
            if protocol not in known:
                raise UserError(
                    f"exchange.store={self.url}: there is no file system '{protocol}'."
                    f"{closest(protocol, known)} Examples: exchange.store=/shared/folder, "
                    "exchange.store=s3://bucket/folder, exchange.store=sftp://host/folder"
                )
            try:
                fsspec.get_filesystem_class(protocol)
            except ImportError as exc:
                raise UserError(
                    f"exchange.store={self.url} cannot be reached from here: {exc}"
                ) from None

    def put(self, path: Path, folder: str = "shared", sha256: str | None = None) -> Reference:
        digest = sha256 or sha256_of(path)
        ref = Reference.of(folder, digest, path.stat().st_size)
        if self.size(ref) == ref.bytes:
            return ref
        fs, _ = self._place
        fs.makedirs(self._path(ref).rsplit("/", 1)[0], exist_ok=True)
        with open(path, "rb") as source, fs.open(self._path(ref), "wb", block_size=BLOCK) as f:
            shutil.copyfileobj(source, f, PIECE)
        return ref

    def size(self, ref: Reference) -> int | None:
        fs, _ = self._place
        fs.invalidate_cache()  # others write here too
        try:
            return int(fs.size(self._path(ref)))
        except FileNotFoundError:
            return None

    def open(self, ref: Reference) -> IO[bytes]:
        try:
            opened: IO[bytes] = self._place[0].open(self._path(ref), "rb", block_size=BLOCK)
        except FileNotFoundError:
            raise BadPayload(f"payload {ref.key} is not in the store {self.url}") from None
        return opened

    def delete(self, ref: Reference) -> None:
        with _gone_is_fine():
            self._place[0].rm_file(self._path(ref))

    def sweep(self) -> None:
        fs, root = self._place
        with _gone_is_fine():
            fs.invalidate_cache()
            for name in fs.find(root, maxdepth=2):
                if KEY.fullmatch("/".join(str(name).split("/")[-2:])):
                    fs.rm_file(name)

    def _path(self, ref: Reference) -> str:
        return f"{self._place[1]}/{ref.key}"


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        return
