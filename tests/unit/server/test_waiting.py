"""For which sites a server waits, and how long: for those that join as long as it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from worlds.clock import FakeClock

from flwr_hpc.config.compose import compose_config
from flwr_hpc.config.schema import Config
from flwr_hpc.server import invitations
from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.server.server_app import LAST_S, SITES_S, _wait_for_sites
from strategies.engine.runtime import RunFailed

HOUR_S = 3600.0


class Sites:
    """The engine, as far as it tells who is online: each site from a moment on."""

    def __init__(self, **online_at: float) -> None:
        self.clock, self.online_at = FakeClock(), online_at
        self.now = self.clock.now

    @property
    def sites(self) -> dict[str, None]:
        return {name: None for name, at in self.online_at.items() if at <= self.now()}

    def wait_for(self, facilities: list[str], timeout: float) -> None:
        self.clock.sleep(timeout)
        if missing := set(facilities) - set(self.sites):
            raise RunFailed(f"waited for {missing}")


def served(folder: Path) -> tuple[RunDir, Config]:
    words = ["serve.address=127.0.0.1:8443", "serve.sites=[lumi,vega]", f"run_dir={folder}"]
    config = compose_config(words, serve=True)
    run = RunDir.create(config)
    invitations.prepare(run, config)
    return run, config


def waited(run: RunDir, config: Config, sites: Any, over: bool) -> float:
    _wait_for_sites(sites, run, config, over)
    return float(sites.now())


def test_sites_that_join_are_waited_for(tmp_path: Path) -> None:
    """Protects a run whose last site joins the next morning."""
    run, config = served(tmp_path / "run")
    assert waited(run, config, Sites(lumi=0.0, vega=10 * HOUR_S), over=False) >= 10 * HOUR_S


def test_a_server_killed_in_its_last_moments_ends_without_those_that_have_left(
    tmp_path: Path,
) -> None:
    """Protects from a resumed server that waits for ever for a site that was told that the run is
    over; one that was not comes back, and is told."""
    run, config = served(tmp_path / "run")
    assert LAST_S < waited(run, config, Sites(lumi=60.0), over=True) < 2 * LAST_S
    assert waited(run, config, Sites(lumi=60.0, vega=90.0), over=True) < LAST_S


def test_sites_of_this_host_come_up_or_the_run_fails(tmp_path: Path) -> None:
    """Protects from waiting for a site that cannot start."""
    words = [f"run_dir={tmp_path / 'run'}", "+facility=[local_a,local_b]"]
    config = compose_config(words)
    run = RunDir.create(config)
    sites: Any = Sites(local_a=0.0)
    with pytest.raises(RunFailed, match="waited 600 s"):
        _wait_for_sites(sites, run, config, False)
    assert sites.now() > SITES_S
