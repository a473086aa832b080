"""The thin ClientApp at a facility's login node: a message becomes an order to an allocation.

It never imports torch. Which facility it serves the SuperNode's node config says
(``site="<path of the site file>"``), see `flwr_hpc.site.settings`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_hpc import protocol
from flwr_hpc.config.invitation import versions
from flwr_hpc.exchange.tensors import BadPayload
from flwr_hpc.files import keep_files_private, open_many_files
from flwr_hpc.protocol import Order, Result, Status
from flwr_hpc.site.launcher import SESSION_MARK, Launcher, make_launcher
from flwr_hpc.site.limits import LimitReached, check_order
from flwr_hpc.site.long_poll import once_writable
from flwr_hpc.site.presence import Presence
from flwr_hpc.site.settings import NODE_CONFIG, from_node_config
from flwr_hpc.spool import LeftOut, retention

app = ClientApp()

# Jobs outlive this session; only its own processes carry the mark.
os.environ.pop(SESSION_MARK, None)


class Terminated(Exception):
    """SIGTERM: without a reply Flower's SuperNode would wait for ever."""


def _terminate(*_: Any) -> None:
    raise Terminated("the ClientApp was terminated")


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Tell which facility this is."""
    return _answer(
        message, context, lambda launcher: replace(launcher.site.status(), versions=versions())
    )


@app.query("acquire")
def acquire(message: Message, context: Context) -> Message:
    """Ask for an allocation; answered when it runs and the model is loaded."""

    def work(launcher: Launcher) -> Status:
        wait_s = _wait_s(message)
        return launcher.site.wait(launcher.site.acquire, wait_s, {"ready", "running", "failed"})

    return _answer(message, context, work)


@app.query("forecast")
def forecast(message: Message, context: Context) -> Message:
    """Tell how long a job submitted now would wait."""
    return _answer(message, context, lambda launcher: launcher.site.status_with_forecast())


@app.query("collect")
def collect(message: Message, context: Context) -> Message:
    """Wait for an order that was submitted before."""
    order = protocol.from_json(Order, str(message.content[protocol.ORDER]["json"]))
    return _answer(message, context, lambda launcher: _collect(launcher, order.id, message))


@app.query("release")
def release(message: Message, context: Context) -> Message:
    """Let the allocation end; with ``cancel`` at once."""

    def work(launcher: Launcher) -> Status:
        if _option(message, "cancel"):
            launcher.site.cancel_all()
        else:
            launcher.site.release()
            launcher.site.spool.released.touch()
        return launcher.site.status()

    return _answer(message, context, work)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Submit a training order and wait for it."""
    return _order(message, context, "train")


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Submit an evaluation order and wait for it."""
    return _order(message, context, "evaluate")


def _order(message: Message, context: Context, kind: protocol.OrderKind) -> Message:
    def work(launcher: Launcher) -> Status:
        order = _read_order(message, context, launcher, kind)
        check_order(launcher.settings.limits, order)
        status = _submit(message, order, launcher)
        return status if status.result else _collect(launcher, order.id, message)

    return _answer(message, context, work)


def _submit(message: Message, order: Order, launcher: Launcher) -> Status:
    """Receive what an order starts from, in the place of what is settled, and submit it."""
    spool, exchange = launcher.site.spool, launcher.exchange
    folder = spool.weights_folder
    folder.mkdir(parents=True, exist_ok=True)
    with spool.lock():
        retention.make_room(spool, order, exchange.files(message.content, folder))
    weights = exchange.receive(message.content, protocol.ARRAYS, folder)
    if weights is None and order.merges:
        raise BadPayload(f"the message lacks the weights of order {order.id}")
    extra_arrays = _receive_extra_arrays(message, order, launcher, folder)
    return launcher.site.submit(order, weights, extra_arrays)


def _read_order(
    message: Message, context: Context, launcher: Launcher, kind: protocol.OrderKind
) -> Order:
    """Return the order in the message, or make one up for a strategy that knows of none."""
    if protocol.ORDER in message.content:
        order = protocol.from_json(Order, str(message.content[protocol.ORDER]["json"]))
        return _with_steps(order, launcher)
    config = next(iter(message.content.config_records.values()), ConfigRecord())
    server_round = int(str(config.get("server-round", 0)))
    order = Order(
        run_key=f"flower-{context.run_id}",
        facility=launcher.settings.name,
        seq=2 * server_round + (kind == "evaluate"),
        kind=kind,
        version=server_round,
        steps=int(str(config.get("steps", 0))),
        options={k: v for k, v in config.items() if isinstance(v, int | float | str | bool)},
    )
    return _with_steps(order, launcher)


def _with_steps(order: Order, launcher: Launcher) -> Order:
    """Let an order that leaves it open train for ``train.steps`` steps."""
    if order.kind != "train" or order.steps:
        return order
    return replace(order, steps=launcher.settings.worker.train.steps)


def _receive_extra_arrays(
    message: Message, order: Order, launcher: Launcher, folder: Path
) -> dict[str, Path]:
    """Receive what comes beside the weights: without it, it would be another order."""
    received: dict[str, Path] = {}
    for key in order.extra_arrays:
        path = launcher.exchange.receive(message.content, key, folder)
        if path is None:
            raise BadPayload(f"the message lacks the arrays '{key}' of order {order.id}")
        received[key] = path
    return received


def _collect(launcher: Launcher, order_id: str, message: Message) -> Status:
    return launcher.site.wait(
        lambda: launcher.site.collect(order_id), _wait_s(message), {"done", "failed"}
    )


def _answer(message: Message, context: Context, work: Callable[[Launcher], Status]) -> Message:
    """Run `work` on this site and wrap the status it returns into a reply."""
    signal.signal(signal.SIGTERM, _terminate)
    keep_files_private()
    open_many_files()
    began, meta = time.monotonic(), message.metadata
    launcher = make_launcher(from_node_config(context.node_config.get(NODE_CONFIG)))
    spool, clock = launcher.site.spool, launcher.site.clock

    def attempt() -> tuple[Status, RecordDict]:
        try:
            status = work(launcher)
        except LimitReached as exc:
            launcher.site.release()  # no order will come: a warm job would idle for nothing
            status = Status("failed", order_id=_order_id(message), error=str(exc), fatal=True)
        if status.fatal:
            spool.left_out.write(LeftOut(status.error))
        return status, _payload(launcher, status.result, meta.dst_node_id)

    with Presence(spool, meta.message_id, meta.message_type):
        answer = once_writable(attempt, _patience_s(message), clock, spool.root)
    status, content = (answer, RecordDict()) if isinstance(answer, Status) else answer
    seconds = time.monotonic() - began
    status = replace(status, seconds=seconds, facility=launcher.settings.name)
    content[protocol.STATUS] = ConfigRecord({"json": protocol.to_json(status)})
    print(f"{meta.message_type} -> {status.state} {status.order_id}", file=sys.stderr)
    return Message(content, reply_to=message)


def _order_id(message: Message) -> str:
    """Return the order that a message is about, if it says so itself."""
    if protocol.ORDER not in message.content:
        return ""
    return protocol.from_json(Order, str(message.content[protocol.ORDER]["json"])).id


def _payload(launcher: Launcher, result: Result | None, node_id: int) -> RecordDict:
    """Return what goes with a finished order: metrics and arrays."""
    content = RecordDict()
    if result is None or result.state != "done":
        return content
    content[protocol.METRICS] = _flower_metrics(result)
    exchange, folder = launcher.exchange, launcher.site.spool.order(result.order_id)
    sent = {key: (folder.published_arrays(key), sha) for key, sha in result.extra_arrays.items()}
    if result.weights:
        sent[protocol.ARRAYS] = folder.path / result.weights, result.sha256
    for key, (path, sha256) in sent.items():
        exchange.send(content, key, path, sha256, node_id)
    return content


def _flower_metrics(result: Result) -> MetricRecord:
    """Return what a Flower strategy averages; it demands equal keys from every site."""
    loss = "train_loss" if "train_loss" in result.metrics else "held_out_loss"
    metrics = MetricRecord(
        {
            protocol.WEIGHT_KEY: result.examples,
            "tokens": result.tokens,
            "steps": result.steps,
        }
    )
    if loss in result.metrics:
        metrics[loss] = result.metrics[loss]
    return metrics


def _wait_s(message: Message) -> float | None:
    value = _option(message, "wait_s")
    return None if value is None else float(value)


def _patience_s(message: Message) -> float | None:
    """Return how long a full disk may hold a message; a question without a limit not at all."""
    wait_s = _wait_s(message)
    asks = message.metadata.message_type.startswith("query")
    return 0.0 if wait_s is None and asks else wait_s


def _option(message: Message, key: str) -> Any:
    record = message.content.get(protocol.WAIT)
    return record.get(key) if isinstance(record, ConfigRecord) else None
