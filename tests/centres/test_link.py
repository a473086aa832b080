"""The lab's wide-area network is as slow, far and lossy as it was made; and can be cut."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from lab.centres import Centres
from lab.remote import Host, Process
from lab.wan import ACK, QUEUE_S, SYN, Direction, Port

PROGRAM = Path(__file__).parents[1] / "worlds" / "network" / "wire.py"
WIRE = [sys.executable, "-I", "-S", str(PROGRAM)]
MB = 1_000_000


def direction(**values: Any) -> Direction:
    return Direction(random.Random(1), **values)


def ready(host: Host, *words: str) -> Process:
    """Start one end of a measurement; it listens on return."""
    process = host.popen(*WIRE, *words, stdout=-1)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def transfer(source: Host, target: Host, size: int) -> float:
    """Send bytes; returns the seconds it took, by the sender's clock."""
    sink = ready(target, "sink", "9000")
    sent = json.loads(source.run(*WIRE, "send", target.address, "9000", str(size)))
    came = json.loads(sink.communicate()[0])
    assert (came["bytes"], came["sha256"]) == (size, sent["sha256"])
    return float(sent["seconds"])


def trips(source: Host, target: Host, count: int, wait_s: float = 60.0) -> list[float]:
    words = ["ping", target.address, "9001", str(count), str(wait_s)]
    return [float(s) for s in json.loads(source.run(*WIRE, *words))]


def test_packets_leave_at_the_rate_that_is_set() -> None:
    """Protects the rate from bursts: a packet waits for the one before, and not for ever."""
    line = direction(rate_mbit=1.0, delay_s=0.04)
    arrivals = [line.admit(1250, now=0.0) for _ in range(30)]  # 10 ms each
    carried = [due for due in arrivals if due is not None]
    assert carried == pytest.approx([0.01 * k + 0.04 for k in range(1, len(carried) + 1)])
    assert len(carried) == pytest.approx(QUEUE_S / 0.01, abs=2)
    assert arrivals[len(carried) :] == [None] * (30 - len(carried))
    assert line.admit(1250, now=5.0) == pytest.approx(5.05)  # idle time is not saved up
    assert line.counters() == {
        "carried_bytes": 1250 * (len(carried) + 1),
        "lost_packets": 30 - len(carried),
    }


def test_losses_are_those_of_the_seed() -> None:
    """Protects a failing test's repetition: the same packets are lost again."""
    first, again = direction(loss=0.01), direction(loss=0.01)
    lost = [k for k in range(20_000) if first.admit(100, float(k)) is None]
    assert lost == [k for k in range(20_000) if again.admit(100, float(k)) is None]
    assert len(lost) == pytest.approx(200, rel=0.3)
    closed = direction(open=False)
    assert closed.admit(100, 0.0) is None


def test_a_firewall_drops_what_begins_a_connection() -> None:
    """Protects the tests of outgoing connections: their answers come in, others' begins do not."""
    port = Port(-1, -1, direction(), direction(), frozenset({22}))

    def packet(flags: int, target: int, protocol: int = 6, options: int = 0) -> bytes:
        head = bytes([0x45 + options, *[0] * 8, protocol, *[0] * (10 + 4 * options)])
        return head + bytes([0, 0]) + target.to_bytes(2) + bytes([*[0] * 9, flags, *[0] * 6])

    assert port.refuses(packet(SYN, 8000))
    assert port.refuses(packet(SYN, 8000, options=2))
    assert not port.refuses(packet(SYN, 22))
    assert not port.refuses(packet(SYN | ACK, 8000))
    assert not port.refuses(packet(ACK, 8000))
    assert not port.refuses(packet(SYN, 8000, protocol=17))
    assert not Port(-1, -1, direction(), direction()).refuses(packet(SYN, 8000))


@pytest.mark.slurm
def test_a_link_is_as_slow_and_as_far_as_it_was_made(centres: Centres) -> None:
    """Protects every result over 20 Mbit/s and 80 ms: never faster, never nearer."""
    server, centre = centres["server"], centres["centre_b"]
    ready(server, "echo", "9001")
    centre.link.set(rate_mbit=20, rtt_ms=80)
    measured = trips(centre, server, 5)
    assert len(measured) == 5
    assert min(measured) >= 0.08
    assert transfer(centre, server, 5 * MB) >= 5 * MB * 8 / 20e6 / 1.1
    before, began = centre.link.traffic(), time.monotonic()
    back = f"head -c {2 * MB} /dev/zero | ssh {centre.name} wc -c"  # a way in: SSH's alone
    assert int(server.run("sh", "-c", back)) == 2 * MB
    assert time.monotonic() - began >= 2 * MB * 8 / 20e6 / 1.1
    assert centre.link.traffic().in_bytes - before.in_bytes >= 2 * MB


@pytest.mark.slurm
def test_a_link_loses_what_it_should(centres: Centres) -> None:
    """Protects the tests under loss: TCP gets through, and had 1 % to send again."""
    server, centre = centres["server"], centres["centre_b"]
    centre.link.set(loss=0.01)
    transfer(centre, server, 10 * MB)
    traffic = centre.link.traffic()
    packets = traffic.out_bytes / 1500  # at least: those that are full
    assert traffic.out_bytes > 10 * MB
    assert 0.005 * packets < traffic.lost_packets < 0.05 * packets


@pytest.mark.slurm
def test_a_link_can_be_cut_and_half_open(centres: Centres) -> None:
    """Protects the tests of lost lines: packets vanish silently, connections outlive it."""
    server, centre = centres["server"], centres["centre_b"]
    echo = ready(server, "echo", "9001")
    assert echo.stdout is not None
    assert len(trips(centre, server, 3)) == 3
    assert [echo.stdout.readline() for _ in range(3)] == ["0\n", "1\n", "2\n"]
    centre.link.half_open("in")  # what the centre sends arrives; it hears nothing
    assert trips(centre, server, 2, wait_s=0.2) == []
    assert [echo.stdout.readline() for _ in range(2)] == ["0\n", "1\n"]
    for cut in (lambda: centre.link.half_open("out"), centre.link.down):
        cut()
        carried = server.link.traffic().in_bytes
        assert trips(centre, server, 2, wait_s=0.2) == []
        assert server.link.traffic().in_bytes == carried
    centre.link.up()
    assert len(trips(centre, server, 3)) == 3


@pytest.mark.slurm
def test_a_connection_outlives_a_cut(centres: Centres) -> None:
    """Protects the tests of resumed transfers: a cut does not close what is open."""
    server, centre = centres["server"], centres["centre_b"]
    centre.link.set(rate_mbit=4, rtt_ms=20)  # so slow that the cut comes in time
    sink = ready(server, "sink", "9000")
    sender = centre.popen(*WIRE, "send", server.address, "9000", str(5 * MB), stdout=-1)
    while centre.link.traffic().out_bytes < MB:
        assert sender.poll() is None
    centre.link.down()
    carried = centre.link.traffic().out_bytes
    with pytest.raises(Exception, match="timed out"):
        sender.communicate(timeout=1.0)
    assert centre.link.traffic().out_bytes == carried
    centre.link.set(rtt_ms=20)
    centre.link.up()
    sent, came = (json.loads(p.communicate()[0]) for p in (sender, sink))
    assert (came["bytes"], came["sha256"]) == (5 * MB, sent["sha256"])
