"""What only the driver sees of Flower's processes."""

from __future__ import annotations

from pathlib import Path

from flwr_hpc.server.progress import SlowStarts
from flwr_hpc.tracking.text import describe

# As flwr 1.41 logs a ClientApp that was started 80 s late (2026-11-21).
SLOW = """\
\x1b[92mINFO \x1b[0m:      Start `flwr-clientapp` process
\x1b[91mERROR \x1b[0m:     [/v1/runtime/send-task-heartbeat][ApiError:1008] Runtime task-token authentication failed.
\x1b[91mERROR \x1b[0m:     [/v1/runtime/pull-task-input][ApiError:1008] Runtime task-token authentication failed.
\x1b[92mINFO \x1b[0m:      Task stopped.
\x1b[91mERROR \x1b[0m:     [/v1/runtime/push-task-output][ApiError:1008] Runtime task-token authentication failed.
"""  # noqa: E501


def test_clientapps_that_start_too_slowly_are_told(tmp_path: Path) -> None:
    """Protects from silence: they die before a line of ours runs, many times over. Told at once,
    and then each time that their number has doubled; what an earlier session logged is old."""
    log = tmp_path / "supernode-a.log"
    log.write_text(SLOW)
    watch = SlowStarts({"a": log, "b": tmp_path / "supernode-b.log"})
    assert watch.poll() == []
    told = []
    for _ in range(8):
        with open(log, "a") as f:
            f.write("Received successfully\n" + SLOW)
        told += [event["count"] for event in watch.poll()]
    assert told == [1, 2, 4, 8]
    (tmp_path / "supernode-b.log").write_text(SLOW)
    (event,) = watch.poll()
    assert event["facility"] == "b"
    assert "too busy" in (describe(event) or "")


def test_a_line_that_is_being_written_is_read_once(tmp_path: Path) -> None:
    """Protects the count from a look in the middle of a line."""
    log = tmp_path / "supernode-a.log"
    watch = SlowStarts({"a": log})
    for end in range(0, len(SLOW), 50):
        log.write_text(SLOW[:end])
        assert len(watch.poll()) <= 1
    log.write_text(SLOW)
    watch.poll()
    assert watch._count == {"a": 1}
