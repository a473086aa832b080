"""The settings of a run on a node, kept in its folder: each message is a process of its own.

What is composed once costs a later message nothing, and a run keeps the account it began with.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flwr.app import Context

from flwr_hpc import __version__
from flwr_hpc.batch_mod.settings import Settings, run_folder
from flwr_hpc.config.folder import conf_dir
from flwr_hpc.config.schema import decode
from flwr_hpc.errors import UserError
from flwr_hpc.files import publish

FROM_ENVIRONMENT = b"${oc."  # such a file may say something else each time


def settings_of(given: Mapping[str, Any], context: Context) -> Settings:
    """Return the composed settings; composed again when a file or a setting has changed."""
    key = _key(given)
    path = run_folder(given.get("workdir"), context) / f"settings-{key[:16]}.json"
    kept = _read(path) if key else None
    if kept is not None:
        return kept
    from flwr_hpc.batch_mod.compose import settle  # imports Hydra

    settings = settle(given)
    print(f"{settings.name}: account {settings.account}", file=sys.stderr, flush=True)
    if key:
        with contextlib.suppress(OSError):  # composed again, then
            publish(path, json.dumps(asdict(settings)))
    return settings


def _read(path: Path) -> Settings | None:
    try:
        return decode(Settings, json.loads(path.read_text()), str(path))
    except (OSError, ValueError, UserError):
        return None


def _key(given: Mapping[str, Any]) -> str:
    """Return what changes when the composed settings may; empty if nobody can tell."""
    words = json.dumps([__version__, {**given}], sort_keys=True, default=str)
    digest = hashlib.sha256(words.encode())
    for path in _files(given.get("config_dir")):
        content = path.read_bytes()
        if FROM_ENVIRONMENT in content:
            return ""
        digest.update(f"{path} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _files(config_dir: str | None) -> Iterator[Path]:
    folders = [conf_dir(), *([Path(config_dir).expanduser()] if config_dir else [])]
    for folder in folders:
        yield from sorted(folder.rglob("*.yaml"))
