"""Every place that fsspec reaches: S3, SFTP, ..."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, TypeVar

from flwr_hpc.errors import UserError, closest
from flwr_hpc.exchange.store import KEY, Reference, Store
from flwr_hpc.exchange.tensorfile import sha256_of
from flwr_hpc.exchange.tensors import BadPayload
from flwr_hpc.exchange.transfer import Cancelled, Transfer
from flwr_hpc.files import is_disk_trouble

T = TypeVar("T")

BLOCK = 8 << 20  # bytes that are read at a time
SSH_PROTOCOLS = ("sftp", "ssh")
PROTOCOL = re.compile(r"(?:^|::)([^:/]+)(?=::|://)")
# Scheme of a URL: the package that reaches it, and the extra of flwr-hpc that brings it. For SFTP
# fsspec alone would take paramiko, which reads no ~/.ssh/config and by default trusts any host.
PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), ("s3fs", "s3")),
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
ATOMIC = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "memory")
DRAFT = re.compile(rf"{KEY.pattern}\.[0-9a-f]{{8}}\.tmp")
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
        if self.size(ref) != ref.bytes:
            self._attempt(lambda fs, root: _upload(fs, path, f"{root}/{ref.key}", self.url))
        return ref

    def get(
        self, ref: Reference, target: Path, *, own: bool = False, transfer: Transfer | None = None
    ) -> None:
        moved = transfer or Transfer()
        before = moved.done

        def attempt(*_: object) -> None:
            moved.advance(before - moved.done)  # what a lost connection has brought
            super(FsspecStore, self).get(ref, target, own=own, transfer=moved)

        self._attempt(attempt)

    def size(self, ref: Reference) -> int | None:
        def look(fs: Any, root: str) -> int:
            fs.invalidate_cache()  # others write here too
            return int(fs.size(f"{root}/{ref.key}"))

        try:
            return self._attempt(look)
        except FileNotFoundError:
            return None

    def open(self, ref: Reference) -> IO[bytes]:
        fs, root = self._place()
        try:
            opened: IO[bytes] = fs.open(f"{root}/{ref.key}", "rb", block_size=_block(self.url))
        except FileNotFoundError:
            raise BadPayload(f"payload {ref.key} is not in the store {self.url}") from None
        return opened

    def delete(self, ref: Reference) -> None:
        with suppress(FileNotFoundError):
            self._attempt(lambda fs, root: fs.rm_file(f"{root}/{ref.key}"))

    def sweep(self) -> None:
        with suppress(FileNotFoundError):
            self._attempt(_sweep)

    def _place(self) -> tuple[Any, str]:
        place = self._connected
        if place is None:
            place = self._connected = connect(self.url)
        return place

    def _attempt(self, work: Callable[[Any, str], T], again: bool = True) -> T:
        """Do it; once more over a new connection: the old one may have been lost for hours."""
        try:
            return work(*self._place())
        except FINAL:
            raise
        except Exception as exc:  # each of fsspec's file systems has its own kinds
            if is_disk_trouble(exc):
                raise
            self._disconnect()
            if not again:
                raise _Unreachable(f"{self.url}: {explain(exc)}") from exc
        return self._attempt(work, again=False)

    def _disconnect(self) -> None:
        place, self._connected = self._connected, None
        if place is not None:
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
    return None if PROTOCOL.findall(url)[-1] in SSH_PROTOCOLS else BLOCK


def _upload(fs: Any, path: Path, target: str, url: str) -> None:
    """Let a file appear whole, also where another process is killed while it uploads the same."""
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


def _sweep(fs: Any, root: str) -> None:
    fs.invalidate_cache()
    for path in fs.find(root, maxdepth=2):
        name = "/".join(str(path).split("/")[-2:])
        if KEY.fullmatch(name) or DRAFT.fullmatch(name):
            with suppress(FileNotFoundError):
                fs.rm_file(path)
