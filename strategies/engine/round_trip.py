"""One exchange of a synchronous round: a strategy's messages out, the final replies back."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from flwr_hpc.protocol import OrderKind
from strategies.engine import messages
from strategies.engine.engine import Engine
from strategies.engine.state import Event, SiteResult


class RoundTrip:
    """Turns the messages of ``configure_*`` into orders, and orders into replies.

    Parameters
    ----------
    engine : Engine
    deadline_s : float or None
        What has not arrived by then is abandoned.
    checked : bool
        Hold ordinary ClientApps' weights to the model's names and shapes too.

    Attributes
    ----------
    reasons : dict of str to str
        Why facilities failed in the last exchange.
    """

    def __init__(self, engine: Engine, deadline_s: float | None, checked: bool) -> None:
        self.reasons: dict[str, str] = {}
        self._engine = engine
        self._deadline_s = deadline_s
        self._checked = checked

    def exchange(
        self, sent: Iterable[Message], kind: OrderKind, version: int, arrays: ArrayRecord
    ) -> tuple[bool, list[Message]]:
        """Return whether anybody was asked, and one reply per facility, ordered by name.

        A facility that failed or was late answers with an error, as in Flower. Metrics that
        not all replies have are dropped.
        """
        asked: dict[str, Message] = {}
        for message in sent:
            facility = self._engine.facility_of.get(message.metadata.dst_node_id)
            if facility is not None and facility not in asked:
                asked[facility] = message
                self._request(facility, kind, message, version, arrays)
        self.reasons = {}
        replies = self._collect(asked, kind)
        for facility in asked:
            if facility not in replies:
                reason = self.reasons.setdefault(facility, "not done by the round's deadline")
                replies[facility] = messages.error_reply(asked[facility], reason)
        return bool(asked), messages.with_common_metrics([replies[f] for f in sorted(replies)])

    def _request(
        self, facility: str, kind: OrderKind, message: Message, version: int, arrays: ArrayRecord
    ) -> None:
        if self._engine.busy(facility):  # a straggler of an earlier round
            self._engine.abandon(facility)
        content = _frozen(message.content)
        options = messages.options_of(content)
        steps = int(options.pop("steps", 0))
        arrays = next(iter(content.array_records.values()), arrays)
        self._engine.request(
            facility,
            kind,
            steps=steps if kind == "train" else 0,
            options=options,
            weights=lambda: (version, arrays),
            content=content,
            checked=self._checked,
        )

    def _collect(self, asked: dict[str, Message], kind: OrderKind) -> dict[str, Message]:
        replies: dict[str, Message] = {}
        waiting = set(asked)
        until = None if self._deadline_s is None else self._engine.now() + self._deadline_s
        while waiting and (until is None or self._engine.now() < until):
            for event in self._engine.events():
                if event.facility in waiting and _kind(event) == kind:
                    waiting.discard(event.facility)
                    if isinstance(event, SiteResult):
                        reply = Message(event.message.content, reply_to=asked[event.facility])
                        replies[event.facility] = reply
                    else:
                        self.reasons[event.facility] = event.reason
        for facility in waiting:
            self._engine.abandon(facility)
        return replies


def _kind(event: Event) -> OrderKind:
    return event.order.kind if isinstance(event, SiteResult) else event.kind


def _frozen(content: RecordDict) -> RecordDict:
    """Copy the configs: Flower's strategies write the next round's number into the same one."""
    return RecordDict(
        {k: ConfigRecord(dict(v)) if isinstance(v, ConfigRecord) else v for k, v in content.items()}
    )
