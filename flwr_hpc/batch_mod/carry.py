"""How a message gets into the job and its reply comes back: files, within one account.

Pickle, since Flower has no public way to build a message with given metadata; it never crosses a
trust boundary here. Both sides need the same version of Flower.
"""

from __future__ import annotations

import io
import pickle
import sys
import traceback
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flwr.app import Context, Message

from flwr_hpc.errors import UserError
from flwr_hpc.files import draft


class AppError(RuntimeError):
    """What the app raised in the job, where its own type is not to be had here."""


@dataclass(frozen=True)
class Failure:
    """An exception in the job."""

    kind: str  # Its type, its message and its traceback there
    text: str
    trace: str = ""
    pickled: bytes = b""  # The exception itself, empty if it cannot be pickled

    @classmethod
    def of(cls, exc: BaseException) -> Failure:
        """Describe an exception that was caught."""
        trace = "".join(traceback.format_exception(exc))
        kind = f"{type(exc).__module__}.{type(exc).__qualname__}".removeprefix("builtins.")
        try:
            pickled = pickle.dumps(exc)
        except Exception:  # whatever it holds; its words are carried in any case
            pickled = b""
        return cls(kind, str(exc), trace, pickled)

    def exception(self) -> Exception:
        """Return an exception to raise here, with the traceback of the job as a note.

        Of the same type, unless that would import a module: the type may be torch's.
        """
        try:
            loaded: object = _Loaded(io.BytesIO(self.pickled)).load()
        except Exception:  # exceptions may be pickled without being fit to be unpickled
            loaded = None
        text = f"{self.kind}: {self.text}" if self.text else self.kind
        exc = loaded if isinstance(loaded, Exception) else AppError(text)
        if self.trace:
            exc.add_note(f"In the batch job:\n{self.trace}")
        return exc


@dataclass(frozen=True)
class Reply:
    """What the job gives back: the reply or the failure, and the context as the app left it."""

    message: Message | None = None
    context: Context | None = None
    failure: Failure | None = None


class _Loaded(pickle.Unpickler):
    """Takes only what is already imported."""

    def find_class(self, module: str, name: str) -> Any:
        if module not in sys.modules:
            raise pickle.UnpicklingError(f"{module} is not loaded")
        return super().find_class(module, name)


def save(path: Path, value: Any) -> None:
    """Write a value so that it is seen whole or not at all; large arrays are not copied."""
    with draft(path) as temporary, open(temporary, "wb") as f:
        pickle.dump(value, f, protocol=5)


def load(path: Path) -> Any:
    """Return what `save` wrote."""
    with open(path, "rb") as f:
        return pickle.load(f)


def take_over(context: Context, left: Context) -> None:
    """Make `context` what the app left, in place: Flower and other mods hold on to it."""
    for mine, theirs in (
        (context.state, left.state),
        (context.node_config, left.node_config),
        (context.run_config, left.run_config),
    ):
        values: Any = dict(theirs)
        mine.clear()
        mine.update(values)


def versions() -> dict[str, str]:
    """Return what has to be the same on both sides."""
    return {"flwr": version("flwr"), "numpy": version("numpy").partition(".")[0]}


def check_versions(theirs: dict[str, str]) -> None:
    """Refuse to unpickle what another version pickled."""
    mine = versions()
    for name, there in theirs.items():
        if mine[name] != there:
            raise UserError(
                f"{name} is {there} at the login node and {mine[name]} in the job: "
                f"{sys.executable} needs the same one. Fix it with: pip install '{name}=={there}'"
            )
