"""The live view of a run in the terminal, or plain lines where there is none."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flwr_hpc.tracking.events import Event
from flwr_hpc.tracking.records import FacilityState, RunState
from flwr_hpc.tracking.state import fold
from flwr_hpc.tracking.text import compact, describe, duration, outlook

REFRESH_S = 0.25
HEARTBEAT_S = 60.0  # plain lines tell of a long order's progress so often
MESSAGES = 5
WIDE = 110  # columns from which the allocation is shown

STYLES = {
    "offline": "red",
    "excluded": "red",
    "queued": "yellow",
    "starting": "magenta",
    "loading": "magenta",
    "ready": "cyan",
    "training": "green",
    "evaluating": "green",
    "transferring": "blue",
    "idle": "dim",
    "done": "bold green",
}


class LiveView:
    """Show a run while it goes on; a context manager that leaves the terminal as it was.

    It starts no thread: the terminal is drawn in `update`, at most four times a second, so
    call that about once a second even without events. Without a terminal, or with ``NO_COLOR``
    or ``TERM=dumb``, each noteworthy event is one plain line.

    Parameters
    ----------
    console : rich.console.Console
    rounds : int
        Planned, for the progress bar.
    facilities : sequence of str
    clock : callable
        Monotonic seconds.
    """

    def __init__(
        self,
        console: Console,
        rounds: int,
        facilities: Sequence[str] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.state = RunState(rounds=rounds)
        for name in facilities:
            self.state.facility(name)
        self._console = console
        self._clock = clock
        self._messages: deque[tuple[float, str]] = deque(maxlen=MESSAGES)
        self._told: dict[str, float] = {}  # facility: when its progress was last told
        self._allocations: dict[str, tuple[object, object]] = {}
        self._heard = self._drawn = clock()
        self._live = None if _is_plain(console) else self._terminal()

    def __enter__(self) -> LiveView:
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()  # draws the last state and shows the cursor again

    def restore(self, events: Iterable[Event]) -> None:
        """Take in the events of earlier sessions without telling them again."""
        for event in events:
            fold(self.state, event)

    def update(self, events: Iterable[Event] = ()) -> None:
        """Take in new events, those without a time as of now, and draw if it is time to."""
        for event in events:
            event = {"s": self._now(), **event}
            line = describe(event) if self._is_news(event) else None
            fold(self.state, event)
            self._heard = self._clock()
            if line:
                self._tell(line, self.state.wall_s)
        if self._live and self._clock() - self._drawn >= REFRESH_S:
            self._drawn = self._clock()
            self._live.refresh()

    def print_line(self, line: str) -> None:
        """Tell what is no event of the run."""
        self._tell(line, self._now())

    def _terminal(self) -> Live:
        return Live(
            console=self._console,
            auto_refresh=False,
            get_renderable=self._render,
            vertical_overflow="ellipsis",
        )

    def _tell(self, line: str, s: float) -> None:
        if self._live:
            self._messages.append((s, line))
        else:
            self._console.print(
                f"[{s:8.1f} s] {line}", markup=False, highlight=False, soft_wrap=True
            )

    def _is_news(self, event: Event) -> bool:
        """What is known already, and most progress, is none."""
        facility, s = str(event.get("facility")), float(event.get("s") or 0.0)
        known = self.state.facilities.get(facility)
        if known and event["event"] == "evaluated":  # the order's own line told it
            return event.get("version") not in known.held_out
        if known and event["event"] == "order_failed":
            return not known.refused or known.refused != event.get("order_id")
        if event["event"] == "allocation":
            seen = (event.get("allocation"), event.get("state"))
            changed = self._allocations.get(facility) != seen
            self._allocations[facility] = seen
            return changed
        moving = event["event"] == "transfer" and event.get("bytes") != event.get("total")
        if event["event"] != "order_progress" and not moving:
            self._told[facility] = s
            return True
        if self._live or s - self._told.get(facility, 0.0) < HEARTBEAT_S:
            return False
        self._told[facility] = s
        return True

    # --- drawing ---------------------------------------------------------------------------

    def _render(self) -> RenderableType:
        messages = [
            Text.from_markup(f"[dim]{duration(s):>12}[/dim]  {escape(line)}", overflow="ellipsis")
            for s, line in self._messages
        ]
        for message in messages:
            message.no_wrap = True
        notes = [
            Text(f" {name}: {note}", style="dim", no_wrap=True, overflow="ellipsis")
            for name, f in self.state.facilities.items()
            if (note := outlook(f, self._now()))
        ]
        return Group(self._table(), *notes, Text(), self._overall(), *messages)

    def _now(self) -> float:
        """Return seconds of the run: the last event's and what has passed since."""
        over = self.state.status not in ("running", "unknown")
        return self.state.wall_s + (0.0 if over else self._clock() - self._heard)

    def _table(self) -> Table:
        wide = self._console.width >= WIDE
        table = Table(box=None, padding=(0, 1), header_style="bold")
        table.add_column("facility", no_wrap=True)
        table.add_column("state", no_wrap=True, min_width=12)
        if wide:
            table.add_column("allocation", no_wrap=True, overflow="ellipsis")
        table.add_column("step", no_wrap=True)
        for name in ("loss", "held-out", "tokens/s", "time"):
            table.add_column(name, justify="right", no_wrap=True)
        for name, f in self.state.facilities.items():
            table.add_row(name, *self._cells(f, wide))
        return table

    def _cells(self, f: FacilityState, wide: bool) -> list[RenderableType]:
        held_out = f.held_out_curve[-1][2] if f.held_out else None
        cells: list[RenderableType] = [
            Text(f.state, style=STYLES.get(f.state, "")),
            _progress(f.step, f.order_steps, 12 if wide else 6),
            _loss(f.loss),
            _loss(held_out),
            compact(f.tokens_per_s),
            duration(max(0.0, self._now() - f.since_s)),
        ]
        return [cells[0], Text(f.allocation), *cells[1:]] if wide else cells

    def _overall(self) -> Table:
        state = self.state
        row = Table.grid(padding=(0, 1))
        row.add_row(
            Text(" rounds", style="bold"),
            _bar(state.rounds_done, state.rounds, 30),
            Text(f"{state.rounds_done}/{state.rounds}"),
            Text(f"version {state.version}"),
            Text(duration(self._now()), style="dim"),
            Text(state.status, style="bold" if state.status != "running" else "dim"),
        )
        return row


def _is_plain(console: Console) -> bool:
    return not console.is_terminal or console.is_dumb_terminal or bool(os.environ.get("NO_COLOR"))


def _bar(done: int, of: int, width: int) -> ProgressBar:
    return ProgressBar(
        total=max(1, of),
        completed=min(done, max(1, of)),
        width=width,
        complete_style="cyan",
        finished_style="green",
    )


def _progress(step: int, steps: int, width: int) -> RenderableType:
    if not steps:
        return "–"  # noqa: RUF001
    grid = Table.grid(padding=(0, 1))
    grid.add_row(_bar(step, steps, width), Text(f"{step}/{steps}"))
    return grid


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"  # noqa: RUF001
