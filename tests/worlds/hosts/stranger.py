"""Another user of this host: `nobody`, who may read files (Python has to start) but owns none."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from pathlib import Path

import pytest
from worlds.files import paths_under

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
    found = {}
    for path in paths_under(*folders):
        with contextlib.suppress(FileNotFoundError):  # a draft, by now under its name
            mode = path.lstat().st_mode
            if not stat.S_ISLNK(mode) and mode & 0o077:
                found[str(path)] = oct(mode & 0o777)
    return found
