"""What `make lab-centres` prints, typed as it stands there."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.__main__ import ONE_MODEL, WAN
from lab.fixtures import need_hosts
from lab.host import HOME
from worlds.jobs import until
from worlds.runs.run import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
SMALL = ("--nodes=1", "--cpus=1", "--no-accounting")


class ByHand:
    """The lab of a person, in a folder that is not `make lab`'s."""

    def __init__(self, logs: Path) -> None:
        self.home, self.logs = Path(f"{HOME}-{os.getpid()}"), logs
        self.running: dict[str, subprocess.Popen[bytes]] = {}  # by host

    def lab(self, *words: str) -> str:
        """Type a command of the lab; return what it prints."""
        command = [sys.executable, "-m", "tests.lab", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=self._env())
        assert done.returncode == 0, done.stderr
        return done.stdout

    def type(self, line: str, host: str) -> None:
        """Type a line that was printed, in a terminal of its own."""
        with open(self.logs / f"{host}.out", "ab") as out:
            self.running[host] = subprocess.Popen(
                line, shell=True, cwd=ROOT, env=self._env(), stdin=-3, stdout=out, stderr=out
            )

    def file(self, host: str, user: str, name: str) -> Path:
        return self.home / f"{WAN}_{host}" / "files" / "home" / user / name

    def said(self) -> str:
        return "\n".join(f"== {p.name}\n{p.read_text()[-4000:]}" for p in self.logs.iterdir())

    def _env(self) -> dict[str, str]:
        return {**os.environ, "FLWR_HPC_LAB": str(self.home)}


@pytest.fixture
def by_hand(tmp_path: Path) -> Iterator[ByHand]:
    need_hosts()
    by_hand = ByHand(tmp_path)
    yield by_hand
    by_hand.lab("down", WAN)
    for process in by_hand.running.values():
        process.wait()


def test_what_the_lab_says_to_type_trains_one_model(by_hand: ByHand) -> None:
    """Protects whoever tries centres for the first time: every line works, in that order."""
    printed = by_hand.lab("up", "--centres", *SMALL)
    after = printed.partition(ONE_MODEL)[2].splitlines()[1:]
    run = by_hand.file("server", "sam", "run")
    for line in after[: after.index("Further:")]:
        host, *words = shlex.split(line.partition(" exec ")[2])
        if words[0] != "scp":
            by_hand.type(line, host)
            continue
        letter = run / "invitations" / Path(words[2]).name
        until(letter.exists, by_hand.home, explain=by_hand.said)
        by_hand.type(line, "scp")
        assert by_hand.running.pop("scp").wait() == 0, by_hand.said()

    def ended() -> bool:
        codes = [process.poll() for process in by_hand.running.values()]
        assert not any(codes), by_hand.said()
        return None not in codes

    until(ended, by_hand.home, explain=by_hand.said)
    assert [*by_hand.running] == ["server", "centre_a", "centre_b"]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["versions"], {*summary["facilities"]}) == (2, {"centre_a", "centre_b"})
