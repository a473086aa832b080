"""From `strategy._target_` to a Flower Strategy."""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from flwr.serverapp.strategy import Strategy
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf.errors import OmegaConfBaseException

import strategies
from flwr_hpc.errors import UserError, closest
from flwr_hpc.server.strategy_options import check_options
from strategies import AsyncStrategy


def build_strategy(spec: dict[str, Any], key: str = "strategy") -> Strategy:
    """Instantiate any Flower Strategy, ours or not, from its class path and arguments.

    Parameters
    ----------
    spec : dict
        ``_target_`` and keyword arguments.
    key : str
        Where the configuration has it, for messages.
    """
    _check_import_name()
    target = spec.get("_target_")
    check_options(spec, key)
    try:
        strategy = instantiate(spec, _convert_="all")
    except (HydraException, OmegaConfBaseException) as exc:
        raise UserError(
            f"strategy {target} cannot be made: {_explain(exc)}{_whereabouts(str(target))}"
        ) from None
    if not isinstance(strategy, Strategy):
        raise UserError(
            f"{key}._target_={target} is not a subclass of flwr.serverapp.strategy.Strategy "
            f"(it makes a {type(strategy).__name__})"
        )
    _check_wrapped(strategy, key)
    return strategy


def _check_wrapped(strategy: Strategy, key: str) -> None:
    """Refuse wrappers of Flower's that would do without a word what nobody meant."""
    name, inner = type(strategy).__name__, getattr(strategy, "strategy", None)
    if name.startswith("DifferentialPrivacyClientSide"):
        raise UserError(
            f"{key}._target_={name} leaves clipping to a mod of the ClientApp, and sites of this "
            "run have none: nothing would be clipped. Clip at the server, which adds the noise "
            "anyway: strategy=private strategy.clip=1.0 strategy.noise_multiplier=1.0"
        )
    if isinstance(inner, AsyncStrategy):
        raise UserError(
            f"{key}._target_={name} works on rounds of Flower's kind, and {type(inner).__name__} "
            "has a loop of its own, which would be left out. Give a strategy of "
            "flwr.serverapp.strategy, or strategies.diloco.DiLoCo"
        )


def _explain(exc: BaseException) -> str:
    """Say in one line what is at the bottom of a chain of exceptions."""
    while cause := exc.__cause__ or exc.__context__:
        exc = cause
    lines = str(exc).strip().splitlines() or [""]
    if isinstance(exc, HydraException | OmegaConfBaseException):
        return lines[0]
    if isinstance(exc, ModuleNotFoundError):
        return (
            f"{lines[-1]}. Python looks in the current folder ({Path.cwd()}) and in those of "
            "PYTHONPATH. Start the run where the module lies, or put PYTHONPATH=FOLDER before "
            "the command"
        )
    if isinstance(exc, TypeError | ImportError | AttributeError | ValueError):
        return lines[0]  # they speak for themselves
    return f"{type(exc).__name__}: {lines[-1]}"


def _whereabouts(target: str) -> str:
    """Say where our strategies are, if the class is looked for among them."""
    package, _, name = target.rpartition(".")
    if package != "strategies" or name in vars(strategies):
        return ""
    modules = [m.name for m in pkgutil.iter_modules(strategies.__path__) if not m.ispkg]
    near = closest(name.lower(), modules)
    return f". Ours are strategies.MODULE.CLASS, of the modules {', '.join(modules)}.{near}"


@cache
def _check_import_name() -> None:
    """Another distribution on PyPI installs a package `strategies` over ours, silently."""
    others = set(packages_distributions().get("strategies", [])) - {"flwr-hpc", "flwr_hpc"}
    if others:
        name = sorted(others)[0]
        raise UserError(
            f"the package '{name}' also installs an import package called 'strategies'. "
            f"Fix it with: pip uninstall -y {name} && pip install --force-reinstall flwr-hpc"
        )
