"""The state of a run, folded from its events; the live view, summary and report all show it.

`fold` reads no clock and does no I/O: the same events always give the same state. Events and
fields it does not know are ignored, so that older code reads newer logs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from flwr_hpc.tracking.events import Event
from flwr_hpc.tracking.records import PHASE_OF, WAITING, WORKING, FacilityState, OpenOrder, RunState
from flwr_hpc.tracking.timeline import ACQUIRING, order_parts

PAST = ("submitted_s", "started_s", "ended_s")  # times that lie in the past once they are told
MOST_DONE = 1000  # finished orders remembered by name: a resumed session asks for the newest
MOST_POINTS = 20_000  # of a curve


def fold(state: RunState, event: Event) -> RunState:
    """Bring `state` up to date with the next event and return it (it is changed in place)."""
    s = _number(event, "s")
    if event["event"] != "jobs_ended":  # that comes when the run is over
        state.wall_s = max(state.wall_s, s if s is not None else 0.0)
    event = {**event, "s": state.wall_s}
    if handle := RUN_EVENTS.get(event["event"]):
        handle(state, event)
    elif (on := FACILITY_EVENTS.get(event["event"])) and event.get("facility"):
        facility = state.facility(str(event["facility"]))
        _account(facility, event)
        on(state, facility, event)
        facility.accounts.count_lost(_mapping(event.get("ledger")) | _mapping(event.get("jobs")))
    return state


def fold_all(events: Iterable[Event], state: RunState | None = None) -> RunState:
    """Fold many events, from the beginning unless a `state` is given."""
    state = state if state is not None else RunState()
    for event in events:
        fold(state, event)
    return state


# --- events of the run ---------------------------------------------------------------------


def _run_started(state: RunState, e: Event) -> None:
    state.run_key = str(e.get("run_key") or state.run_key)
    state.strategy = str(e.get("strategy") or state.strategy)
    state.rounds = _count(e, "rounds") or state.rounds
    state.version = _count(e, "version")
    state.status, state.error = "running", ""
    state.rounds_done = max(state.rounds_done, state.version)
    state.started_t = state.started_t if state.started_t is not None else _number(e, "t")
    state.sessions.append(e["s"])
    if (t := _number(e, "t")) is not None:
        state.clocks.append((t, e["s"]))
    for name in e.get("facilities") or []:
        state.facility(str(name))
    for facility in state.facilities.values():  # of an earlier session, what was open is gone
        facility.open.clear()
        facility.transfers.clear()
        facility.excluded = ""
        facility.become("offline", e["s"])
        facility.settled_s = e["s"]


def _aggregated(state: RunState, e: Event) -> None:
    state.version = _count(e, "version")
    state.version_s[state.version] = e["s"]
    state.rounds_done = _count(e, "round") or state.version
    if (inexactness := _number(e, "lora_inexactness")) is not None:
        state.lora_inexactness[state.version] = inexactness
    if (removed := _number(e, "lora_inexactness_removed")) is not None:
        state.lora_inexactness_removed[state.version] = removed
    state.lora_inexactness_unknown = str(e.get("lora_inexactness_unknown") or "")
    for name, staleness in _numbers(e.get("staleness")).items():
        facility = state.facility(name)
        facility.merged += 1
        facility.staleness += int(staleness)


def _run_finished(state: RunState, e: Event) -> None:
    state.status = str(e.get("status") or "finished")
    state.error = str(e.get("error") or "")
    for facility in state.facilities.values():
        facility.open.clear()
        if facility.excluded:
            continue
        facility.become("done" if state.status == "finished" else "idle", e["s"])


# --- events of one facility ----------------------------------------------------------------


def _site_online(_: RunState, f: FacilityState, e: Event) -> None:
    if f.state in ("offline", "excluded"):
        f.excluded = ""  # it has come back as another node
        f.rest(e["s"])


def _site_excluded(_: RunState, f: FacilityState, e: Event) -> None:
    f.excluded = str(e.get("reason") or "no reason given")
    f.marks.append((e["s"], "excluded", f.excluded))
    f.become("excluded", e["s"])
    f.settled_s = e["s"]


def _site_offline(_: RunState, f: FacilityState, e: Event) -> None:
    f.become("offline", e["s"])


def _site_trouble(_: RunState, f: FacilityState, e: Event) -> None:
    f.trouble = str(e.get("reason") or "")


def _transfer(_: RunState, f: FacilityState, e: Event) -> None:
    which = str(e.get("way")), str(e.get("payload"))
    done, total = _count(e, "bytes"), _count(e, "total")
    f.transfers.pop(which, None)
    if done < total:
        f.transfers[which] = done, total, _number(e, "mb_per_s") or 0.0


def _allocation(_: RunState, f: FacilityState, e: Event) -> None:
    name, kind = str(e.get("allocation") or ""), e.get("state")
    f.queue_wait_s, f.walltime_left_s = _number(e, "queue_wait_s"), _number(e, "walltime_left_s")
    f.queue_wait_high_s, f.reason = _number(e, "queue_wait_high_s"), str(e.get("reason") or "")
    f.told_s = e["s"]
    if kind == "ended":
        if name in ("", f.allocation):
            f.allocation, f.hold_from_s = "", e["s"]
            f.rest(e["s"])
        return
    new, f.allocation = name != f.allocation, name
    if new:
        f.hold(name, e["s"])
    if kind in WAITING:
        f.become(str(kind), e["s"])
    elif kind == "ready":
        if new and f.state not in WAITING:  # it was faster than the first answer
            f.acquire(e["s"], e["s"])
        f.rest(e["s"])


def _jobs_ended(_: RunState, f: FacilityState, e: Event) -> None:
    """Their accounts are all it tells."""


def _order_sent(state: RunState, f: FacilityState, e: Event) -> None:
    order_id, version = str(e.get("order_id") or ""), _count(e, "version")
    order = OpenOrder(str(e.get("kind") or "train"), version, _count(e, "steps"), e["s"])
    state.version_s.setdefault(version, e["s"])
    f.open[order_id] = order
    f.refused = ""
    if len(f.open) == 1:
        f.order_id, f.step, f.order_steps = order_id, 0, order.steps
        if f.state not in WAITING:
            f.rest(e["s"])


def _order_progress(_: RunState, f: FacilityState, e: Event) -> None:
    order_id = str(e.get("order_id") or "")
    order = f.open.get(order_id)
    f.become(WORKING.get(order.kind if order else "train", "training"), e["s"])
    f.order_id, f.step = order_id, _count(e, "step")
    f.order_steps = _count(e, "steps") or (order.steps if order else 0)
    f.tokens_per_s = _newest(e, "tokens_per_s", f.tokens_per_s)
    loss = _number(e, "loss")
    if loss is not None and f.step:
        _train_point(f, e["s"], _steps_before(f, order_id) + f.step, loss)


def _order_done(state: RunState, f: FacilityState, e: Event) -> None:
    order_id = str(e.get("order_id") or "")
    order = f.open.pop(order_id, None)
    if order_id in f.done:  # logged, then asked for again by a resumed session
        f.rest(e["s"])
        return
    f.done[order_id] = None
    f.transfers.clear()
    if len(f.done) > MOST_DONE:
        del f.done[next(iter(f.done))]
    _lay_round_trip(f, order.sent_s if order else f.timeline.end_s, e)
    workers = [name for _, name in f.holds[:-3:-1]]
    f.accounts.order_done(str(e.get("kind") or "train"), workers, _numbers(e.get("seconds")))
    f.metrics = _numbers(e.get("metrics"))
    f.tokens_per_s = _newest(f.metrics, "tokens_per_s", f.tokens_per_s)
    f.mfu = _newest(f.metrics, "mfu", f.mfu)
    f.peak_memory_gb = max(
        filter(None, (f.peak_memory_gb, _number(f.metrics, "peak_memory_gb"))), default=None
    )
    if e.get("kind", "train") == "train":
        f.orders += 1
        f.steps += _count(e, "steps")
        f.tokens += _count(e, "tokens")
        f.step = f.order_steps
        if (share := _number(f.metrics, "sent_share")) is not None:
            f.encoded.append((f.orders, share, _number(f.metrics, "codec_error")))
            del f.encoded[:-MOST_POINTS]
        loss = _number(f.metrics, "train_loss")
        if loss is not None and (not f.train_loss or f.train_loss[-1][1] < f.steps):
            _train_point(f, e["s"], f.steps, loss)
    held_out = _number(f.metrics, "held_out_loss")
    if held_out is not None:
        _held_out(state, f, _count(e, "version"), held_out, e["s"])
    f.rest(e["s"])


def _order_lost(_: RunState, f: FacilityState, e: Event) -> None:
    kind = "rejected" if e["event"] == "order_rejected" else "failed"
    order_id = str(e.get("order_id") or "")
    if kind == "failed" and order_id and order_id == f.refused:
        return  # the failure that a rejection is followed by
    f.refused = order_id if kind == "rejected" else ""
    f.open.pop(order_id, None)
    f.transfers.clear()
    setattr(f, kind, getattr(f, kind) + 1)
    f.marks.append((e["s"], kind, str(e.get("reason") or "no reason given")))
    f.rest(e["s"])
    f.settled_s = e["s"]


def _evaluated(state: RunState, f: FacilityState, e: Event) -> None:
    loss = _number(e, "held_out_loss")
    if loss is not None:
        _held_out(state, f, _count(e, "version"), loss, e["s"])


RUN_EVENTS: dict[str, Callable[[RunState, Event], None]] = {
    "run_started": _run_started,
    "aggregated": _aggregated,
    "run_finished": _run_finished,
}
FACILITY_EVENTS: dict[str, Callable[[RunState, FacilityState, Event], None]] = {
    "site_online": _site_online,
    "site_offline": _site_offline,
    "site_trouble": _site_trouble,
    "site_excluded": _site_excluded,
    "transfer": _transfer,
    "allocation": _allocation,
    "jobs_ended": _jobs_ended,
    "order_sent": _order_sent,
    "order_progress": _order_progress,
    "order_done": _order_done,
    "order_rejected": _order_lost,
    "order_failed": _order_lost,
    "evaluated": _evaluated,
}


# --- parts ---------------------------------------------------------------------------------


def _account(f: FacilityState, e: Event) -> None:
    ledger = {str(n): _numbers(seconds) for n, seconds in _mapping(e.get("ledger")).items()}
    said = {str(n): _mapping(job) for n, job in _mapping(e.get("jobs")).items()}
    f.accounts.take(ledger, said)
    t = _number(e, "t")
    past = [_number(job, key) for job in said.values() for key in PAST]
    known = [time for time in past if time is not None]
    if t is not None and known:  # what has happened, has happened before it was told
        f.skew_s = min(t - max(known), math.inf if f.skew_s is None else f.skew_s)


def _lay_round_trip(f: FacilityState, sent_s: float, e: Event) -> None:
    """Put one order on the timeline, and divide the wait for its allocation."""
    waited = f.accounts.unplaced(ACQUIRING, f.allocation)
    if f.acquired:
        earliest, seen, ready = f.acquired
        began = max(earliest, min(seen, ready - sum(waited.values())))
        f.timeline.relay(began, ready, waited.items())
        f.acquired, waited = None, {}
    start = max(sent_s, f.settled_s)
    f.timeline.extend(e["s"], PHASE_OF.get(f.state, "idle"))
    parts = order_parts(_numbers(e.get("seconds")), waited, e["s"] - start)
    f.timeline.relay(start, e["s"], parts)
    f.settled_s = e["s"]


def _steps_before(f: FacilityState, order_id: str) -> int:
    """Return the steps of finished orders and of those sent before this one."""
    before = f.steps
    for other, order in f.open.items():
        if other == order_id:
            break
        before += order.steps
    return before


def _train_point(f: FacilityState, s: float, steps: int, loss: float) -> None:
    while f.train_loss and f.train_loss[-1][1] >= steps:  # trained again after a failure
        f.train_loss.pop()
    f.train_loss.append((s, steps, loss))
    f.loss = loss
    if len(f.train_loss) > MOST_POINTS:  # the older half by means of two
        half = MOST_POINTS // 2
        pairs = zip(f.train_loss[:half:2], f.train_loss[1:half:2], strict=True)
        means = [(b[0], b[1], (a[2] + b[2]) / 2) for a, b in pairs]
        f.train_loss[:half] = means


def _held_out(state: RunState, f: FacilityState, version: int, loss: float, s: float) -> None:
    f.held_out[version] = (state.version_s.get(version, s), loss)


def _number(e: dict[str, Any], key: str) -> float | None:
    value = e.get(key)
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _numbers(value: Any) -> dict[str, float]:
    """Return the entries that are finite numbers."""
    found = {str(k): _number(value, k) for k in _mapping(value)}
    return {k: v for k, v in found.items() if v is not None}


def _newest(e: dict[str, Any], key: str, old: float | None) -> float | None:
    value = _number(e, key)
    return old if value is None else value


def _count(e: dict[str, Any], key: str) -> int:
    return int(_number(e, key) or 0)
