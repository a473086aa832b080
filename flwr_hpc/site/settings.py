"""A site's settings: one file, checked where the driver writes it and where the ClientApp reads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.config.schema import AllocationConfig, ExchangeConfig, LimitsConfig, decode
from flwr_hpc.errors import UserError
from flwr_hpc.files import publish, read_json
from flwr_hpc.worker.settings import WorkerSettings

NODE_CONFIG = "site"  # the key of the file's name in the SuperNode's node config


@dataclass
class SiteSettings:
    """What a launcher works with."""

    run_key: str
    name: str  # The facility's
    root: str  # The site's folder on the facility's shared file system
    store: str  # URL
    credential: str | None  # The file that lets the site into its server's store
    exchange: ExchangeConfig
    facility: FacilityConfig
    allocation: AllocationConfig
    limits: LimitsConfig
    worker: WorkerSettings

    def write(self, path: Path) -> None:
        """Publish the settings; a UserError names what could not be read again."""
        text = json.dumps(asdict(self), indent=1)
        decode(SiteSettings, json.loads(text), str(path))
        publish(path, text)

    @classmethod
    def read(cls, path: Path) -> SiteSettings:
        """Read what `write` wrote; a UserError says what is wrong with the file."""
        try:
            raw = read_json(path)
        except (OSError, ValueError) as exc:
            raise UserError(f"the site file cannot be read: {exc}") from None
        if raw is None:
            raise UserError(f"there is no site file {path}")
        return decode(cls, raw, str(path))


def to_node_config(path: Path) -> str:
    """Return the SuperNode's ``--node-config`` for a site file.

    Percent-encoded, since Flower's node config takes no quotation marks.
    """
    return f'{NODE_CONFIG}="{quote(str(path))}"'


def from_node_config(value: object) -> SiteSettings:
    """Read the settings that a SuperNode's node config names."""
    if not value:
        raise UserError(
            "the SuperNode was started without a site file. "
            f"Start it with: flower-supernode --node-config '{NODE_CONFIG}=\"FILE\"'"
        )
    return SiteSettings.read(Path(unquote(str(value))))
