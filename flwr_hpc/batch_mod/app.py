"""The user's app: where it lies, how the job gets it, and how its rest is called there."""

from __future__ import annotations

import copy
import importlib
import os
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from flwr_hpc.batch_mod.carry import Failure, Reply
from flwr_hpc.errors import UserError

Next = Callable[[Message, Context], Message]
BUNDLED = (".py", ".toml", ".md", ".yaml", ".yml", ".json", ".jsonl")  # what Flower itself sends


@dataclass(frozen=True)
class AppRef:
    """A ClientApp: the folder to import it from and ``module:attribute``."""

    folder: str
    ref: str


def find_app(caller: str, ref: str = "") -> AppRef:
    """Find the app that uses the mod, by its ``pyproject.toml``.

    Parameters
    ----------
    caller : str
        The file that made the mod.
    ref : str
        ``module:attribute``, if it is not the one of ``pyproject.toml``.
    """
    for folder in _folders(caller):
        found = _component(folder)
        if found:
            return AppRef(str(folder), ref or found)
    if ref:
        return AppRef("", ref)
    raise UserError(
        f"flwr_hpc.batch: no pyproject.toml with [tool.flwr.app.components] clientapp above "
        f"{caller}, nor in the import path. Name the app: flwr_hpc.batch(app='MODULE:ATTRIBUTE')"
    )


def copy_app(app: AppRef, target: Path) -> AppRef:
    """Copy the app's files to the shared file system, once."""
    if not app.folder:
        return app
    if not target.exists():
        draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        shutil.copytree(app.folder, draft, ignore=_not_bundled, dirs_exist_ok=True)
        for path in (draft, *draft.rglob("*")):  # copied with their modes
            path.chmod(path.stat().st_mode & 0o700)
        try:
            draft.rename(target)
        except OSError:  # another process was faster
            shutil.rmtree(draft)
    return AppRef(str(target), app.ref)


def import_app(app: AppRef) -> ClientApp:
    """Import the app, as Flower does."""
    if app.folder and app.folder not in sys.path:
        sys.path.insert(0, app.folder)
    module, _, attribute = app.ref.partition(":")
    found: Any = importlib.import_module(module)
    for name in attribute.split("."):
        found = getattr(found, name, None)
    if not isinstance(found, ClientApp):
        raise UserError(f"flwr_hpc.batch: '{app.ref}' is not a ClientApp")
    return found


class Reached(BaseException):
    """Unwinds what comes before the mod; no app catches it by accident."""


class Rest:
    """One message on its way through the app to the mod, whose rest then gets it.

    Parameters
    ----------
    message : Message
    context : Context
        As they were at the mod in the ClientApp's process.
    """

    def __init__(self, message: Message, context: Context) -> None:
        self.message, self.context = message, context
        self.reply: Message | None = None
        self.failure: Failure | None = None
        self.reached = False

    def run(self, call_next: Next) -> Message:
        """Call the rest; what comes before the mod has had its turn elsewhere."""
        self.reached = True
        try:
            self.reply = call_next(self.message, self.context)
        except BaseException as exc:  # SystemExit too must not end the job without a reply
            self.failure = Failure.of(exc)
        raise Reached


_rest: Rest | None = None


def rest() -> Rest | None:
    """Return the message on its way in this process; None outside of jobs."""
    return _rest


def call(app: ClientApp, message: Message, context: Context) -> Reply:
    """Give a message to the rest of the app.

    Mods before ours and the app's life span get copies, whose changes are dropped.
    """
    global _rest
    _rest = way = Rest(message, context)
    twin = copy.deepcopy(context)  # cheap: the bytes of arrays are shared
    try:
        reply = app(copy.deepcopy(message), twin)
        if not way.reached:  # the mod was left out, for this type of message or in jobs
            way.reply, way.context = reply, twin
    except Reached:
        return Reply(way.reply, way.context, way.failure)
    except BaseException as exc:
        return Reply(context=way.context, failure=way.failure or Failure.of(exc))
    finally:
        _rest = None
    return Reply(way.reply, way.context, way.failure)


def _folders(caller: str) -> Iterator[Path]:
    if caller:
        yield from Path(caller).absolute().parents
    yield from (Path(p) for p in sys.path if p)


def _component(folder: Path) -> str:
    try:
        with open(folder / "pyproject.toml", "rb") as f:
            tables = tomllib.load(f)
    except (OSError, tomllib.TOMLDecodeError):
        return ""
    app = tables.get("tool", {}).get("flwr", {}).get("app", {})
    return str(app.get("components", {}).get("clientapp", ""))


def _not_bundled(folder: str, names: list[str]) -> list[str]:
    return [
        name
        for name in names
        if name.startswith((".", "__pycache__"))
        or not ((Path(folder) / name).is_dir() or name.endswith(BUNDLED))
    ]
