"""One command trains adapters at three centres that share nothing, over SSH that keeps breaking."""

from __future__ import annotations

import random
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from lab.centres import Centres
from lab.host import LabError
from lab.place import STRANGER
from lab.remote import Host, Listener
from worlds.hosts.pbs import bring_pbs
from worlds.hosts.stranger import open_to_others
from worlds.hosts.visitors import (
    EVERYTHING,
    LOOPBACK,
    PRIVATE,
    PUBLIC,
    Opened,
    knock,
)
from worlds.runs.across import DATA, Tensors, on_one_host
from worlds.runs.base import save_base
from worlds.runs.by_ssh import BySsh

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
SSHD = "sshd"
SEED, KILLS, PAUSE_S = 1, 20, 5.0
STEPS, ROUNDS = 40, 4
SETTINGS = (
    *("model.lora.r=4", "data.tokenizer=byte", "strategy=diloco"),
    *(f"train.steps={STEPS}", f"rounds={ROUNDS}"),
    # A message that is lost with its connection is not missed before; allocations are idle so long.
    "federation.reply_grace_s=60",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint to adapt."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Tensors:
    """Return what the same training comes to on one host."""
    settings = (*SETTINGS, f"model.path={base}")
    return on_one_host(tmp_path_factory.mktemp("alone"), *settings, sites=tuple(DATA))


def test_connections_are_killed_at_random_moments(
    three_centres: Centres, tmp_path: Path, base: Path, alone: Tensors
) -> None:
    """Protects a run of days from lines of hours: twenty connections of SSH are killed, at either
    end; every site is met again, trains every order once, and the adapter is that of one host.
    Meanwhile a stranger gets nothing on any of them."""
    bring_pbs(three_centres["centre_c"])
    run = BySsh(three_centres, tmp_path, *SETTINGS, base=base)
    for site in run.sites:
        site.link.set(rate_mbit=20, rtt_ms=80, loss=0.01)
    opened = Opened([run.server, *run.sites])
    run.begin()
    run.until(lambda: {e["facility"] for e in run.events("supernode_started")} == set(DATA))
    draw, killed, held = random.Random(SEED), Counter[str](), ""
    while killed.total() < KILLS:  # as many from each version on, but for the last
        version = killed.total() * (ROUNDS - 1) // KILLS
        run.until(lambda version=version: len(run.events("aggregated")) >= version)  # type: ignore[misc]
        if version == ROUNDS - 2 and not held:
            held = _suspended_job(run.sites[0])  # or the run could end before the last of them
            _check_strangers(run, opened)
        time.sleep(draw.uniform(0, PAUSE_S))
        host, pid = draw.choice(run.until(run.connections))
        with suppress(LabError):  # its other end was killed just before
            host.run("kill", "-9", str(pid), user="root")
            killed[host.name] += 1
    _slurm(run.sites[0], "scontrol", "resume", held)
    run.ends_like(alone, ROUNDS * STEPS)
    assert 0 < killed["server"] < KILLS  # at either end
    assert [run.allocations(site) for site in run.sites] == [["a0000"]] * len(run.sites)
    notes = run.events("site_note")
    met = Counter(e["facility"] for e in notes if "its site runs on" in e["note"])
    lost = Counter(e["facility"] for e in notes if "line is lost" in e["note"])
    assert all(met[name] > 1 and lost[name] for name in DATA), notes
    assert run.connections() == []


def _check_strangers(run: BySsh, opened: Opened) -> None:
    """Hold what listens to the documentation, and come there as another user of each host."""
    here, *there = (run.server, *run.sites)
    ports = run.until(lambda: _settled(run, opened))  # lines may have been killed just now
    assert {entry.address for entries in ports.values() for entry in entries} == {LOOPBACK}
    for site in there:
        (line,) = (e.port for e in ports[site.name] if e.program == SSHD)
        assert knock(site, ("https", LOOPBACK, line), EVERYTHING) == PUBLIC
    (supernode,) = (e.port for e in ports[there[0].name] if e.program != SSHD)
    assert knock(there[0], ("http", LOOPBACK, supernode), EVERYTHING) == PRIVATE
    both = [knock(here, ("https", LOOPBACK, e.port), EVERYTHING) for e in ports[here.name]]
    assert sorted(both) == sorted([PUBLIC, PRIVATE])
    for host, folder in ((here, run.run_dir), *((site, run.home(site)) for site in there)):
        assert open_to_others(host.outside(folder)) == {}
        with pytest.raises(LabError, match="Permission denied"):
            host.run("ls", folder, user=STRANGER)


def _settled(run: BySsh, opened: Opened) -> dict[str, set[Listener]]:
    """Return what hosts listen at once every line is up, and the SuperNode of the first site,
    whose ranks are on another machine."""
    ports = opened.now()
    lines = [sum(e.program == SSHD for e in ports[site.name]) for site in run.sites]
    return ports if lines == [1, 1, 1] and len(ports[run.sites[0].name]) == 2 else {}


def _suspended_job(site: Host) -> str:
    job = _slurm(site, "squeue", "-h", "-t", "RUNNING", "-o", "%A").strip()
    _slurm(site, "scontrol", "suspend", job)
    return job


def _slurm(site: Host, *words: str) -> str:
    assert site.cluster is not None
    return site.cluster.slurm(*words)
