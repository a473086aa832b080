"""Codecs and stores are found by being there: one file in their folder, or any import path."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from flwr_hpc.errors import UserError, closest


def names(folder: ModuleType) -> list[str]:
    """Return what a folder offers: its modules, without importing them."""
    return sorted(module.name for module in pkgutil.iter_modules(folder.__path__))


def find(key: str, name: str, folder: ModuleType, base: type) -> Any:
    """Return the subclass of `base` that a configuration names.

    Parameters
    ----------
    key : str
        Of the configuration, for the error.
    name : str
        Of a module in `folder` that defines one such class, or ``package.module.Class`` of
        anything that can be imported, on the server and at every site.
    folder : module
    base : type
    """
    known = names(folder)
    if name in known:
        module = importlib.import_module(f"{folder.__name__}.{name}")
        mine = [c for c in vars(module).values() if _made_here(c, module) and issubclass(c, base)]
        assert len(mine) == 1, f"{module.__file__} must define one {base.__name__}, found {mine}"
        return mine[0]
    path, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(path), attribute) if path else None
    except (ImportError, AttributeError) as exc:
        raise UserError(f"{key}={name} cannot be imported: {exc}") from None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(
            f"{key}={name}: there is no such {base.__name__.lower()}.{closest(name, known)} "
            f"Valid: {', '.join(known)}, or package.module.Class of your own."
        )
    return found


def _made_here(value: object, module: ModuleType) -> bool:
    return isinstance(value, type) and value.__module__ == module.__name__
