"""What a server gives to a site that is to join it: one file, for one person's eyes.

It holds how to reach the server and to know it again, what shows who the site is, and the run's
settings. Paths, accounts and whatever else belongs to one centre never travel, in neither way.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from flwr_hpc import __version__
from flwr_hpc.config.schema import Config, decode
from flwr_hpc.errors import UserError
from flwr_hpc.files import publish, read_json
from flwr_hpc.protocol import PROTOCOL

FORMAT = 1
RUN_KEYS = ("rounds", "seed", "model", "train", "exchange")
DATA_KEYS = (
    *("kind", "tokenizer", "seq_len", "held_out_fraction", "held_out_sequences"),
    *("objective", "target_len", "document_mask"),
    *("text_key", "prompt_key", "completion_key", "messages_key", "chat_template", "passages"),
)
# A folder or file of the server's is none of a site's.
PLACES = ("model.path", "data.tokenizer", "data.chat_template", "data.passages")
NAMES = {"flwr_hpc": "flwr-hpc", "flwr": "flwr", "protocol": "the protocol"}


@dataclass
class Invitation:
    """One site's."""

    format: int
    site: str
    address: str  # HOST:PORT of the server
    certificate: str  # PEM; to be trusted, and no other
    token: str  # For the exchange
    private_key: str  # Of the site's SuperNode
    run_key: str
    sites: list[str]  # All that were invited by then
    versions: dict[str, str]  # The server's, see `versions`
    run: dict[str, Any]  # Settings of the run, as in its configuration
    missing: list[str] = field(default_factory=list)  # Settings that each site gives for itself
    # What the server does with updates: shown to the site's people, and nothing else there.
    strategy: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Publish the file, mode 0600."""
        publish(path, json.dumps(asdict(self), indent=1))


def read_invitation(path: Path) -> Invitation:
    """Read an invitation that nobody else can read."""
    try:
        mode = path.stat().st_mode & 0o077
        raw = read_json(path) or {}
    except (OSError, ValueError) as exc:
        raise UserError(f"the invitation {path} cannot be read: {exc}") from None
    if mode:
        raise UserError(f"others can read the invitation {path}. Fix it with: chmod 600 {path}")
    if raw.get("format", FORMAT) != FORMAT:
        raise UserError(
            f"{path} is of another version of flwr-hpc. "
            f"{_install(raw.get('versions', {}), {'flwr_hpc'})}"
        )
    return decode(Invitation, raw, str(path))


def versions() -> dict[str, str]:
    """Return what has to fit between server and site, and what is recorded beside it."""
    found = {"flwr_hpc": __version__, "protocol": str(PROTOCOL), "python": sys.version.split()[0]}
    for package in ("flwr", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def check_versions(server: dict[str, str], here: dict[str, str] | None = None) -> None:
    """Refuse a flwr-hpc, protocol or Flower that does not fit; Python and torch may differ."""
    here = versions() if here is None else here
    differ = {key for key in ("flwr_hpc", "protocol") if here.get(key) != server.get(key)}
    if _minor(here.get("flwr", "")) != _minor(server.get("flwr", "")):
        differ.add("flwr")
    if not differ:
        return
    pairs = (
        f"{name} {here.get(key, 'is missing')} (the server has {server.get(key)})"
        for key, name in NAMES.items()
    )
    raise UserError(
        f"this site does not fit the server: {', '.join(pairs)}. {_install(server, differ)}"
    )


def run_settings(config: Config) -> tuple[dict[str, Any], list[str]]:
    """Return what of a run's settings goes to its sites, and which they have to give themselves."""
    whole: Any = OmegaConf.to_container(OmegaConf.structured(config))
    run = {key: whole[key] for key in RUN_KEYS}
    for own in ("memory_gb", "quota_gb"):  # the server's
        del run["exchange"][own]
    run["data"] = {key: whole["data"][key] for key in DATA_KEYS}
    missing = []
    for place in PLACES:
        group, key = place.split(".")
        if run[group][key] and Path(run[group][key]).expanduser().exists():
            run[group][key] = "byte" if key == "tokenizer" else None
            missing.append(place)
    return run, missing


def wheel_name(version: str) -> str:
    """Return the file name of a version's wheel."""
    return f"flwr_hpc-{version}-py3-none-any.whl"


def _install(server: dict[str, str], differ: set[str]) -> str:
    """Return what to type; the server's wheel lies beside its invitations."""
    pip, words, ask = f"{shlex.quote(sys.executable)} -m pip install", [], ""
    if differ & {"flwr_hpc", "protocol"}:
        wheel = wheel_name(server.get("flwr_hpc", "VERSION"))
        anew = "" if "flwr_hpc" in differ else "--force-reinstall --no-deps "  # of the same number
        words.append(f"{pip} {anew}{wheel}")
        ask = f"{wheel} lies beside the invitation at the server: ask who sent it for both. "
    if "flwr" in differ:
        words.append(f"{pip} 'flwr=={server.get('flwr')}'")
    return f"{ask}Fix it with: {' && '.join(words)}"


def _minor(text: str) -> list[str]:
    return text.split(".")[:2]
