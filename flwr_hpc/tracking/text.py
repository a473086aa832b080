"""Events and quantities as short text for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flwr_hpc.protocol import Forecast
from flwr_hpc.tracking.events import Event
from flwr_hpc.tracking.records import FacilityState

WAYS = {"to_site": "to the site", "from_site": "from the site"}
ALLOCATION_STATES = {
    "queued": "waits in the queue",
    "starting": "starts",
    "loading": "loads the model",
    "ready": "is ready",
    "ended": "has ended",
}


def duration(seconds: float) -> str:
    """Return ``12 s``, ``3 min 05 s``, ``2 h 07 min`` or ``3 d 04 h``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def compact(number: float | None) -> str:
    """Return three digits and a unit prefix, ``1.23M``; a dash for None."""
    if number is None:
        return "–"  # noqa: RUF001
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size * 0.9995:
            return f"{number / size:.3g}{prefix}"
    return f"{number:.3g}"


def about(seconds: float) -> str:
    """Return a forecast, no more exact than it can be: ``40 s``, ``12 min``, ``5 h 20 min``."""
    if seconds < 60:
        return f"{round(seconds)} s"
    if seconds < 3600:
        return f"{round(seconds / 60)} min"
    minutes = round(seconds / 600) * 10
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{seconds / 86400:.1f} d"


def forecast(median_s: float | None, high_s: float | None) -> str:
    """Return ``starts in ~12 min (90 %: < 40 min)``, or ``""`` if nothing is known."""
    if median_s is None:
        return ""
    share = f"{Forecast.quantile:.0%}".replace("%", " %")
    high = f" ({share}: < {about(high_s)})" if high_s else ""
    return (f"starts in ~{about(median_s)}" if median_s >= 1 else "start is due") + high


def outlook(f: FacilityState, now_s: float) -> str:
    """Return when a queued allocation starts and why it waits, or how long one still lasts."""
    if f.excluded:
        return " ".join(f"left out of the run: {f.excluded}".split())
    if f.trouble:
        return f.trouble
    if f.transfers:
        return ", ".join(_moving(way, *together) for way, together in _by_way(f))
    passed = max(0.0, now_s - f.told_s)
    if f.state == "queued":
        starts = forecast(_later(f.queue_wait_s, passed), _later(f.queue_wait_high_s, passed))
        return " · ".join(filter(None, (starts, f.reason)))
    if not f.allocation or f.walltime_left_s is None or f.state in ("done", "offline"):
        return ""
    line = f"{about(max(0.0, f.walltime_left_s - passed))} of walltime left"
    successor = f.accounts.successor(f.allocation)
    return f"{line}, successor {successor}" if successor else line


def _by_way(f: FacilityState) -> Iterator[tuple[str, tuple[int, int, float]]]:
    """Yield what is on its way, its shards together."""
    for way in sorted({way for way, _ in f.transfers}):
        shards = [transfer for (its_way, _), transfer in f.transfers.items() if its_way == way]
        done, total, mb_per_s = zip(*shards, strict=True)
        yield way, (sum(done), sum(total), sum(mb_per_s))


def _moving(way: str, done: int, total: int, mb_per_s: float) -> str:
    share = f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB {WAYS.get(way, way)}"
    left = f", {about((total - done) / 1e6 / mb_per_s)} left" if mb_per_s else ""
    return f"{share} at {mb_per_s:.1f} MB/s{left}"


def _later(left_s: float | None, passed_s: float) -> float | None:
    return None if left_s is None else max(0.0, left_s - passed_s)


def hours(value: float) -> str:
    """Return node-hours, two digits after the point or three digits in all."""
    return (
        f"{value:.2f}" if value < 9.995 else f"{value:,.1f}" if value < 999.95 else f"{value:,.0f}"
    )


def node_hours_line(summary: Mapping[str, Any]) -> str:
    """Return what each facility's jobs cost as one line, ``""`` if that is not known."""
    parts = []
    for name, facility in summary.get("facilities", {}).items():
        if spent := facility.get("node_hours"):
            lost = f", {hours(spent['lost'])} lost" if spent["lost"] >= 0.005 else ""
            parts.append(f"{name} {hours(spent['used'])} ({hours(spent['idle'])} idle{lost})")
    return f"node-hours: {', '.join(parts)}" if parts else ""


def describe(event: Event) -> str | None:
    """Return an event as one line, or None if it is not worth one."""
    tell = LINES.get(event["event"])
    line = tell(event) if tell else None
    return " ".join(line.split()) if line else None


def _run_started(e: Event) -> str:
    names = ", ".join(str(n) for n in e.get("facilities") or [])
    verb = f"run resumed at version {e.get('version')}" if e.get("resumed") else "run started"
    return f"{verb}: {e.get('strategy')}, {e.get('rounds')} rounds, facilities {names}"


def _allocation(e: Event) -> str | None:
    state = ALLOCATION_STATES.get(str(e.get("state")))
    if state is None:
        return None
    line = f"{e.get('facility')}: allocation {e.get('allocation')} {state}"
    if starts := forecast(e.get("queue_wait_s"), e.get("queue_wait_high_s")):
        line += f", {starts}"
    if e.get("reason"):
        line += f" [{e['reason']}]"
    if e.get("walltime_left_s") is not None:
        line += f", walltime left {duration(e['walltime_left_s'])}"
    return line


def _order_done(e: Event) -> str:
    metrics = e.get("metrics") or {}
    line = f"{e.get('facility')}: "
    if e.get("kind", "train") == "train":
        line += f"{e.get('steps')} steps from version {e.get('version')}"
    else:
        line += f"{e.get('kind')} at version {e.get('version')}"
    for key, name, form in (
        ("train_loss", "loss", "{:.3f}"),
        ("held_out_loss", "held-out", "{:.3f}"),
        ("tokens_per_s", "tokens/s", "{}"),
        ("sent_share", "sent", "{:.1%} of the bytes"),
        ("codec_error", "codec error", "{:.1%}"),
    ):
        value = metrics.get(key)
        if value is not None:
            shown = form.format(compact(value) if key == "tokens_per_s" else value)
            line += f", {name} {shown}"
    trip = e.get("round_trip_s")
    return f"{line}, in {duration(trip)}" if trip is not None else line


def _order_progress(e: Event) -> str:
    line = f"{e.get('facility')}: step {e.get('step')}/{e.get('steps')}"
    if e.get("loss") is not None:
        line += f", loss {e['loss']:.3f}"
    rate = e.get("tokens_per_s")
    return f"{line}, {compact(rate)} tokens/s" if rate is not None else line


def _transfer(e: Event) -> str:
    way, done, total = str(e.get("way")), e.get("bytes") or 0, e.get("total") or 0
    rate = e.get("mb_per_s") or 0.0
    if done < total:
        return f"{e.get('facility')}: {_moving(way, done, total, rate)}"
    again = f", {e['again'] / 1e6:.1f} MB of it twice" if e.get("again") else ""
    whole = f"{total / 1e6:,.0f} MB {WAYS.get(way, way)}"
    took = f"in {duration(e.get('seconds') or 0.0)}, {rate:.1f} MB/s"
    return f"{e.get('facility')}: {whole} {took}{again}"


def _evaluated(e: Event) -> str | None:
    loss = e.get("held_out_loss")
    if loss is None:
        return None
    return f"{e.get('facility')}: held-out loss {loss:.3f} at version {e.get('version')}"


def _run_finished(e: Event) -> str:
    error = f": {e['error']}" if e.get("error") else ""
    return f"run {e.get('status')}{error}"


LINES: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "run_started": _run_started,
    "site_online": lambda e: f"{e.get('facility')}: site online",
    "site_offline": lambda e: f"{e.get('facility')}: site offline",
    "supernode_started": lambda e: f"{e.get('facility')}: its SuperNode has started",
    "site_trouble": lambda e: f"{e.get('facility')}: {e.get('reason') or 'goes on'}",
    "site_refused": lambda e: f"{e.get('facility')}: {e.get('reason')}",
    "client_app_lost": lambda e: f"{e.get('facility')}: {e.get('reason')}",
    "site_note": lambda e: f"{e.get('facility')}: {e.get('note')}",
    "reply_lost": lambda e: f"{e.get('facility')}: no reply to {e.get('kind')}: {e.get('reason')}",
    "disk_trouble": lambda e: str(e.get("reason")),
    "site_excluded": lambda e: f"{e.get('facility')}: left out of the run: {e.get('reason')}",
    "allocation": _allocation,
    "order_progress": _order_progress,
    "transfer": _transfer,
    "order_done": _order_done,
    "order_note": lambda e: f"{e.get('facility')}: {e.get('note')}",
    "order_rejected": lambda e: f"{e.get('facility')}: reply rejected: {e.get('reason')}",
    "order_failed": lambda e: f"{e.get('facility')}: order failed: {e.get('reason')}",
    "order_late": lambda e: f"{e.get('facility')}: its order came too late: {e.get('reason')}",
    "evaluated": _evaluated,
    "aggregated": lambda e: (
        f"version {e.get('version')} aggregated from {', '.join(e.get('facilities') or [])}"
    ),
    "run_finished": _run_finished,
}
