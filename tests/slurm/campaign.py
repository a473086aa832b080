"""Faults to runs of one command over two Slurm clusters."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
from lab.cluster import Cluster
from lab.plan import Shape
from safetensors.numpy import load_file
from slurm.fault_kinds import KINDS, Disk, SlurmScene
from worlds.campaign import PATIENT, ROUNDS, Campaign, Outcome, check_jobs, without_folders
from worlds.runs.run import Run, trained_steps

from flwr_hpc.files import read_json

# One job of two ranks on two nodes, and one of a single rank.
SHAPES = {
    "fault_a": Shape(nodes=2, cpus=1, slurmd_timeout_s=10),
    "fault_b": Shape(nodes=1, cpus=1, slurmd_timeout_s=10, accounting=False),
}
# The demo's model.
STEPS = 40
SETTINGS = (
    f"rounds={ROUNDS}", f"train.steps={STEPS}", "data.seq_len=64", "data.held_out_sequences=16",
    *PATIENT, "allocation.retries=50",
)  # fmt: skip


class OnClusters(Campaign[SlurmScene]):
    """Clusters, and a disk that holds run directory and sites."""

    kinds, settings = KINDS, SETTINGS

    def __init__(self, folder: Path, names: Sequence[str] = ()) -> None:
        super().__init__(folder)
        self.names = names or list(SHAPES)

    def set_up(self) -> None:
        self.disk = Disk(self.folder / "disk")  # first: the clusters see what is mounted by then
        self.stack.callback(self.disk.remove)
        self.clusters: dict[str, Cluster] = {}
        for name, shape in zip(self.names, SHAPES.values(), strict=True):
            self.clusters[name] = self.stack.enter_context(Cluster.up(name, shape))
            conf = self.folder / "conf" / "facility" / f"{name}.yaml"
            conf.parent.mkdir(parents=True, exist_ok=True)
            conf.write_text(self.clusters[name].layout.render("facility.yaml.j2"))
        run = self.begin("undisturbed").run
        assert run.end() == 0, run.said()
        self.expected = load_file(run.dir / "model" / "model.safetensors")

    def begin(self, seed: str) -> SlurmScene:
        for cluster in self.clusters.values():
            cluster.reset()
        folder = self.disk.folder / f"run-{seed}"
        places = [f"facilities.{n}.workdir={self.disk.sites}" for n in self.clusters]
        texts = zip(self.clusters, ("json", "logging"), strict=True)
        data = [f"data.paths.{name}=[{text}]" for name, text in texts]
        where = [f"--config-dir={self.folder / 'conf'}", f"+facility=[{','.join(self.clusters)}]"]
        settings = [*where, *SETTINGS, *places, *data]
        run = Run(folder, settings=settings, output=self.folder / f"run-{seed}.out")
        return SlurmScene(run, self.clusters, self.disk, random.Random(seed))

    def check(self, outcome: Outcome, scene: SlurmScene) -> None:
        run, key = scene.run, scene.key
        summary = read_json(run.dir / "summary.json") or {}
        outcome.finished = summary.get("status") == "finished"
        done = [e for e in run.events("order_done") if e["kind"] == "train"]
        outcome.partial_orders = sum(e["steps"] != STEPS for e in done)
        for facility, site in summary.get("facilities", {}).items():
            trained = trained_steps(scene.spool(facility).root)
            if not site["steps"] == trained == ROUNDS * STEPS:
                counts = f"{site['steps']} steps by the server's count, {trained} by the trainer's"
                outcome.twice.append(f"{facility}: {counts}, {ROUNDS * STEPS} ordered")
        for cluster in self.clusters.values():
            check_jobs(outcome, cluster, key)
        outcome.left += [f"process {without_folders(line)}" for line in run.left_behind()]
        outcome.left += [f"process {p.pid} of {job}" for p, job in _of_jobs(key)]
        outcome.equal_weights = self.is_expected(run.dir / "model")


def _of_jobs(key: str) -> Iterator[tuple[psutil.Process, str]]:
    for process in psutil.process_iter(["environ", "status"]):
        job = (process.info["environ"] or {}).get("FLWR_HPC_JOB", "")
        ours = job.startswith(key) and process.pid != os.getpid()
        if ours and process.info["status"] != psutil.STATUS_ZOMBIE:
            yield process, job
