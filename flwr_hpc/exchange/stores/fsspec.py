"""Every place that fsspec reaches: S3, SFTP, ..."""

from __future__ import annotations

import re
import threading
import uuid
from collections.abc import Callable, Generator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, TypeVar

from flwr_hpc.errors import UserError, closest
from flwr_hpc.exchange.resumable import s3, sftp
from flwr_hpc.exchange.resumable.download import Read, download
from flwr_hpc.exchange.store import KEY, Reference, Store
from flwr_hpc.exchange.tensorfile import sha256_of
from flwr_hpc.exchange.tensors import BadPayload
from flwr_hpc.exchange.transfer import Cancelled, Transfer
from flwr_hpc.files import draft, is_disk_trouble, try_lock

T = TypeVar("T")

PIECE = 2 << 20  # bytes that are read at a time, in each of a download's lines
S3_PROTOCOLS, SSH_PROTOCOLS = ("s3", "s3a"), ("sftp", "ssh")
PROTOCOL = re.compile(r"(?:^|::)([^:/]+)(?=::|://)")
# Scheme of a URL: the package that reaches it, and the extra of flwr-hpc that brings it. For SFTP
# fsspec alone would take paramiko, which reads no ~/.ssh/config and by default trusts any host.
PACKAGES = {
    **dict.fromkeys(S3_PROTOCOLS, ("s3fs", "s3")),
    **dict.fromkeys(SSH_PROTOCOLS, ("sshfs", "sftp")),
}
# Empty, `known_hosts` means those of OpenSSH; left out, sshfs would trust any host.
# A line that is silent for a minute is given up.
SSH = {"known_hosts": (), "connect_timeout": 30, "keepalive_interval": 15, "keepalive_count_max": 4}
# Payloads are checked by their names; servers other than AWS's stumble over botocore's own checks.
S3 = {
    "config_kwargs": {
        "connect_timeout": 30,
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
}
OPTIONS: dict[str, dict[str, Any]] = {"s3": S3, "s3a": S3, "sftp": SSH, "ssh": SSH}
# What is uploaded appears whole there; elsewhere it is renamed when it is whole.
ATOMIC = (*S3_PROTOCOLS, "gs", "gcs", "az", "abfs", "abfss", "oss", "memory")
# Those that go on where they were cut.
UPLOADS = {
    **dict.fromkeys(S3_PROTOCOLS, s3.upload),
    **dict.fromkeys(SSH_PROTOCOLS, sftp.upload),
}
DRAFT = re.compile(rf"{KEY.pattern}(\.[0-9a-f]{{8}}\.tmp|{re.escape(sftp.PART)})")
HINTS = {
    "HostKeyNotVerifiable": "Its host key is not in ~/.ssh/known_hosts of this machine: connect "
    "once with ssh, and compare the fingerprint with what its administrators publish",
    "NoCredentialsError": "Put them into ~/.aws/credentials of this machine, or set AWS_PROFILE",
}


class _Unreachable(OSError):
    """Twice in vain, over a new connection the second time."""


FINAL = (FileNotFoundError, PermissionError, BadPayload, UserError, Cancelled, _Unreachable)


class FsspecStore(Store):
    """A folder of payloads at an fsspec URL.

    Parameters
    ----------
    url : str
        ``s3://bucket/path``, ``sftp://host/path``, ``memory://path``, ...
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._connected: tuple[Any, str] | None = None
        self._lock = threading.Lock()

    def check(self) -> None:
        _check_protocols(self.url)
        try:
            self._attempt(lambda fs, root: fs.info(root))
        except FileNotFoundError:  # it is made with the first payload
            return
        except OSError as exc:
            reason = str(exc) if isinstance(exc, _Unreachable) else explain(exc)
            raise UserError(f"exchange.store cannot be reached from here: {reason}") from None

    def put(self, path: Path, folder: str = "shared", sha256: str | None = None) -> Reference:
        ref = Reference.of(folder, sha256 or sha256_of(path), path.stat().st_size)
        moved = Transfer()

        def work(fs: Any, root: str) -> None:
            target = f"{root}/{ref.key}"
            if _size(fs, target) != ref.bytes:
                _upload(fs, path, target, self.url, moved)

        self._attempt(work, moved)
        return ref

    def get(
        self, ref: Reference, target: Path, *, own: bool = False, transfer: Transfer | None = None
    ) -> None:
        def persist(attempt: Callable[[Read], None], transfer: Transfer) -> None:
            def work(fs: Any, root: str) -> None:
                attempt(lambda first, end: _read(_open(fs, root, ref, self.url), first, end))

            self._attempt(work, transfer)

        self.check_size(ref, self.size(ref))
        with draft(target, durable=not own) as temporary:
            download(persist, ref, target.parent, temporary, transfer or Transfer())

    def size(self, ref: Reference) -> int | None:
        return self._attempt(lambda fs, root: _size(fs, f"{root}/{ref.key}"))

    def open(self, ref: Reference) -> IO[bytes]:
        return _open(*self._place(), ref, self.url)

    def delete(self, ref: Reference) -> None:
        with suppress(FileNotFoundError):
            self._attempt(lambda fs, root: fs.rm_file(f"{root}/{ref.key}"))

    def sweep(self) -> None:
        with suppress(FileNotFoundError):
            self._attempt(lambda fs, root: _sweep(fs, root, self.url))

    def _place(self) -> tuple[Any, str]:
        with self._lock:
            place = self._connected
            if place is None:
                place = self._connected = connect(self.url)
            return place

    def _attempt(self, work: Callable[[Any, str], T], moved: Transfer | None = None) -> T:
        """Do it; over a new connection if that fails, for as long as something moves.

        The old one may have been lost for hours. Nothing moves in what is no transfer: that is
        tried twice.
        """
        moved, before, again = moved or Transfer(), -1, False
        while True:
            place = None
            try:
                place = self._place()
                return work(*place)
            except FINAL:
                raise
            except Exception as exc:  # each of fsspec's file systems has its own kinds
                if is_disk_trouble(exc):
                    raise
                self._disconnect(place)
                if again and moved.done <= before:
                    raise _Unreachable(f"{self.url}: {explain(exc)}") from exc
            again, before = True, moved.done

    def _disconnect(self, place: tuple[Any, str] | None) -> None:
        """Use a connection no more, unless another thread has made a new one already."""
        with self._lock:
            if place is not None and self._connected is place:
                self._connected = None
                place[0].clear_instance_cache()


def connect(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it.

    Parameters
    ----------
    url : str
    """
    from fsspec.core import url_to_fs  # slow to import, and not needed to plan a run

    protocols = _check_packages(url)
    fs, root = url_to_fs(url, **{name: dict(OPTIONS.get(name, {})) for name in protocols})
    return fs, root.rstrip("/")


def explain(exc: BaseException) -> str:
    """Return what a file system's error says, and what to do about it where that is known.

    Parameters
    ----------
    exc : BaseException
    """
    name = type(exc).__name__
    return f"{name}: {exc}" + (f". {HINTS[name]}" if name in HINTS else "")


def _check_protocols(url: str) -> None:
    import fsspec

    known = fsspec.available_protocols()
    for protocol in PROTOCOL.findall(url):
        if protocol not in known:
            raise UserError(
                f"exchange.store={url}: there is no file system '{protocol}'."
                f"{closest(protocol, known)} Examples: exchange.store=/shared/folder, "
                "exchange.store=s3://bucket/folder, exchange.store=sftp://host/folder"
            )
    for protocol in _check_packages(url):
        try:
            fsspec.get_filesystem_class(protocol)
        except ImportError as exc:
            raise UserError(f"exchange.store={url} cannot be reached from here: {exc}") from None


def _check_packages(url: str) -> list[str]:
    """Return the file systems that a URL goes through; UserError if a package is missing."""
    protocols = PROTOCOL.findall(url)
    for protocol in protocols:
        package, extra = PACKAGES.get(protocol, ("", ""))
        if package and find_spec(package) is None:
            raise UserError(
                f"exchange.store={url} needs the package {package}, at the server and at every "
                f"site. Install it there with: pip install 'flwr-hpc[{extra}]'"
            )
    return protocols


def _block(url: str) -> int | None:
    """Return how much to read at once; what goes by SSH asks its server."""
    return None if PROTOCOL.findall(url)[-1] in SSH_PROTOCOLS else PIECE


def _size(fs: Any, path: str) -> int | None:
    fs.invalidate_cache()  # others write here too
    with suppress(FileNotFoundError):
        return int(fs.size(path))
    return None


def _open(fs: Any, root: str, ref: Reference, url: str) -> IO[bytes]:
    try:
        opened: IO[bytes] = fs.open(
            f"{root}/{ref.key}", "rb", block_size=_block(url), cache_type="none"
        )
    except FileNotFoundError:
        raise BadPayload(f"payload {ref.key} is not in the store {url}") from None
    return opened


def _read(opened: IO[bytes], first: int, end: int) -> Generator[bytes, None, None]:
    with opened as file:
        file.seek(first)
        while first < end and (piece := file.read(min(PIECE, end - first))):
            yield piece
            first += len(piece)


def _upload(fs: Any, path: Path, target: str, url: str, moved: Transfer) -> None:
    """Let a file appear whole, also where another process is killed while it uploads the same."""
    resumable = UPLOADS.get(url.partition("://")[0])
    with open(path, "rb") as file:
        if resumable and try_lock(file):  # else another process of this host is at it
            resumable(fs, path, target, moved)
            return
    if PROTOCOL.findall(url)[-1] in ATOMIC:
        fs.put_file(str(path), target)
        return
    draft = f"{target}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        fs.put_file(str(path), draft)
        fs.mv(draft, target)
    except BaseException:
        with suppress(Exception):
            fs.rm_file(draft)
        raise


def _sweep(fs: Any, root: str, url: str) -> None:
    fs.invalidate_cache()
    if url.partition("://")[0] in S3_PROTOCOLS:
        s3.abandon(fs, root)
    for path in fs.find(root, maxdepth=2):
        name = "/".join(str(path).split("/")[-2:])
        if KEY.fullmatch(name) or DRAFT.fullmatch(name):
            with suppress(FileNotFoundError):
                fs.rm_file(path)
