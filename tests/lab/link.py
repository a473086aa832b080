"""A host's line to the wide-area network, changed while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .machine import ask

SIDES = ("out", "in")


@dataclass(frozen=True)
class Traffic:
    """What went along a line since it was made."""

    out_bytes: int  # from the host
    in_bytes: int
    lost_packets: int


class Link:
    """A line whose rate, delay and loss hold in each direction, and which can be cut.

    Parameters
    ----------
    control : Path
        Socket of the process that carries the packets (wan.py).
    host : str
        Whose line it is.
    """

    def __init__(self, control: Path, host: str) -> None:
        self._control, self._host = control, host

    def set(
        self, *, rate_mbit: float | None = None, rtt_ms: float = 0.0, loss: float = 0.0
    ) -> None:
        """Make the line so; what is not given is as good as it can be.

        Parameters
        ----------
        rate_mbit : float, optional
            Megabits per second in each direction.
        rtt_ms : float
            What the line adds to a round trip; half of it in each direction.
        loss : float
            Probability that a packet is lost, in each direction.
        """
        values = {"rate_mbit": rate_mbit, "delay_s": rtt_ms / 2000, "loss": loss}
        self._ask(dict.fromkeys(SIDES, values))

    def down(self) -> None:
        """Let packets vanish in both directions; neither end is told."""
        self._ask({side: {"open": False} for side in SIDES})

    def half_open(self, lost: Literal["out", "in"] = "in") -> None:
        """Let packets vanish in one direction only: from the host (`out`) or to it (`in`)."""
        self._ask({side: {"open": side != lost} for side in SIDES})

    def up(self) -> None:
        """Carry packets in both directions again, as badly as was last set."""
        self._ask({side: {"open": True} for side in SIDES})

    def traffic(self) -> Traffic:
        """Return what the line has carried and lost."""
        sides = self._ask({})
        lost = sum(sides[side]["lost_packets"] for side in SIDES)
        return Traffic(sides["out"]["carried_bytes"], sides["in"]["carried_bytes"], lost)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        request = {"host": self._host, **request}
        return ask(self._control, request, "the wide-area network")
