"""``ClientApp(mods=[flwr_hpc.batch("leonardo")])``: the rest of the app runs in a batch job.

What runs here, in the ClientApp's process at the login node, imports no torch by itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flwr.app import Context, Message

from flwr_hpc.batch_mod.app import Next, copy_app, find_app, rest
from flwr_hpc.batch_mod.cache import settings_of
from flwr_hpc.batch_mod.carry import load, save, take_over, versions
from flwr_hpc.batch_mod.job_settings import JobSettings
from flwr_hpc.batch_mod.run_status import RunWatch, flower_says
from flwr_hpc.batch_mod.settings import HERE, Settings, gather
from flwr_hpc.batch_mod.worker import run
from flwr_hpc.clock import SystemClock
from flwr_hpc.files import private_files, private_folder
from flwr_hpc.protocol import Order, Status
from flwr_hpc.schedulers.base import SchedulerUnavailableError
from flwr_hpc.schedulers.registry import make_scheduler
from flwr_hpc.site.manager import AllocationManager
from flwr_hpc.spool import Spool

Mod = Callable[[Message, Context, Next], Message]


class BatchError(RuntimeError):
    """No job answered the message; says why."""


class Terminated(Exception):
    """SIGTERM: without a reply Flower's SuperNode would wait for ever."""


def batch(facility: str | None = None, **settings: Any) -> Mod:
    """Return a mod that runs the rest of the ClientApp inside a batch job.

    The job imports the app and answers message after message, until it has been idle for
    ``idle_timeout_s`` or its walltime is over. Message, context and state travel both ways, and
    what the app raises is raised here. Mods listed before it run here, those after it in the job.

    Parameters
    ----------
    facility : str or None
        A file of ``conf/facility`` or of `config_dir`; ``"none"`` runs the app where it is.
        None: the SuperNode's node config, or the run config, names it as
        ``flwr-hpc.facility``; they win over what is given here.
    **settings
        Fields of `FacilityConfig` and `AllocationConfig` (`flwr_hpc.config.schema`), such as
        ``account``, ``walltime``, ``nodes``, ``idle_timeout_s``; ``config_dir``, a folder with
        further facilities; ``app``, the ClientApp as ``module:attribute``, needed only when no
        ``pyproject.toml`` names it. Each can be set as ``flwr-hpc.<name>`` in the node or run
        config too.
    """
    caller = str(sys._getframe(1).f_globals.get("__file__") or "")

    def mod(message: Message, context: Context, call_next: Next) -> Message:
        in_job = rest()
        if in_job is not None:
            return in_job.run(call_next)
        given = gather({"facility": facility, **settings}, context)
        if given.get("facility") == HERE:
            return call_next(message, context)
        with private_files():
            return _in_job(message, context, settings_of(given, context), caller)

    return mod


def _in_job(message: Message, context: Context, settings: Settings, caller: str) -> Message:
    """Send a message to the job, wait for its reply, and take the context over."""
    site = _site(context, settings, caller)
    order = _order(message, context, settings)
    folder = site.spool.order(order.id)
    if not folder.has_result and not folder.request.exists():
        save(folder.request, (message, context))
    with _raising_on_sigterm():
        status = site.submit(order, None)
        if status.result is None:
            watch = RunWatch(context.run_id, settings.run_check_s, flower_says)
            status = _wait(site, order.id, message, settings.name, watch)
    if status.state == "failed":
        raise BatchError(f"{settings.name}: {status.error}")
    reply = load(folder.reply)
    take_over(context, reply.context or context)
    if reply.failure is not None:
        raise reply.failure.exception()
    answer: Message = reply.message
    return answer


def _wait(
    site: AllocationManager, order_id: str, message: Message, name: str, watch: RunWatch
) -> Status:
    """Wait for the result as long as somebody wants the reply."""
    about, log = message.metadata, _Log(name)

    def poll() -> Status:
        if state := watch.ended():
            with contextlib.suppress(SchedulerUnavailableError):  # tried again the next time
                site.cancel_all()
                raise BatchError(f"{name}: the run is {state}; its jobs here are cancelled")
        return log(site.collect(order_id))

    left_s = max(0.0, about.created_at + about.ttl - time.time())
    status = site.wait(poll, left_s, {"done", "failed"})
    if status.result is None and status.state != "failed":
        site.withdraw(order_id)
        raise BatchError(
            f"{name}: no job answered within the message's time to live of "
            f"{about.ttl:.0f} s, after which Flower takes no reply. Give messages a longer ttl"
        )
    return status


def _site(context: Context, settings: Settings, caller: str) -> AllocationManager:
    spool = Spool(private_folder(settings.root(context)))
    app = copy_app(find_app(caller, settings.app), spool.app)
    in_job = JobSettings(app.folder, app.ref, versions(), settings.allocation.idle_timeout_s)
    return AllocationManager(
        spool=spool,
        run_key=settings.run_key(context),
        facility_name=settings.name,
        facility=settings.facility,
        allocation=settings.allocation,
        scheduler=make_scheduler(settings.facility),
        settings=in_job.to_dict(),
        clock=SystemClock(),
        entry=run,
    )


def _order(message: Message, context: Context, settings: Settings) -> Order:
    """Return the order of a message; the same one when the message is sent again."""
    about = message.metadata
    text = f"{about.message_id} {about.created_at} {about.message_type}"
    return Order(
        run_key=settings.run_key(context),
        facility=settings.name,
        seq=int(hashlib.sha256(text.encode()).hexdigest()[:12], 16),
        kind="train" if about.message_type.partition(".")[0] == "train" else "evaluate",
    )


@contextmanager
def _raising_on_sigterm() -> Iterator[None]:
    def terminate(*_: Any) -> None:
        raise Terminated("the ClientApp was terminated; a job that works on its message goes on")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Log:
    """Says in the SuperNode's log what the message waits for, when that changes."""

    def __init__(self, facility: str) -> None:
        self._facility, self._said = facility, ""

    def __call__(self, status: Status) -> Status:
        words = f"{status.state} in {status.allocation}" if status.allocation else status.state
        line = f"{self._facility}: {words}{f' ({status.reason})' if status.reason else ''}"
        if line != self._said:
            print(line, file=sys.stderr, flush=True)
            self._said = line
        return status
