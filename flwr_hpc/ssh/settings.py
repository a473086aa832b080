"""What is sent to the host of a site that is started over SSH: what belongs to that centre."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from operator import attrgetter
from typing import Any

from omegaconf import OmegaConf

from flwr_hpc.config.invitation import run_settings
from flwr_hpc.config.overrides import quoted
from flwr_hpc.config.schema import AllocationConfig, Config, LimitsConfig

FACILITY = "of_the_run"  # As a choice of ``+facility=``; no shipped one has this name
# Within the folder there:
INVITATION, CONF, SITE = "invitation.json", "conf", "site"


def facility_file(config: Config, name: str) -> str:
    """Return the facility as a file of configuration, for the site's own command."""
    own = replace(config.facilities[name], ssh=None, ssh_python=None, ssh_install=False, join=[])
    return f"# @package facilities.{name}\n{OmegaConf.to_yaml(OmegaConf.structured(own))}"


def join_words(config: Config, name: str, folder: str) -> list[str]:
    """Return what follows ``python -m flwr_hpc.join`` there; the facility's own words come last."""
    words = [f"{folder}/{INVITATION}", "--config-dir", f"{folder}/{CONF}", f"+facility={FACILITY}"]
    words.append(f"site.dir={quoted(f'{folder}/{SITE}')}")
    for key in ("paths", "held_out_paths"):
        if paths := getattr(config.data, key).get(name):
            words.append(f"data.{key}=[{','.join(map(quoted, paths))}]")
    words += _changed("allocation", config.allocation, AllocationConfig())
    words += _changed("site.limits", config.site.limits, LimitsConfig())
    if config.federation.shared_host:
        words.append("federation.shared_host=true")
    own = config.facilities[name].join
    return [*words, *_places(config, own), *own]


def _changed(group: str, config: Any, default: Any) -> list[str]:
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return [
        f"{group}.{key}={_value(value)}"
        for key, value in values.items()
        if value != getattr(default, key)
    ]


def _value(value: object) -> str:
    if value is None:
        return "null"
    return quoted(value) if isinstance(value, str) else str(value).lower()


def _places(config: Config, own: Sequence[str]) -> list[str]:
    """Name what the run reads on this machine, to be looked for at the same place there."""
    given = {word.partition("=")[0] for word in own}
    missing = [place for place in run_settings(config)[1] if place not in given]
    return [f"{place}={quoted(attrgetter(place)(config))}" for place in missing]
