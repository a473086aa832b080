"""What can go wrong is found before anything starts. Imports no torch."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvgM, FedYogi, Strategy

from flwr_hpc.config.facility import FacilityConfig
from flwr_hpc.config.schema import Config, LoraConfig
from flwr_hpc.data import sources
from flwr_hpc.data.encoding import read_chat_template
from flwr_hpc.data.passages import read_passages
from flwr_hpc.errors import UserError
from flwr_hpc.exchange.codec import make_codec, make_downlink
from flwr_hpc.exchange.store import make_store
from flwr_hpc.files import existing, read_json
from flwr_hpc.gate import peers
from flwr_hpc.plan.ranking import shape_of
from flwr_hpc.plan.shape import adapter_parameters
from flwr_hpc.schedulers.interpreter import check_interpreter
from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.server.strategy_factory import build_strategy
from flwr_hpc.spool import disk_use
from strategies import HpcStrategy

JOB_PACKAGES = ("submitit", "flwr")
TRAIN_PACKAGES = ("torch", "transformers", "peft", "datasets")
MIN_NODES = ("min_available_nodes", "min_train_nodes", "min_evaluate_nodes")
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def check(config: Config) -> None:
    """Check strategy, packages, models and data as far as they can be seen from here."""
    peers.check(config.federation.shared_host)
    sites = len({*config.facilities, *config.serve.sites})
    strategy = build_strategy(config.strategy)
    _check_nodes(strategy, sites)
    if getattr(strategy, "needs_plain_adapters", False):
        _check_plain_adapters(config.model.lora)
    if config.tracking.wandb and find_spec("wandb") is None:
        raise UserError(
            "tracking=wandb needs the package wandb. Fix it with: pip install 'flwr-hpc[wandb]'"
        )
    make_downlink(config.exchange.downlink, make_codec(config.exchange.codec))
    check_store(config)
    check_facilities(config, list(config.facilities))


def check_store(config: Config) -> None:
    """Check that weights can travel through the store that was asked for."""
    if config.exchange.store:
        make_store(config.exchange.store).check()


@dataclass(frozen=True)
class Room:
    """What a run takes of one file system of this host, in bytes."""

    folders: dict[str, Path]  # By the setting that moves them
    least: int  # Without this nothing can be trained
    most: int


def check_space(
    config: Config,
    folder: Path,
    free: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
    *,
    joins: bool = False,
) -> list[str]:
    """Return what to warn of; refuse a run that certainly does not fit, before its first job.

    Parameters
    ----------
    config : Config
    folder : Path
        The run's; of a site that `joins` somebody's run, the site's.
    free : callable
        Returns the free bytes of a folder's file system.
    joins : bool
    """
    warnings = []
    for room in _rooms(config, folder, joins):
        place, left = ", ".join(map(str, room.folders.values())), free(_existing(room))
        settings = " or ".join(f"{key}=/other/path" for key in room.folders)
        fix = f"Make room there, or name another place: {settings}"
        needs = f"{place}: {gb(left)} free; a run of this model keeps up to {gb(room.most)} there"
        if left < room.least:
            raise UserError(
                f"{needs}, and cannot begin with less than {gb(room.least)}. {fix}. A site without "
                "checkpoints takes less: train.checkpoint_every_orders=0 (what a lost job has not "
                "sent is trained again then, with a fresh optimizer)"
            )
        if left < room.most:
            warnings.append(f"warning: {needs}. {fix}")
    return warnings


def trained_parameters(config: Config) -> int | None:
    """Return how many parameters travel and are trained; None where that is not known here."""
    if config.model.lora.r:
        return None
    try:
        return shape_of(config).parameters
    except UserError:  # the trainer may know it, the planner does not
        return None


def sent_parameters(config: Config) -> int | None:
    """Return how many parameters travel, of an adapter or all; None where that is not known."""
    lora = config.model.lora
    if not lora.r:
        return trained_parameters(config)
    if lora.target_modules != LoraConfig.target_modules:
        return None
    with suppress(UserError):  # the trainer may know the model, the planner does not
        return adapter_parameters(replace(shape_of(config), adapter_rank=lora.r), lora)
    return None


def site_disk_of(config: Config, parameters: int) -> disk_use.SiteDisk:
    """Return what a site of a run keeps at most."""
    lossy = config.exchange.feedback > 0 and make_codec(config.exchange.codec).tolerance > 0
    checkpoints = config.train.checkpoint_every_orders > 0
    return disk_use.site_disk(parameters, checkpoints=checkpoints, feedback=lossy)


def server_disk_of(config: Config, parameters: int) -> int:
    """Return what the run directory keeps at most."""
    sites = len({*config.facilities, *config.serve.sites})
    kept = models_kept(build_strategy(config.strategy), sites)
    return disk_use.server_disk(parameters, sites, kept)


def models_kept(strategy: Strategy, sites: int) -> int:
    """Return how many sets of tensors a strategy, ours or Flower's, keeps beside its versions."""
    if isinstance(strategy, HpcStrategy):
        return strategy.models_kept(sites)
    if isinstance(strategy, FedAdam | FedAdagrad | FedYogi):
        return 6  # the weights, two moments, and the next ones
    return 4 * isinstance(strategy, FedAvgM)  # the weights, momentum, and the next ones


def gb(size: float) -> str:
    """Return bytes in GB."""
    return f"{size / 1e9:.3g} GB"


def _rooms(config: Config, folder: Path, joins: bool) -> list[Room]:
    """Return what is taken of each file system that this host sees."""
    if (parameters := trained_parameters(config)) is None:
        return []
    run = RunDir(folder)
    checkpoints = config.train.checkpoint_every_orders > 0
    least = disk_use.least_site_disk(parameters, checkpoints=checkpoints)
    most = site_disk_of(config, parameters).total
    own = "site.dir" if joins else "run_dir"
    taken = []
    if not joins:
        server = server_disk_of(config, parameters)
        taken.append((own, run.path, disk_use.FLOAT32 * parameters, server))
    for name, facility in config.here.items():
        key = own if facility.workdir is None else f"facilities.{name}.workdir"
        taken.append((key, run.site_root(config, name, "RUN"), least, most))
    rooms: dict[int, Room] = {}
    for key, path, low, high in taken:
        device = existing(path).stat().st_dev
        before = rooms.get(device, Room({}, 0, 0))
        folders = {key: run.path if key == own else path} | before.folders
        rooms[device] = Room(folders, max(before.least, low), before.most + high)
    return list(rooms.values())


def _existing(room: Room) -> Path:
    return existing(next(iter(room.folders.values())))


def check_facilities(config: Config, names: list[str]) -> None:
    """Check what the facilities' jobs need; `names` are all that train."""
    packages: tuple[str, ...] = TRAIN_PACKAGES
    kind = "train"
    if config.model.lora.quantize != "none":
        packages, kind = (*TRAIN_PACKAGES, "bitsandbytes"), "qlora"
    for name, facility in config.here.items():
        if facility.lora_r is not None:
            _check_rank(config, name, facility.lora_r)
    for name, facility in config.here.items():
        if facility.local and facility.python is None:
            _check_packages(name, packages, kind)
        check_interpreter(name, facility, (*JOB_PACKAGES, *packages), f"flwr-hpc[{kind}]")
        if facility.local and facility.container is None:
            check_pretrained(config, name, facility)
        sources.check(config.data, name, names, must_exist=facility.local)
        if facility.local:
            read_chat_template(config.data)
            if config.data.passages:
                read_passages(config.data.passages)


def _check_nodes(strategy: Strategy, facilities: int) -> None:
    """Refuse a strategy that would wait for ever for more sites than there are."""
    asked = {key: getattr(strategy, key, 0) for key in MIN_NODES}
    wrong = {key: n for key, n in asked.items() if isinstance(n, int) and n > facilities}
    if wrong:
        found = ", ".join(f"{key}={n}" for key, n in wrong.items())
        fix = " ".join(f"strategy.{key}={facilities}" for key in wrong)
        raise UserError(
            f"the strategy waits for {found} sites, but the run has {facilities} "
            f"{'facility' if facilities == 1 else 'facilities'}. Add to the command: {fix}"
        )


def _check_plain_adapters(lora: LoraConfig) -> None:
    """Refuse what an exact average of adapters cannot be added to, or makes no sense of."""
    if not lora.r:
        raise UserError("the strategy averages adapters. Give them a rank, e.g. model.lora.r=8")
    found = {"dora=true": lora.dora, "freeze_a=true": lora.freeze_a}
    found |= {f"quantize={lora.quantize}": lora.quantize != "none"}
    wrong = [f"model.lora.{key}" for key, is_so in found.items() if is_so]
    if wrong:
        raise UserError(
            f"the strategy adds to the weights under adapters, which goes with no {wrong[0]}: "
            "they are in 4 bit with quantize, divided by their norm with dora, and the average is "
            f"exact already with freeze_a. Leave out {' and '.join(wrong)}, or use another strategy"
        )


def _check_rank(config: Config, facility: str, rank: int) -> None:
    """Refuse a rank of its own where it is no rank of the run's adapters, or is averaged."""
    own, most = f"facilities.{facility}.lora_r", config.model.lora.r
    if not 0 < rank <= most:
        raise UserError(
            f"{own}={rank} must be from 1 to model.lora.r={most}, the rank in which adapters travel"
        )
    if not getattr(build_strategy(config.strategy), "takes_unlike_ranks", False):
        raise UserError(
            f"{own}={rank}: the strategy averages the factors of adapters, which must all have the "
            f"rank model.lora.r={most}. Leave out {own}, or use strategy=flora"
        )


def _check_packages(facility: str, packages: tuple[str, ...], kind: str) -> None:
    missing = [p for p in packages if find_spec(p) is None]
    if missing:
        raise UserError(
            f"facility '{facility}' runs here, but {', '.join(missing)} cannot be imported. "
            f"Fix it with: pip install 'flwr-hpc[{kind}]'"
        )


def check_pretrained(config: Config, facility: str, f: FacilityConfig) -> None:
    """Look for model and tokenizer where a job on this machine will."""
    if config.model.path and config.data.tokenizer == "byte":
        _check_byte_tokenizer(config.model.path)
    for key, name in (("model.path", config.model.path), ("data.tokenizer", config.data.tokenizer)):
        if not name or (key == "data.tokenizer" and name == "byte") or Path(name).is_dir():
            continue
        if not HUB_NAME.fullmatch(name):
            raise UserError(f"{key}={name}: there is no such folder on this machine")
        cache = _hub_cache({**os.environ, **f.env})
        unseen = f.internet or any("HF_" in line for line in f.setup)
        if not unseen and not (cache / f"models--{name.replace('/', '--')}" / "snapshots").is_dir():
            raise UserError(
                f"{key}={name} is neither a folder nor in the Hugging Face cache ({cache}), and "
                f"jobs of facility '{facility}' download nothing. Fetch it first: hf download "
                f"{name}. Or name a folder: {key}=/path/to/folder. Or let the jobs download it: "
                f"facilities.{facility}.internet=true"
            )


def _check_byte_tokenizer(model: str) -> None:
    """Find on the login node what the job would refuse: the checkpoint names its tokenizer."""
    saved = read_json(Path(model) / "tokenizer_config.json") or {}
    kind = str(saved.get("tokenizer_class") or "")
    if kind and not kind.startswith("ByT5"):
        raise UserError(
            f"data.tokenizer=byte, but model.path={model} was trained with its own ({kind}). "
            "Leave data.tokenizer out to take that"
        )


def _hub_cache(env: Mapping[str, str]) -> Path:
    """Return where huggingface_hub keeps what it downloaded."""
    base = env.get("XDG_CACHE_HOME") or "~/.cache"
    home = env.get("HF_HOME") or f"{base}/huggingface"
    return Path(env.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
