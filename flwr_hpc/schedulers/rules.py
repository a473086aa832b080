"""What a batch system's folder says besides its commands: fields, checks, its words for people.

Light, since every command reads it before anything starts: no submitit here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.errors import UserError

# Fields of a facility that say something to one batch system or another, not to all.
NATIVE = (*("qos", "constraint", "reservation", "gpu_request", "gpu_type", "chunk", "mpi"),)


@dataclass(frozen=True)
class Accounting:
    """How to see whether ended jobs are remembered."""

    command: tuple[str, ...]  # Fails where they are not, unless `none` is what it says then
    without: str  # What follows
    none: str = ""


@dataclass(frozen=True)
class OwnAccounts:
    """How to find the account of a user who gives none."""

    variables: tuple[str, ...] = ()  # Of the environment; the first that is set counts
    # Prints the accounts of ``{user}``, one a line.
    command: tuple[str, ...] = ()
    without: str = "(?!)"  # A pattern in what it says when it fails where no accounts are kept


@dataclass(frozen=True)
class Rules:
    """What a facility may ask of a batch system, and what to tell people about it."""

    title: str  # As people call it
    fields: tuple[str, ...] = NATIVE  # Those of `NATIVE` that may be set
    # What does the same as a field that may not be; ``{key}`` is the facility's, ``{value}`` its
    instead: Mapping[str, str] = field(default_factory=dict)
    # Checks a facility; its first argument is the facility's key, e.g. ``facilities.leonardo``.
    check: Callable[[str, FacilityConfig], None] = lambda key, f: None
    # Of its commands, from the facility and this process's environment.
    environment: Callable[[FacilityConfig, Mapping[str, str]], dict[str, str]] = lambda f, env: {
        **env
    }
    advice: str = "account, partition, walltime and sizes"  # Where to look after a refusal
    programs: tuple[str, ...] = ()  # Needed on a login node
    trial: bool = True  # It can judge a job without taking it
    # A pattern in what it says of a job that it refuses or keeps waiting (lower case), and the
    # field to set: the first that fits.
    refusals: Mapping[str, str] = field(default_factory=dict)
    accounting: Accounting | None = None
    own_accounts: OwnAccounts = field(default_factory=OwnAccounts)
    other_cluster: str = ""  # A setting of the facility that chooses one of several on a host


def check_fields(key: str, f: FacilityConfig, rules: Rules) -> None:
    """Refuse what the facility's batch system would never be told."""
    default = FacilityConfig()
    for name in NATIVE:
        value = getattr(f, name)
        if name not in rules.fields and value != getattr(default, name):
            instead = rules.instead.get(name, "").format(key=key, value=value)
            raise UserError(
                f"{key}.{name}={value} has no meaning with scheduler={f.scheduler}. Leave it out"
                f"{': ' if instead else ''}{instead}"
            )
