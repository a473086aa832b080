"""How ``exchange.memory_gb`` is shared out: what weights take of the server's memory."""

from __future__ import annotations

from dataclasses import dataclass

from flwr_hpc.errors import UserError

KEY = "exchange.memory_gb"
LEAST_GB = 0.05  # one thread, the smallest blocks, a few dozen sites


@dataclass(frozen=True)
class ServerMemory:
    """Bytes of anonymous memory; an eighth is left for what lies between."""

    total: int

    @classmethod
    def of(cls, gb: float) -> ServerMemory:
        """Read the setting; UserError if that is too little to work with."""
        if not gb >= LEAST_GB:
            raise UserError(
                f"{KEY}={gb:g} is too little: replies are decoded and averaged block by block, and "
                f"blocks of many sites take {LEAST_GB:g} GB at least. With more they are computed "
                f"on more cores. The default is enough for any model: {KEY}=1"
            )
        return cls(int(gb * 1e9))

    @property
    def blocks(self) -> int:
        """For tensors of the next version, computed by the strategy as they are written."""
        return self.total // 2

    @property
    def checks(self) -> int:
        """For replies, decoded and looked at as they come."""
        return self.total // 4

    @property
    def waiting(self) -> int:
        """For small tensors of the next version, until all are there."""
        return self.total // 8
