"""Faults to runs of `serve` and `join`, at hosts that share nothing."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

from centres.fault_kinds import KINDS, LINE, AcrossScene, disk, processes
from lab.centres import CENTRES, Centres
from lab.remote import Host
from safetensors.numpy import load_file
from worlds.campaign import PATIENT, ROUNDS, Campaign, Outcome, check_jobs, without_folders
from worlds.runs.joined import Joined
from worlds.runs.run import trained_steps

from flwr_hpc.files import read_json

DISK_MB, STEPS = 600, 20
# 9 MB, two chunks of 8 MiB: four seconds of the line.
SHAPE = ("hidden_size=256", "intermediate_size=1152", "num_attention_heads=4")
SETTINGS = (
    *(f"model.config.{value}" for value in (*SHAPE, "num_key_value_heads=4")),
    f"rounds={ROUNDS}", f"train.steps={STEPS}", "strategy=diloco", *PATIENT,
)  # fmt: skip
GONE_S = 20.0  # for the last processes to end
HOME_S = 120.0  # for a site to end after its server


class AcrossCentres(Campaign[AcrossScene]):
    """A server, a centre with Slurm and one without, each with a small disk."""

    kinds, settings = KINDS, SETTINGS

    def __init__(self, folder: Path, name: str = "faults") -> None:
        super().__init__(folder)
        self.name = name

    def set_up(self) -> None:
        sites = [replace(site, disk_mb=DISK_MB) for site in CENTRES]
        self.centres = self.stack.enter_context(Centres.up(self.name, sites))
        scene = self.begin("undisturbed")
        joined, command = scene.joined, scene.commands["server"]
        joined.until(lambda: command.poll() is not None)
        assert command.poll() == 0, joined.said()
        self.expected = load_file(joined.path("model/model.safetensors"))
        outcome = Outcome("undisturbed", 0.0, [], sessions=1)
        self.check(outcome, scene)
        assert outcome.flaws == []

    def begin(self, seed: str) -> AcrossScene:
        for host in self.centres.hosts.values():
            host.kill_all()
            if host.cluster:
                host.cluster.reset()
            disk(host).empty()
            host.link.up()
            host.link.set(**LINE)
            host.run("sh", "-c", "rm -rf ~/run ~/site ~/*.json")
        logs = self.folder / f"run-{seed}"
        logs.mkdir()
        joined = Joined(self.centres, logs, *SETTINGS)
        joined.begin()
        return AcrossScene(joined, random.Random(seed))

    def check(self, outcome: Outcome, scene: AcrossScene) -> None:
        joined = scene.joined
        self._send_home(outcome, scene)
        summary = read_json(joined.path("summary.json")) or {}
        outcome.finished = summary.get("status") == "finished"
        done = [e for e in joined.events("order_done") if e["kind"] == "train"]
        outcome.partial_orders = sum(e["steps"] != STEPS for e in done)
        key = str((read_json(joined.path("run.json")) or {})["run_key"])
        for site in joined.sites:
            steps = summary.get("facilities", {}).get(site.name, {}).get("steps")
            trained = trained_steps(site.outside(joined.home(site)))
            if not steps == trained == ROUNDS * STEPS:
                counts = f"{steps} steps by the server's count, {trained} by the trainer's"
                outcome.twice.append(f"{site.name}: {counts}, {ROUNDS * STEPS} ordered")
            if site.cluster:
                check_jobs(outcome, site.cluster, key)
        for host in (joined.server, *joined.sites):
            outcome.left += [f"process at {host.name}: {command}" for command in _left(host)]
        outcome.equal_weights = self.is_expected(joined.path("model"))

    def _send_home(self, outcome: Outcome, scene: AcrossScene) -> None:
        """Wait for the sites' end, as who types what the manual says.

        A site that was away at the run's end looks for its server until it gets Ctrl-C.
        """
        deadline = time.monotonic() + HOME_S
        for site in scene.joined.sites:
            if scene.commands[site.name].poll():
                scene.joined.join(site)
            command = scene.commands[site.name]
            try:
                command.wait(max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                outcome.sent_home.append(site.name)
                command.send_signal(signal.SIGINT)
            if (code := command.wait()) not in (0, 130):
                outcome.left.append(f"{site.name}: exit code {code}")


def _left(host: Host) -> list[str]:
    """Return the commands that still run on a host; who is killed takes a moment."""
    deadline = time.monotonic() + GONE_S
    while (found := processes(host)) and time.monotonic() < deadline:
        time.sleep(1.0)
    return [without_folders(" ".join(process.words)) for process in found]
