"""A wheel of the flwr-hpc that runs here, to be installed on another host."""

from __future__ import annotations

import io
import zipfile
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from hashlib import sha256
from importlib.metadata import distribution
from pathlib import Path

import flwr_hpc
from flwr_hpc import __version__
from flwr_hpc.config.folder import conf_dir
from flwr_hpc.config.invitation import wheel_name
from flwr_hpc.schedulers.script import templates_dir

NAME = wheel_name(__version__)
_INFO = f"flwr_hpc-{__version__}.dist-info"
_WHEEL = "Wheel-Version: 1.0\nGenerator: flwr-hpc\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def build_wheel() -> bytes:
    """Return the wheel of the code that runs here, whether a checkout's or an installed one's."""
    records = []
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in _contents():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
            digest = urlsafe_b64encode(sha256(content).digest()).rstrip(b"=").decode()
            records.append(f"{name},sha256={digest},{len(content)}\n")
        records.append(f"{_INFO}/RECORD,,\n")
        archive.writestr(zipfile.ZipInfo(f"{_INFO}/RECORD"), "".join(records))
    return packed.getvalue()


def _contents() -> Iterator[tuple[str, bytes]]:
    package = Path(flwr_hpc.__file__).parent
    parts = {
        "flwr_hpc": package,
        "strategies": package.with_name("strategies"),
        "flwr_hpc/conf": conf_dir(),
        "flwr_hpc/slurm_templates": templates_dir(),
    }
    found = {
        f"{name}/{path.relative_to(root).as_posix()}": path
        for name, root in parts.items()
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    for name, path in sorted(found.items()):
        yield name, path.read_bytes()
    yield f"{_INFO}/METADATA", str(distribution("flwr-hpc").metadata).encode()
    yield f"{_INFO}/WHEEL", _WHEEL.encode()
