"""The engine's settings as keys of the configuration."""

from __future__ import annotations

from dataclasses import fields

import pytest

from flwr_hpc.config.compose import compose_config
from flwr_hpc.config.schema import FederationConfig
from flwr_hpc.errors import UserError
from flwr_hpc.server.server_app import engine_settings
from strategies.engine.runtime import Settings


@pytest.mark.parametrize("name", [f.name for f in fields(Settings)])
def test_every_setting_of_the_engine_can_be_set(name: str) -> None:
    """Protects users from settings that no key reaches, and from keys without an effect."""
    default = getattr(FederationConfig(), name)
    value = not default if isinstance(default, bool) else 0.25 if "quantile" in name else 17
    text = str(value).lower()
    config = compose_config([f"federation.{name}={text}"])
    assert getattr(engine_settings(config), name) == value


def test_sites_on_other_hosts_may_be_away_for_a_day() -> None:
    """Protects runs across centres from a night without a line."""
    across = ["serve.address=vm:8443", "serve.sites=[lumi]"]
    assert engine_settings(compose_config([])).offline_grace_s == 600
    assert engine_settings(compose_config(across)).offline_grace_s == 86400
    given = compose_config([*across, "federation.offline_grace_s=60"])
    assert engine_settings(given).offline_grace_s == 60


@pytest.mark.parametrize("key", ["poll_s", "min_sites", "ttl_s", "round_deadline_s"])
def test_what_would_never_end_is_refused(key: str) -> None:
    """Protects from a loop without pauses, or messages that are dead on arrival."""
    with pytest.raises(UserError, match=f"federation.{key}"):
        compose_config([f"federation.{key}=0"])
