"""Which account jobs are charged to: the one that is given, else the user's own."""

from __future__ import annotations

import getpass
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from flwr_hpc.config.facility import AUTO, FacilityConfig
from flwr_hpc.errors import UserError
from flwr_hpc.schedulers.registry import rules_of
from flwr_hpc.schedulers.rules import OwnAccounts

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Account:
    """What jobs are charged to."""

    name: str | None  # None: jobs name none
    source: str = ""  # Empty: given

    def __str__(self) -> str:
        return f"{self.name or 'none'}{f' ({self.source})' if self.source else ''}"


def settle_accounts(facilities: Mapping[str, FacilityConfig]) -> dict[str, Account]:
    """Set every facility's account, and return them with where they are from."""
    accounts = {name: find_account(name, f) for name, f in facilities.items()}
    for name, account in accounts.items():
        facilities[name].account = account.name
    return accounts


def find_account(name: str, f: FacilityConfig, user: str = "") -> Account:
    """Return a facility's account; where none is given, that of the user who runs this.

    Parameters
    ----------
    name : str
        The facility's.
    f : FacilityConfig
    user : str
        Another user than the one who runs this.
    """
    if f.account is None or f.account.lower() == "none":
        return Account(None)
    if f.account != AUTO:
        return Account(f.account)
    if f.local:
        return Account(None)
    own = rules_of(f).own_accounts
    for variable in own.variables:
        if value := os.environ.get(variable):
            return Account(value, f"from {variable}")
    return _only_account(f"facilities.{name}.account", f, own, user or getpass.getuser())


def _only_account(key: str, f: FacilityConfig, own: OwnAccounts, user: str) -> Account:
    """Return the only account of a user that the batch system knows."""
    unset = f"{' and '.join(own.variables)} not set" if own.variables else "it cannot be looked up"
    if not own.command:
        raise _not_given(key, unset)
    program = own.command[0]
    code, text = _ask([part.format(user=user) for part in own.command], f)
    if code and re.search(own.without, text):
        return Account(None, f"the cluster keeps none, says {program}")
    if code:
        last = (text.strip().splitlines() or [f"exit code {code}"])[-1]
        raise _not_given(key, f"{unset}, and {program} does not tell: {last}")
    names = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if len(names) > 1:
        raise UserError(
            f"{key}: you have several accounts: {', '.join(names)}. "
            f"Add to the command: {key}={names[0]}, or another of them"
        )
    if not names:
        return Account(None, f"{program} shows none of yours")
    return Account(names[0], f"your only one, says {program}")


def _ask(command: list[str], f: FacilityConfig) -> tuple[int, str]:
    """Return a command's exit code, and what it printed or why it failed."""
    env = rules_of(f).environment(f, os.environ)
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=TIMEOUT_S, check=False, env=env,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 1, f"no answer in {TIMEOUT_S:.0f} s"
    except OSError:
        return 1, "not found on this host"
    return done.returncode, done.stdout if done.returncode == 0 else done.stderr + done.stdout


def _not_given(key: str, why: str) -> UserError:
    return UserError(
        f"{key} must be given: {why}. Add to the command: {key}=NAME, or {key}=null where the "
        "cluster keeps none"
    )
