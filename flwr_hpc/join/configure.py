"""What a site runs with: its centre's own settings, and the run's, which came with the invitation.

The two never mix: a key belongs to one of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from flwr_hpc.config.compose import composed
from flwr_hpc.config.invitation import DATA_KEYS, Invitation
from flwr_hpc.config.overrides import read
from flwr_hpc.config.schema import Config, parse
from flwr_hpc.errors import UserError

# Of the run's keys, those that depend on a centre's files and hardware.
OWN = (
    *("data.kind", "data.text_key", "data.prompt_key", "data.completion_key"),
    *("data.messages_key", "data.chat_template", "data.passages"),
    *("data.tokenizer", "model.path", "train.micro_batch", "train.accumulation"),
    *("train.precision", "train.activation_checkpointing", "train.replicate", "train.tensor"),
    *("train.tf32", "train.compile", "train.cpu_offload"),
)
OURS = re.compile(
    r"facility|facilities\..+|allocation(\..+)?|site\..+|dry_run|data|federation\.shared_host"
    r"|data\.(held_out_)?paths|" + "|".join(map(re.escape, OWN))
)
PATHS = re.compile(r"data\.((?:held_out_)?paths)=")


def site_config(
    invitation: Invitation, overrides: Sequence[str], config_dir: str | None = None
) -> Config:
    """Compose a site's configuration; its one facility has the name that it was invited by."""
    keys = [_own_key(o) for o in overrides]
    named = [PATHS.sub(rf"data.\1.{invitation.site}=", o) for o in overrides]
    own = composed(named, config_dir)
    facility = _only_facility(own, invitation.site)
    OmegaConf.set_struct(own, False)
    own.model.config = {}  # the run's model may be of another kind
    merged = OmegaConf.merge(own, invitation.run)
    assert isinstance(merged, DictConfig)
    merged.facilities = {invitation.site: facility}
    chosen = {"data.kind"} & ({"data.kind"} if "data" in keys else set()) | {*keys} & {*OWN}
    for key in chosen:
        OmegaConf.update(merged, key, OmegaConf.select(own, key))
    if lacking := [key for key in invitation.missing if key not in chosen]:
        raise UserError(
            f"{lacking[0]} lies on the server's machine; name the same one here. Add: "
            f"{lacking[0]}=/path/to/it"
        )
    return parse(merged)


def run_part(invitation: Invitation) -> dict[str, object]:
    """Return what came with the run, to be shown."""
    who = {"server": invitation.address, "sites": invitation.sites}
    return {**who, "strategy": invitation.strategy, **invitation.run}


def _own_key(override: str) -> str:
    """Return the key of an override; refuse one that is the run's."""
    key = read(override).key_or_group
    if not OURS.fullmatch(key):
        group = key.partition(".")[0]
        raise UserError(
            f"'{override}' belongs to the run and came with the invitation. A site sets: "
            f"+facility=NAME, facilities.NAME.*, data.paths, {', '.join(OWN)}, allocation.*, "
            f"site.limits.*, site.dir, dry_run"
            + (f". Of data the run's are: {', '.join(DATA_KEYS)}" if group == "data" else "")
        )
    return key


def _only_facility(own: DictConfig, site: str) -> DictConfig:
    names = list(own.facilities)
    if len(names) != 1:
        found = ", ".join(names) or "none"
        raise UserError(
            f"site '{site}' is one facility, found: {found}. Name yours: +facility=NAME"
        )
    facility: DictConfig = own.facilities[names[0]]
    return facility
