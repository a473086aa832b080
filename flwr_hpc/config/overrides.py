"""Settings as they are typed, read by Hydra's grammar; plain paths need no quotes for it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from flwr_hpc.errors import UserError

# Mappings that take any key; Hydra would ask for a '+' before each.
OPEN = re.compile(
    r"(data\.(held_out_)?paths|model\.(config|lora)|strategy"
    r"|facilities\.\w+\.(env|options))\.\w"
)
PATH = re.compile(
    r"run_dir|ssh_config|(site|sweep)\.dir|model\.path|data\.(tokenizer|passages)|exchange\.store"
    r"|facilities\.\w+\.(workdir|python|ssh_python|container)"
)
PATHS = re.compile(r"data\.(held_out_)?paths\.\w+")
TARGET = re.compile(r"\+*strategy\._target_=")
STRATEGY = re.compile(r"\+*strategy=")


def split_resume(overrides: Sequence[str]) -> tuple[str, list[str]]:
    """Return the run directory that ``resume=`` names, empty if none, and the other overrides."""
    named = [o.partition("=")[2] for o in overrides if o.startswith("resume=")]
    folder = named[-1] if named and named[-1] != "null" else ""
    return folder, [o for o in overrides if not o.startswith("resume=")]


def prepared(overrides: Sequence[str]) -> list[str]:
    """Return the overrides as Hydra wants them.

    Paths are quoted, a single data path becomes a list, keys of open mappings are added, and a
    ``strategy._target_`` without a ``strategy=`` is not given the default strategy's arguments.
    """
    ready = [_with_paths(o) for o in overrides]
    for override in ready:
        read(override)
    ready = [f"++{o}" if OPEN.match(o) else o for o in ready]
    if any(map(TARGET.match, ready)) and not any(map(STRATEGY.match, ready)):
        ready.insert(0, "strategy=custom")
    return ready


def read(override: str) -> Override:
    """Parse one override."""
    override = _with_paths(override)
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        parsed = None
    if parsed is None or parsed.is_sweep_override():
        if "=" not in override.lstrip("~"):
            raise UserError(f"'{override}' is not a setting. Settings are KEY=VALUE, e.g. rounds=4")
        key = override.partition("=")[0]
        if parsed is not None:
            raise UserError(
                f"'{override}' names several values. To run each of them: python -m flwr_hpc.run "
                f"-m '{override}'. A list is '{key}=[A,B]', and text with commas '{key}=\"TEXT\"'"
            )
        raise UserError(
            f"'{override}': the value cannot be read. Close every bracket and quote; quote lists "
            f"for the shell: '{key}=[A,B]', and text with commas or brackets for Hydra as well: "
            f"'{key}=\"TEXT\"'"
        )
    return parsed


def quoted(text: str) -> str:
    """Quote any text for Hydra's grammar; backslashes count only before a quote."""
    escaped = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ('\\"' if m[2] else ""), text)
    return f'"{escaped}"'


def _with_paths(override: str) -> str:
    key, _, value = override.partition("=")
    name = key.lstrip("+")
    if value in ("", "null"):
        return override
    if PATH.fullmatch(name):
        return f"{key}={_path(value)}"
    if PATHS.fullmatch(name):
        return f"{key}={_paths(value)}"
    return override


def _path(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        return value
    home = value.startswith("~/")  # shells expand it at the start of a word alone
    return quoted(str(Path(value).expanduser()) if home else value)


def _paths(value: str) -> str:
    if not (value.startswith("[") and value.endswith("]")):
        return f"[{_path(value)}]"
    try:
        OverridesParser.create().parse_override(f"x={value}")
    except HydraException:
        return f"[{','.join(_path(v.strip()) for v in value[1:-1].split(','))}]"
    return value
