"""A Flower Grid that sends weights as references and gives them back as lazy records.

Strategies know nothing of it. Replies are pulled one by one, fetched and checked beside the loop:
one that is slow, stalled or malformed is its site's own failure, and it is seen only once it is
whole. Of what a reply says of itself nothing is believed: it answers what it was pulled for.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from flwr_hpc.clock import Clock, SystemClock
from flwr_hpc.exchange.codec import Codec
from flwr_hpc.exchange.executors import Inline
from flwr_hpc.exchange.expected import Expectations, Expected, order_in
from flwr_hpc.exchange.publisher import Publisher
from flwr_hpc.exchange.receiver import Receiver
from flwr_hpc.exchange.resumable.download import MARKS, PART
from flwr_hpc.exchange.store import PREFIX, Reference, Store
from flwr_hpc.exchange.tensors import BadPayload
from flwr_hpc.exchange.transfer import Transfer
from flwr_hpc.protocol import ARRAYS

REJECTED = 1000  # code of the error that a bad reply becomes
TTL_S = 30 * 86400.0  # a job may queue for days; deadlines are the strategy's business
POLL_S = 1.0  # pause of `send_and_receive`
ANSWER_S = 0.05  # what is there at once is seen at this poll, and not only at the next
WORDS = 1000  # characters of what was wrong with a reply
OPEN = 64  # messages per node whose replies are waited for: older ones are given up

log = logging.getLogger("flwr_hpc")


@dataclass
class _Awaited:
    """A message whose reply has not been seen."""

    sent: Message  # without arrays
    expected: Expected
    transfer: Transfer = field(default_factory=Transfer)
    task: Future[RecordDict | Error | None] | None = None
    looks: int = 0  # at the task, that found it not done
    done: int = -1  # bytes, when it was last seen to move
    moved_at: float = 0.0


class ExchangeGrid(Grid):
    """Wraps a Grid; publishes arrays on push, loads and checks them on pull.

    Parameters
    ----------
    grid : Grid
        Flower's.
    store : Store
        This run's alone.
    codec : Codec
        What the bytes of payloads are.
    folder : Path
        For this object's own files and emptied by it; on the store's file system, if that is
        local, so that nothing is copied.
    downlink : Codec or None
        Of updates of what a site has; None: every version is sent whole.
    inline_below_mb : float
        Smaller records stay in the message.
    stall_s : float
        A reply of which nothing has come for so long is given up.
    emit : callable
        Told ``order_rejected`` with facility, order_id and reason, and ``weights_sent`` with
        facility, order_id, mb and whether they are an update.
    memory : int
        Bytes that checking replies takes, of however many at the same time.
    executor : Executor
        Where replies are pulled, fetched and checked. The default does it in `pull_messages`.
    clock : Clock

    Attributes
    ----------
    rejected : int
        Replies refused so far.
    """

    def __init__(
        self,
        grid: Grid,
        store: Store,
        codec: Codec,
        folder: Path,
        *,
        downlink: Codec | None = None,
        inline_below_mb: float = 0.1,
        stall_s: float = 300.0,
        emit: Callable[..., object] = lambda event, **fields: None,
        memory: int = 256 << 20,
        executor: Executor | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.rejected = 0
        self._grid = grid
        self._store = store
        self._stall_s = stall_s
        self._emit = emit
        self._executor = executor or Inline()
        self._clock = clock or SystemClock()
        self._publisher = Publisher(store, codec, folder, inline_below_mb * 1e6, downlink)
        self._receiver = Receiver(store, codec, folder, self._publisher.version, memory)
        self._expectations = Expectations()
        self._awaited: dict[str, _Awaited] = {}  # by message id
        folder.mkdir(parents=True, exist_ok=True)
        for remains in folder.iterdir():  # of a killed session
            if remains.suffix not in (PART, MARKS):  # fetched in part: the site sends it again
                remains.unlink(missing_ok=True)

    def expect(self, arrays: ArrayRecord) -> None:
        """Say what replies must look like from nodes that nothing was pushed to yet.

        A resumed run collects orders of the session before it.
        """
        self._expectations.set_model(arrays)

    def receiving(self, message_id: str) -> bool:
        """Return whether a reply is on its way, Flower's part of it or ours: it is not lost."""
        awaited = self._awaited.get(message_id)
        if awaited is None or awaited.task is None or awaited.task.done():
            return False
        return awaited.transfer.begun or awaited.looks > 1  # else it has only been asked for

    def stop(self) -> None:
        """End what is under way; replies that come later are not taken."""
        for awaited in self._awaited.values():
            awaited.transfer.cancel()
        self._awaited.clear()
        self._executor.shutdown(wait=False)

    def close(self) -> None:
        """End, and empty the store; no message may be on its way any more."""
        self.stop()
        self._publisher.close()
        self._store.sweep()

    # --- Grid -----------------------------------------------------------------------------

    def set_run(self, run: Any) -> None:
        """Pass on."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """Pass on."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Pass on."""
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """Pass on."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        """Pass on."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push, with arrays published first; see `Grid.push_messages`."""
        plain = list(messages)
        encoded = [self._encode(message) for message in plain]
        self._publisher.prune()
        ids = list(self._grid.push_messages(encoded))
        for message_id, message, sent in zip(ids, plain, encoded, strict=False):
            if message_id:
                self._await(message_id, sent, self._expectations.reply_to(message))
                self._tell_of(sent)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are whole by now; a bad one becomes an error message."""
        waiting = [i for i in message_ids if i in self._awaited]
        wait([task for i in waiting if (task := self._ask(i))], timeout=ANSWER_S)
        found = ((i, self._outcome(i)) for i in waiting)
        return [self._reply(i, outcome) for i, outcome in found if outcome is not None]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push and pull until all have answered or `timeout` seconds are over."""
        waiting = [i for i in self.push_messages(messages) if i]
        until = None if timeout is None else self._clock.now() + timeout
        replies: list[Message] = []
        while True:
            replies += self.pull_messages(waiting)
            waiting = [i for i in waiting if i in self._awaited]
            if not waiting or (until is not None and self._clock.now() >= until):
                return replies
            self._clock.sleep(POLL_S)

    # --- push -----------------------------------------------------------------------------

    def _encode(self, message: Message) -> Message:
        message.metadata.ttl = TTL_S
        self._expectations.note(message)
        return self._publisher.encode(message)

    def _await(self, message_id: str, sent: Message, expected: Expected) -> None:
        stub = copy.copy(sent)
        configs = sent.content.config_records if sent.has_content() else {}
        stub.content = RecordDict(dict(configs))
        self._awaited[message_id] = _Awaited(stub, expected)
        mine = [i for i, a in self._awaited.items() if a.expected.node == expected.node]
        for old in mine[:-OPEN]:  # messages that nobody asks for any more
            self._awaited.pop(old).transfer.cancel()

    def _tell_of(self, sent: Message) -> None:
        """Say how much a node has to fetch."""
        if sent.has_content() and (record := sent.content.get(PREFIX + ARRAYS)) is not None:
            ref, (facility, order_id) = Reference.from_record(record), _names(sent)
            self._emit(
                "weights_sent", facility=facility, order_id=order_id,
                mb=round(ref.bytes / 1e6, 3), update=bool(ref.base),
            )  # fmt: skip

    # --- pull -----------------------------------------------------------------------------

    def _ask(self, message_id: str) -> Future[RecordDict | Error | None] | None:
        """Begin to bring a reply, and return that task, unless one is under way."""
        awaited = self._awaited[message_id]
        if awaited.task is not None:
            return None
        awaited.task = self._executor.submit(self._bring, message_id, awaited)
        awaited.looks = 0
        return awaited.task

    def _outcome(self, message_id: str) -> RecordDict | Error | None:
        """Return what a reply has come to, None while it is not whole."""
        awaited = self._awaited[message_id]
        assert awaited.task is not None  # it has just been asked for
        if not awaited.task.done():
            awaited.looks += 1
            return self._stalled(awaited)
        exc = awaited.task.exception()
        if exc is None:
            outcome, awaited.task = awaited.task.result(), None  # None: to be asked for again
            return outcome
        if isinstance(exc, BadPayload | OSError) and awaited.transfer.begun:
            return Error(REJECTED, f"reply refused: {_shown(exc)}")
        list(self._grid.get_node_ids())  # raises if it was the SuperLink that failed
        log.error("a reply cannot be read", exc_info=exc)
        return Error(
            REJECTED, f"reply refused: it cannot be read: {type(exc).__name__}: {_shown(exc)}"
        )

    def _bring(self, message_id: str, awaited: _Awaited) -> RecordDict | Error | None:
        """Pull a reply, fetch what it refers to and check it: beside the loop."""
        for reply in self._grid.pull_messages([message_id]):
            if reply.has_error():
                return reply.error
            awaited.transfer.advance(0)
            return self._receiver.take(reply.content, awaited.expected, awaited.transfer)
        return None

    def _stalled(self, awaited: _Awaited) -> Error | None:
        """Return an error if nothing of a reply has come for too long."""
        transfer, now = awaited.transfer, self._clock.now()
        if not transfer.begun:  # Flower has not got it yet: how long to wait is the engine's matter
            return None
        if transfer.done != awaited.done:
            awaited.done, awaited.moved_at = transfer.done, now
        if now - awaited.moved_at <= self._stall_s:
            return None
        transfer.cancel()
        what = f"nothing came for {self._stall_s:g} s after {transfer.done} bytes"
        return Error(REJECTED, f"reply refused: {what}")

    def _reply(self, message_id: str, outcome: RecordDict | Error) -> Message:
        """Return the reply to what was sent, whatever it said that it is."""
        awaited = self._awaited.pop(message_id)
        reply = Message(outcome, reply_to=awaited.sent)
        self._publisher.answered(awaited.sent, well=not reply.has_error())
        if reply.has_error() and reply.error.code == REJECTED:
            self.rejected += 1
            facility, order_id = _names(awaited.sent)
            reason = (reply.error.reason or "").removeprefix("reply refused: ")
            self._emit("order_rejected", facility=facility, order_id=order_id, reason=reason)
        return reply


def _shown(error: BaseException) -> str:
    """Return an error's words for terminals and logs: names in them may be another site's."""
    return "".join(c if c.isprintable() else "?" for c in str(error)[:WORDS])


def _names(sent: Message) -> tuple[str, str]:
    """Return facility and order id, as far as the message tells."""
    order = order_in(sent)
    return (order.facility, order.id) if order else (str(sent.metadata.dst_node_id), "")
