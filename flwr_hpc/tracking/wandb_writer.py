"""Weights & Biases, written by the server side alone: sites need neither wandb nor a network.

wandb is imported when a writer is made, never with this module. Set-up is strict, logging is
tolerant: once the run goes on, nothing that wandb does may end it.
"""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from flwr_hpc.config.schema import TrackingConfig
from flwr_hpc.errors import UserError
from flwr_hpc.tracking.events import Event
from flwr_hpc.tracking.records import FacilityState
from flwr_hpc.tracking.redact import redact
from flwr_hpc.tracking.report.summary import summarize
from flwr_hpc.tracking.state import fold, fold_all

MODES = ("auto", "online", "offline", "disabled")
HOST = "https://api.wandb.ai"
ORDER_METRICS = ("train_loss", "held_out_loss", "tokens_per_s", "grad_norm", "mfu")

logger = logging.getLogger(__name__)


class WandbWriter:
    """Write one run's events to Weights & Biases.

    Curves of a facility are named ``FACILITY/...``: held-out losses stand over ``version``,
    what training tells over ``FACILITY/steps``, optimizer steps so far at that facility, as do
    ``FACILITY/node_hours/used``, ``idle`` and ``lost`` and each wait, ``FACILITY/queue_wait_s``.

    Parameters
    ----------
    tracking : TrackingConfig
    run_dir : Path
        wandb's files go to its ``wandb`` folder.
    run_key : str
        The W&B run id, so that a resumed run goes on in the same W&B run.
    config : dict
        The resolved configuration; secrets are masked.
    history : iterable of dict
        Events of earlier sessions, which are not logged again.
    """

    def __init__(
        self,
        tracking: TrackingConfig,
        run_dir: Path,
        run_key: str,
        config: Mapping[str, Any],
        history: Iterable[Event] = (),
    ) -> None:
        mode = mode_of(tracking)
        wandb = _import_wandb()
        self._state = fold_all(history)
        self._defined: set[str] = set()
        self._broken = False
        try:
            self._run = wandb.init(
                project=tracking.project,
                entity=tracking.entity,
                id=run_key,
                name=Path(run_dir).name,
                resume="allow",
                mode=mode,
                dir=str(run_dir),
                config=redact(dict(config)),
                settings=wandb.Settings(console="off", silent=True),
            )
        except Exception as exc:
            raise UserError(
                f"Weights & Biases does not start ({exc}). To write it to the run directory "
                "and upload later with `wandb sync`: tracking.mode=offline"
            ) from exc
        self._tolerate(lambda: self._run.define_metric("version", hidden=True))
        self._tolerate(lambda: self._run.define_metric("held_out_loss", step_metric="version"))

    def log(self, event: Event) -> None:
        """Log what an event tells; never raises for wandb's sake."""
        told, starts = self._told(event), self._starts(event)
        fold(self._state, event)
        values = {} if told else self._values(event)
        if self._starts(event) > starts:
            facility = self._state.facilities[str(event["facility"])]
            self._define(facility.name)
            waited = {"queue_wait_s": facility.accounts.queue_waits()[-1]}
            values |= _known(facility, waited, values.get(f"{facility.name}/steps"))
        if values:
            self._tolerate(lambda: self._run.log(values))

    def finish(self) -> None:
        """Write the summary and close the W&B run."""
        if values := self._global():
            self._tolerate(lambda: self._run.log(values))
        self._tolerate(lambda: self._run.summary.update(summarize(self._state)))
        failed = self._state.status in ("failed", "interrupted")
        self._broken = False  # closing is worth another try
        self._tolerate(lambda: self._run.finish(exit_code=int(failed)))

    def __enter__(self) -> WandbWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def _told(self, e: Event) -> bool:
        """Whether an evaluation repeats what its order said."""
        facility = self._state.facilities.get(str(e.get("facility")))
        return bool(
            facility and e["event"] == "evaluated" and e.get("version") in facility.held_out
        )

    def _starts(self, e: Event) -> int:
        """Return how many waits in the queue are over at the event's facility."""
        facility = self._state.facilities.get(str(e.get("facility")))
        return facility.accounts.starts if facility and e.get("jobs") else 0

    def _values(self, e: Event) -> dict[str, Any]:
        facility = self._state.facilities.get(str(e.get("facility")))
        name = e["event"]
        if name == "aggregated":
            return self._global()
        if facility is None:
            return {}
        self._define(facility.name)
        if name == "order_progress":
            return _known(facility, {"train_loss": e.get("loss"), **_rate(e)}, _steps(facility))
        if name == "order_done":
            told = {k: facility.metrics.get(k) for k in ORDER_METRICS}
            told |= {"peak_memory_gb": facility.metrics.get("peak_memory_gb")}
            told |= {"round_trip_s": e.get("round_trip_s"), "tokens": facility.tokens}
            hours = facility.accounts.node_hours() or {}
            told |= {f"node_hours/{k}": hours.get(k) for k in ("used", "idle", "lost")}
            return _known(facility, told, facility.steps, e.get("version"))
        if name == "evaluated":
            loss = {"held_out_loss": e.get("held_out_loss")}
            return _known(facility, loss, version=e.get("version"))
        if name in ("order_rejected", "order_failed"):
            return _known(facility, {"rejected": facility.rejected, "failed": facility.failed})
        return {}

    def _global(self) -> dict[str, Any]:
        """Return the held-out loss of the newest version that all facilities have evaluated."""
        curve = self._state.held_out_curve()
        return {"version": curve[-1][1], "held_out_loss": curve[-1][2]} if curve else {}

    def _define(self, facility: str) -> None:
        if facility in self._defined:
            return
        self._defined.add(facility)
        steps = f"{facility}/steps"
        self._tolerate(lambda: self._run.define_metric(f"{facility}/*", step_metric=steps))
        held_out = f"{facility}/held_out_loss"
        self._tolerate(lambda: self._run.define_metric(held_out, step_metric="version"))

    def _tolerate(self, call: Callable[[], object]) -> None:
        """Call wandb; its first failure is told, and silences it."""
        if self._broken:
            return
        try:
            call()
        except Exception as exc:
            self._broken = True
            logger.warning("Weights & Biases failed, the run goes on without it: %s", exc)


def mode_of(tracking: TrackingConfig, environ: Mapping[str, str] = os.environ) -> str:
    """Return wandb's mode; ``auto`` is online when logged in, else offline."""
    if tracking.mode not in MODES:
        raise UserError(f"tracking.mode={tracking.mode} is not known. Valid: {', '.join(MODES)}.")
    if tracking.mode != "auto":
        return tracking.mode
    if environ.get("WANDB_MODE") in MODES[1:]:
        return environ["WANDB_MODE"]
    return "online" if environ.get("WANDB_API_KEY") or _in_netrc(environ) else "offline"


def _in_netrc(environ: Mapping[str, str]) -> bool:
    path = Path(environ.get("NETRC") or Path(environ.get("HOME", "~")) / ".netrc").expanduser()
    host = urlparse(environ.get("WANDB_BASE_URL") or HOST).hostname or ""
    try:
        return host in netrc.netrc(str(path)).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as exc:
        raise UserError(
            f"tracking=wandb needs the package wandb ({exc}). Install it where this command "
            "runs: pip install 'flwr-hpc[wandb]' (the sites do not need it)"
        ) from exc
    return wandb


def _steps(f: FacilityState) -> int:
    return f.train_loss[-1][1] if f.train_loss else f.steps


def _rate(e: Event) -> dict[str, Any]:
    return {"tokens_per_s": e.get("tokens_per_s")}


def _known(
    f: FacilityState, told: Mapping[str, Any], steps: int | None = None, version: Any = None
) -> dict[str, Any]:
    """Return the known values under the facility's name, with what they stand over."""
    values = {f"{f.name}/{k}": v for k, v in told.items() if v is not None}
    if not values:
        return {}
    values[f"{f.name}/steps"] = f.steps if steps is None else steps
    return values if version is None else values | {"version": version}
