"""What the batch mod's worker of an allocation loads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from flwr_hpc.batch_mod.app import AppRef
from flwr_hpc.config.schema import decode
from flwr_hpc.spool import AllocationDir


@dataclass
class JobSettings:
    """An allocation's ``settings.json``."""

    app_folder: str  # See `AppRef`
    app_name: str
    versions: dict[str, str]  # Of the login node, see `flwr_hpc.batch_mod.carry.versions`
    idle_timeout_s: float

    @classmethod
    def read(cls, allocation: AllocationDir) -> JobSettings:
        """Read an allocation's settings; a UserError names what is wrong with them."""
        return decode(cls, allocation.settings(), str(allocation.settings_file))

    @property
    def app(self) -> AppRef:
        return AppRef(self.app_folder, self.app_name)

    def to_dict(self) -> dict[str, Any]:
        """Return them as JSON."""
        return asdict(self)
