"""Replies are fetched beside the loop: one that is slow is nobody else's matter."""

from __future__ import annotations

import threading
from concurrent.futures import wait

import pytest
from flwr.app import Message, RecordDict
from worlds.exchange.federation import Federation, initial
from worlds.strategies.grid import VirtualClock

from flwr_hpc.exchange.executors import DaemonThreads
from flwr_hpc.exchange.grid import REJECTED
from flwr_hpc.exchange.store import PREFIX


class Slow:
    """Threads, and a store whose payloads of one node come no further than they are let."""

    def __init__(self, tmp_path, node=12, stall_s=300.0):
        self.clock, self.threads = VirtualClock(), Threads()
        grid = {"executor": self.threads, "clock": self.clock, "stall_s": stall_s}
        self.federation = Federation(tmp_path, grid=grid)
        self.gate, self.open, self.folder = Gate(), self.federation.store.open, f"node-{node}"
        self.federation.store.open = self._open

    def _open(self, ref):
        file = self.open(ref)
        return GatedFile(file, self.gate) if ref.folder == self.folder else file

    def push(self, *nodes):
        content = RecordDict({"arrays": initial()})
        return self.federation.grid.push_messages([Message(content, n, "train") for n in nodes])

    def pull(self, ids):
        return self.federation.grid.pull_messages(ids)

    def reply(self, ids, task=-1):
        """Pull until one of the replies is there; nothing but a task is waited for."""
        while not (replies := self.pull(ids)):
            wait([self.threads.tasks[task]])
        return replies[0]


class Threads(DaemonThreads):
    """Remembers its tasks, to be waited for."""

    def __init__(self):
        self.tasks = []

    def submit(self, *args, **kwargs):
        self.tasks.append(super().submit(*args, **kwargs))
        return self.tasks[-1]


class Gate:
    """Lets reads pass, one for each `let`; `shut` ends the waiting."""

    def __init__(self):
        self.arrived, self._pass = threading.Semaphore(0), threading.Semaphore(0)

    def let(self, reads=1):
        self._pass.release(reads)

    def enter(self):
        self.arrived.release()
        self._pass.acquire()


class GatedFile:
    """A file that gives ten bytes at a time."""

    def __init__(self, file, gate):
        self._file, self._gate = file, gate

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._file.close()

    def fileno(self):
        raise OSError("no descriptor: it cannot be cloned")

    def read(self, size):
        self._gate.enter()
        return self._file.read(min(size, 10))


def test_a_slow_site_delays_nobody_elses_reply(tmp_path):
    """11 is taken while 12's payload is still on its way, and 12 once it is whole."""
    slow = Slow(tmp_path)
    ids = slow.push(11, 12)
    reply = slow.reply(ids, task=0)
    assert reply.metadata.src_node_id == 11
    assert slow.gate.arrived.acquire(timeout=60)
    assert slow.pull(ids) == []
    slow.gate.let(1000)
    reply = slow.reply(ids)
    assert reply.metadata.src_node_id == 12
    assert reply.has_content()


def test_a_stalled_site_has_failed_and_a_slow_one_has_not(tmp_path):
    """The deadline follows progress: ten bytes in 299 seconds are enough, none in 301 are not."""
    slow = Slow(tmp_path, stall_s=300.0)
    (message_id,) = slow.push(12)
    slow.pull([message_id])
    for _ in range(5):
        assert slow.gate.arrived.acquire(timeout=60)
        assert slow.pull([message_id]) == []
        slow.clock.t += 299
        assert slow.pull([message_id]) == []
        slow.gate.let()
    assert slow.gate.arrived.acquire(timeout=60)
    assert slow.pull([message_id]) == []
    slow.clock.t += 301
    (reply,) = slow.pull([message_id])
    assert reply.error.code == REJECTED
    assert "nothing came for 300 s after" in reply.error.reason
    assert slow.pull([message_id]) == []
    slow.gate.let(1000)  # it goes on too late: nobody waits, and nothing of it stays
    wait(slow.threads.tasks)
    assert [p.name for p in slow.federation.files("server") if p.name.startswith(".")] == []


def test_a_reply_on_its_way_is_not_lost(tmp_path):
    """The engine's deadlines are for silence; merely asking for a reply says nothing."""
    slow = Slow(tmp_path)
    ids = slow.push(12)
    pull, asking = slow.federation.inner.pull_messages, Gate()
    slow.federation.inner.pull_messages = lambda i: asking.enter() or pull(i)
    slow.pull(ids)
    assert not slow.federation.grid.receiving(ids[0])
    slow.pull(ids)  # Flower has not answered since the last poll: it waits for objects
    assert slow.federation.grid.receiving(ids[0])
    asking.let()
    assert slow.gate.arrived.acquire(timeout=60)
    assert slow.federation.grid.receiving(ids[0])
    slow.gate.let(1000)
    wait(slow.threads.tasks)
    assert not slow.federation.grid.receiving(ids[0])
    assert slow.reply(ids).has_content()


def test_stopping_ends_what_is_under_way(tmp_path):
    """A thread that moves again finds that it is over; no later reply is taken."""
    slow = Slow(tmp_path)
    (message_id,) = slow.push(12)
    slow.pull([message_id])
    assert slow.gate.arrived.acquire(timeout=60)
    slow.federation.grid.stop()
    slow.gate.let()
    wait(slow.threads.tasks)
    assert slow.threads.tasks[0].exception() is not None
    assert slow.pull([message_id]) == []
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "exchange")


def test_a_reply_that_is_not_there_is_asked_for_again(tmp_path):
    """Each poll asks once per message, and never twice at a time."""
    slow = Slow(tmp_path)
    ids = slow.push(11)
    at_once, pull = [], slow.federation.inner.pull_messages

    def asking(message_ids):
        assert not slow.asking
        slow.asking = True
        at_once.append(message_ids)
        slow.asking = False
        return pull(message_ids) if len(at_once) == 3 else []

    slow.asking, slow.federation.inner.pull_messages = False, asking
    assert slow.reply(ids).has_content()
    assert at_once == [ids] * 3


def test_a_reply_that_cannot_be_read_is_its_sites_failure(tmp_path):
    """Objects that Flower cannot put together end in an error of one site, not of the run."""
    slow = Slow(tmp_path)
    ids = slow.push(11)

    def broken(message_ids):
        raise KeyError("no such object")

    slow.federation.inner.pull_messages = broken
    reply = slow.reply(ids)
    assert reply.error.code == REJECTED
    assert "cannot be read" in reply.error.reason


def test_a_superlink_that_is_gone_is_no_sites_failure(tmp_path):
    """The run ends, to be started again by the driver, and no order is counted as failed."""
    slow = Slow(tmp_path)
    ids = slow.push(11)

    def gone(*args):
        raise ConnectionError("connection refused")

    slow.federation.inner.pull_messages = slow.federation.inner.get_node_ids = gone
    with pytest.raises(ConnectionError):
        slow.reply(ids)
    assert slow.federation.grid.rejected == 0


def test_send_and_receive_waits_for_all_or_its_time(tmp_path):
    """A strategy with a loop of its own gets what has come by its time-out."""
    slow = Slow(tmp_path)
    sleep = slow.clock.sleep
    slow.clock.sleep = lambda seconds: (wait(slow.threads.tasks[:1]), sleep(seconds))
    messages = [Message(RecordDict({"arrays": initial()}), n, "train") for n in (11, 12)]
    replies = slow.federation.grid.send_and_receive(messages, timeout=10.0)
    assert [r.metadata.src_node_id for r in replies] == [11]
    assert slow.clock.t == 10.0
    assert f"{PREFIX}arrays" not in replies[0].content
    slow.federation.grid.stop()
    slow.gate.let(1000)
