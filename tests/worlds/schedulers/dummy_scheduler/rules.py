"""What a facility may ask of the dummy."""

from __future__ import annotations

from flwr_hpc.schedulers.rules import Rules

RULES = Rules(
    title="Dummy",
    fields=(),
    instead={"qos": "the dummy serves first who comes first"},
    trial=False,
    refusals={"tired": "walltime=HH:MM:SS, a shorter one"},
)
