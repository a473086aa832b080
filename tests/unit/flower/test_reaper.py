"""When what ends a session's processes may say that none is left."""

from __future__ import annotations

import os
import time

import pytest

from flwr_hpc.flower import reaper


def test_a_process_between_two_programs_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects from orphans: within execve a process shows no environment, and so no mark."""
    scans, signalled = [[], [4242], [], []], []
    monkeypatch.setattr(reaper, "marked", lambda mark: scans.pop(0))
    monkeypatch.setattr(os, "kill", lambda pid, number: signalled.append(pid))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert reaper.end("NAME=token")
    assert signalled == [4242]
    assert scans == []
