"""From the command line to a checked configuration, with Hydra."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from flwr_hpc.config.folder import conf_dir
from flwr_hpc.config.overrides import prepared, quoted, read
from flwr_hpc.config.schema import Config, parse
from flwr_hpc.errors import UserError, closest

DEFAULT_FACILITIES = "+facility=[local_a,local_b]"
# What a run's checkpoints cannot follow, and why.
FIXED = {
    "model": "its checkpoint holds the weights of this model",
    "data.tokenizer": "the weights were trained on its vocabulary",
    "train.plan": "the plan was made when it began; train.micro_batch and the like can change",
    "seed": "the order of the data is drawn from it",
    "strategy._target_": "its checkpoint holds the state of this strategy",
    "run_dir": "a run stays in its folder",
    "serve.address": "its invitations name this address",
    "serve.sites": "further sites are invited with: python -m flwr_hpc.serve invite NAME RUN_DIR",
}
FREE = (
    "What can change: rounds, train.*, data.* but the tokenizer, the strategy's arguments, fields "
    "of the run's own facilities, allocation.*, federation.*, exchange.*, tracking.*. "
    "For anything else start a new run"
)


def compose_config(
    overrides: Sequence[str], config_dir: str | None = None, *, serve: bool = False
) -> Config:
    """Compose `conf/` with overrides; no facility named means two local ones.

    Parameters
    ----------
    overrides : sequence of str
        As on the command line, e.g. ``["rounds=4", "+facility=leonardo"]``.
    config_dir : str or None
        Folder with further configuration, e.g. ``facility/mycluster.yaml``.
    serve : bool
        For a server without facilities of its own.
    """
    config = composed(overrides, config_dir)
    if not config.facilities and not serve:
        config = composed([*overrides, DEFAULT_FACILITIES], config_dir)
    return parse(config)


def composed(
    overrides: Sequence[str],
    config_dir: str | None,
    primary: str = "config",
    schema: type = Config,
) -> DictConfig:
    """Compose one of the primary files of `conf/`, whose first default is ``PRIMARY_schema``."""
    overrides = prepared(overrides)
    if config_dir is not None:
        place = quoted(f"file://{_folder(config_dir)}")
        overrides.append(f"hydra.searchpath=[{place}]")
    return _compose(overrides, primary, schema)


def resume_config(saved: Path, overrides: Sequence[str]) -> Config:
    """Return a run's saved configuration with plain ``key=value`` changes."""
    config = _load(saved)
    fixed = _fixed(config)
    for override in overrides:
        parsed = read(override)
        key = parsed.key_or_group
        if key == "facility":
            names = ", ".join(fixed["facilities"])
            raise UserError(f"'{override}': a resumed run keeps its facilities ({names}). {FREE}")
        if parsed.type is OverrideType.DEL or (conf_dir() / key).is_dir():
            raise UserError(
                f"'{override}' cannot change a run that is resumed: only single values can, "
                f"e.g. rounds=20. {FREE}"
            )
        try:
            OmegaConf.update(config, key, parsed.value(), force_add=True)
        except OmegaConfBaseException as exc:
            raise UserError(f"'{override}': {str(exc).splitlines()[0]}") from None
        if changed := [k for k, v in _fixed(config).items() if v != fixed[k]]:
            why = FIXED.get(changed[0], f"it began with {', '.join(fixed['facilities'])}")
            raise UserError(f"'{override}' cannot change a run that is resumed: {why}. {FREE}")
    try:
        return parse(config)
    except UserError as exc:
        raise UserError(str(exc) if overrides else f"{saved}: {exc}") from None


def shown(config: Config) -> str:
    """Return the configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _fixed(config: DictConfig) -> dict[str, Any]:
    fixed = {}
    for key in FIXED:
        value = OmegaConf.select(config, key)
        fixed[key] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return fixed | {"facilities": list(config.get("facilities") or {})}


def _load(path: Path) -> DictConfig:
    try:
        config = OmegaConf.load(path)
    except YAMLError as exc:
        raise UserError(_explain_yaml(exc)) from None
    except (OSError, ValueError) as exc:  # also of text that is not UTF-8, or no mapping
        raise UserError(f"{path} cannot be read: {exc}") from None
    if not isinstance(config, DictConfig) or not config:
        raise UserError(f"{path} is damaged: it holds no settings")
    return config


def _folder(path: str) -> Path:
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"--config-dir {path}: there is no such folder")
    return folder


def _compose(overrides: list[str], primary: str, schema: type) -> DictConfig:
    ConfigStore.instance().store(name=f"{primary}_schema", node=schema)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            return compose(primary, overrides=overrides)
        except YAMLError as exc:
            raise UserError(_explain_yaml(exc)) from None
        except UnicodeDecodeError as exc:
            raise UserError(f"a file in --config-dir is not UTF-8 text: {exc}") from None
        except (HydraException, OmegaConfBaseException) as exc:
            raise UserError(_explain(exc, schema)) from None


def _explain(exc: Exception, schema: type) -> str:
    """Say in our words what Hydra could not do."""
    text = str(exc)
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match[1], schema)
    if match := re.search(r"Could not (?:find|load) '([^']+)'", text):
        group, _, name = match[1].rpartition("/")
        if group and (conf_dir() / group).is_dir():
            return _unknown_choice(group, name, text)
        return f"there is no configuration '{match[1]}'. Groups: {', '.join(_groups())}."
    if "Key 'facility' not in 'Config'" in text:
        return "a facility file must begin with the line: # @package facilities.NAME"
    if match := re.search(r"In '([^']+)'.*\n(.*)", text):
        return f"{match[1]}: {match[2].strip()}"
    if match := re.search(r"Error merging override (\S+)", text):
        cause = str(exc.__cause__ or exc).splitlines()[0]
        return f"{match[1]}: {cause}"
    return text.strip()


def _explain_yaml(exc: YAMLError) -> str:
    mark = getattr(exc, "problem_mark", None)
    what = getattr(exc, "problem", None) or str(exc)
    where = f"{mark.name}, line {mark.line + 1}" if mark else "a configuration file"
    return f"{where}: not valid YAML: {what}"


def _unknown_key(key: str, schema: type) -> str:
    *path, last = key.split(".")
    for depth, part in enumerate(path):  # a parent may be the one that is not there
        if (known := _fields(schema, path[:depth])) and part not in known:
            path, last = path[:depth], part
            break
    names = _fields(schema, path)
    where = f"'{'.'.join(path)}'" if path else "the configuration"
    if not names:
        return f"{where} has no key '{last}'. To add one: +{key}=VALUE"
    if last in names and path[0] == "facilities":
        return f"{key}: the command names no facility '{path[1]}'. Add to it: +facility={path[1]}"
    hint = closest(last, names) or ""
    if key == "facility":
        hint = " Facilities are added with a plus: +facility=NAME."
    return f"{where} has no key '{last}'.{hint} Valid keys: {', '.join(names)}."


def _fields(schema: object, path: Sequence[str]) -> list[str]:
    """Return the names of what a key of the schema holds; the keys of a mapping can be any."""
    for part in path:
        if get_origin(schema) is dict:
            schema = get_args(schema)[1]
        elif isinstance(schema, type) and is_dataclass(schema):
            schema = get_type_hints(schema).get(part)
    if isinstance(schema, type) and is_dataclass(schema):
        return [f.name for f in fields(schema)]
    return []


def _unknown_choice(group: str, name: str, text: str) -> str:
    listed = re.findall(r"^\t([^\s=]+)\s*$", text, flags=re.MULTILINE)
    names = listed or sorted(p.stem for p in (conf_dir() / group).glob("*.yaml"))
    plus = "+" if group == "facility" else ""
    example = f" Example: {plus}{group}={names[0]}" if names else ""
    return (
        f"there is no {group} '{name}'.{closest(name, names)} Known: {', '.join(names)}.{example}"
    )


def _groups() -> list[str]:
    return sorted(p.name for p in conf_dir().iterdir() if p.is_dir())
