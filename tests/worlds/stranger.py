"""Another user of this host: `nobody`, who may read files (Python has to start) but owns none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

NOBODY = 65534
# The sockets of such a process are nobody's. It may read our installation, wherever that lies.
AS_NOBODY = [
    "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups",
    "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search",
]  # fmt: skip

needs_another_user = pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("setpriv") is None,
    reason="only root can speak as another user, by util-linux's setpriv",
)


def open_to_others(*folders: Path) -> dict[str, str]:
    """Return what other users may read, write or enter there, with its mode."""
    paths = [path for folder in folders for path in (folder, *folder.rglob("*"))]
    modes = {path: path.lstat().st_mode & 0o777 for path in paths if not path.is_symlink()}
    return {str(path): oct(mode) for path, mode in modes.items() if mode & 0o077}
