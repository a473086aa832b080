"""Runs of the command to their last round, with faults that a seed draws.

A fault comes when the run has moved since the last one was repaired, or, one time in three, at
once. A command that has ended is given again with ``resume=``. After its end every run is held to
the undisturbed one's weights, to one time for every order, and to leaving nothing behind.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from lab.cluster import Cluster
from lab.host import LabError
from lab.machine import PATIENCE_S
from lab.plan import Shape
from safetensors.numpy import load_file
from slurm.fault_kinds import KINDS, Disk, Missed, Scene
from worlds.jobs import STALLED_S
from worlds.runs.run import Run, trained_steps

from flwr_hpc.files import read_json

# One job of two ranks on two nodes, and one of a single rank.
SHAPES = {
    "fault_a": Shape(nodes=2, cpus=1, slurmd_timeout_s=10),
    "fault_b": Shape(nodes=1, cpus=1, slurmd_timeout_s=10, accounting=False),
}
# The demo's model; rounds only of whole orders of both sites, and patience with many faults.
ROUNDS, STEPS = 6, 40
SETTINGS = [
    f"rounds={ROUNDS}", f"train.steps={STEPS}", "data.seq_len=64", "data.held_out_sequences=16",
    "federation.wait_s=10", "federation.retries=50", "federation.restarts=50",
    "federation.min_sites=2", "federation.max_failed_rounds=50", "federation.retry_delay_s=1",
    "allocation.retries=50",
]  # fmt: skip
AT_ONCE = 0.35
SESSIONS = 20  # of one run, at most
TRIES = 5  # to repair something


@dataclass
class Struck:
    """A fault and what became of it."""

    kind: str
    what: str  # What was hit
    at_s: float  # Since the run's first start
    repaired_after_s: float | None  # None: whoever was hit had to help himself
    moved_after_s: float | None = None  # Until the work moved again; None: the run was over
    exit_code: int | None = None  # If the command ended of it
    said: str = ""  # The command's last line then


@dataclass
class Outcome:
    """One run of the campaign."""

    seed: str
    seconds: float
    faults: list[Struck]
    sessions: int
    finished: bool = False
    equal_weights: bool = False
    twice: list[str] = field(default_factory=list)  # Work, and jobs
    left: list[str] = field(default_factory=list)  # Processes and jobs
    partial_orders: int = 0

    @property
    def flaws(self) -> list[str]:
        """What should not have been."""
        found = [*(f"twice: {name}" for name in self.twice), *(f"left: {it}" for it in self.left)]
        found += [] if self.finished else ["it did not finish"]
        found += [] if self.equal_weights else ["its weights are not the undisturbed run's"]
        return found


class Campaign:
    """Clusters, a disk, and the weights that every run has to end with."""

    def __init__(self, folder: Path, names: Sequence[str] = ()) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self.names = names or list(SHAPES)

    def __enter__(self) -> Campaign:
        with ExitStack() as begun:
            begun.callback(self._stack.close)
            self._set_up()
            begun.pop_all()
        return self

    def _set_up(self) -> None:
        self.disk = Disk(self.folder / "disk")  # first: the clusters see what is mounted by then
        self._stack.callback(self.disk.remove)
        self.clusters: dict[str, Cluster] = {}
        for name, shape in zip(self.names, SHAPES.values(), strict=True):
            self.clusters[name] = self._stack.enter_context(Cluster.up(name, shape))
            conf = self.folder / "conf" / "facility" / f"{name}.yaml"
            conf.parent.mkdir(parents=True, exist_ok=True)
            conf.write_text(self.clusters[name].layout.render("facility.yaml.j2"))
        self.expected = self._undisturbed()

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def outcomes(self, seed: int, count: int, kinds: Sequence[str]) -> Iterator[Outcome]:
        """Do `count` faults, each kind as often as the others, in as many runs as that takes."""
        deck, runs = _deck(random.Random(seed), count, kinds), 0
        while deck:
            yield self.run(f"{seed}.{runs}", deck)
            runs += 1

    def run(self, seed: str, deck: list[str]) -> Outcome:
        """Make one run, and do the faults of the deck to it until it ends."""
        for cluster in self.clusters.values():
            cluster.reset()
        play = _Play(self._start(seed), self.clusters, self.disk, seed, deck)
        try:
            outcome = play.to_the_end()
            self._check(outcome, play.scene)
        finally:
            play.repair_all()
            if play.scene.run.process.poll() is None:
                play.scene.run.process.terminate()
                play.scene.run.process.wait()
        return outcome

    def _start(self, name: str) -> Run:
        folder = self.disk.folder / f"run-{name}"
        places = [f"facilities.{n}.workdir={self.disk.sites}" for n in self.clusters]
        texts = zip(self.clusters, ("json", "logging"), strict=True)
        data = [f"data.paths.{name}=[{text}]" for name, text in texts]
        where = [f"--config-dir={self.folder / 'conf'}", f"+facility=[{','.join(self.clusters)}]"]
        settings = [*where, *SETTINGS, *places, *data]
        return Run(folder, settings=settings, output=self.folder / f"run-{name}.out")

    def _undisturbed(self) -> Mapping[str, Any]:
        run = self._start("undisturbed")
        assert run.end() == 0, run.said()
        return load_file(run.dir / "model" / "model.safetensors")

    def _check(self, outcome: Outcome, scene: Scene) -> None:
        """Hold a run that has ended to what must be."""
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
        self._until_cancelled_jobs_are_gone()
        outcome.left = [f"process {_without_folders(line)}" for line in run.left_behind()]
        outcome.left += [f"process {p.pid} of {job}" for p, job in _of_jobs(key)]
        for cluster in self.clusters.values():
            listed = cluster.slurm("squeue", "-h", "-a", "--states=all", "-o", "%j %T").split()
            jobs = list(zip(listed[::2], listed[1::2], strict=True))
            names = Counter(name for name, _ in jobs if name.startswith(key))
            outcome.twice += [name for name, times in names.items() if times > 1]
            alive = ("RUNNING", "PENDING", "SUSPENDED", "COMPLETING")
            outcome.left += [f"job {name}" for name, state in jobs if state in alive]
        with suppress(OSError):
            found = load_file(run.dir / "model" / "model.safetensors")
            outcome.equal_weights = found.keys() == self.expected.keys() and all(
                found[name].tobytes() == tensor.tobytes() for name, tensor in self.expected.items()
            )

    def _until_cancelled_jobs_are_gone(self) -> None:
        """Let Slurm end what the run has cancelled; what never goes is left behind."""
        completing = ("squeue", "-h", "-a", "-t", "COMPLETING", "-o", "%A")
        for cluster in self.clusters.values():
            with suppress(LabError):
                cluster.until(lambda c=cluster: not c.slurm(*completing), PATIENCE_S, "jobs' end")


@dataclass
class _Repair:
    """A repair to come."""

    do: Callable[[], object]
    due_s: float
    tries: int = 0

    def succeeds(self) -> bool:
        """Try; a daemon may be in the way of another, and a job that is gone needs no repair."""
        self.tries += 1
        try:
            self.do()
        except (LabError, Missed):
            return False
        return True


class _Play:
    """One run and the faults that are done to it."""

    def __init__(
        self, run: Run, clusters: Mapping[str, Cluster], disk: Disk, seed: str, deck: list[str]
    ) -> None:
        self.draw = random.Random(seed)
        self.scene = Scene(run, clusters, disk, self.draw)
        self.deck, self.seed, self.began = deck, seed, time.monotonic()
        self.faults: list[Struck] = []
        self.sessions = 1
        self.repairs: list[_Repair] = []

    def to_the_end(self) -> Outcome:
        """Do faults and give the command again until it says that the run is finished."""
        while self.sessions < SESSIONS:
            if self.faults and self.deck and self.draw.random() < AT_ONCE:
                self._for_a_while(self.draw.uniform(0, 10))
            else:
                self._until_it_moves()
            code = self.scene.run.process.poll()
            if code == 0:
                break
            if code is not None:
                self._resume()
            elif self.deck:
                self._strike()
        self.repair_all()
        return Outcome(self.seed, round(self._now(), 1), self.faults, self.sessions)

    def repair_all(self) -> None:
        while self.repairs:
            self._repair(due_only=False)

    def _now(self) -> float:
        return time.monotonic() - self.began

    def _strike(self) -> None:
        """Do the deck's next fault that finds something to hit."""
        for kind in list(self.deck):
            try:
                harm = KINDS[kind](self.scene)
            except (Missed, LabError, psutil.Error, OSError):
                continue
            self.deck.remove(kind)
            after = None if harm.repair is None else self.draw.uniform(3, 15)
            rounded = None if after is None else round(after, 1)
            self.faults.append(Struck(kind, harm.what, round(self._now(), 1), rounded))
            print(f"  {self.seed} {self._now():6.1f} s: {kind}: {harm.what}", flush=True)
            if harm.repair is not None and after is not None:
                self.repairs.append(_Repair(harm.repair, self._now() + after))
            return
        self._for_a_while(0.5)

    def _for_a_while(self, seconds: float) -> None:
        end = self._now() + seconds
        while self._now() < end and self.scene.run.process.poll() is None:
            self._repair()
            time.sleep(0.1)

    def _repair(self, due_only: bool = True) -> None:
        for repair in [r for r in self.repairs if self._now() > r.due_s or not due_only]:
            if repair.succeeds() or repair.tries == TRIES:
                self.repairs.remove(repair)
            else:
                repair.due_s = self._now() + 2.0

    def _until_it_moves(self) -> None:
        """Wait until what was hit is repaired and some order has got on, or the command ended."""
        before, since = self._work(), self._now()
        process = self.scene.run.process
        while process.poll() is None:
            self._repair()
            if not self.repairs and self._work() != before:
                break
            if self._now() - since > STALLED_S:  # give the rest of the campaign a chance
                self._note(said=f"nothing moved for {STALLED_S:.0f} s: killed by the campaign")
                process.kill()
                process.wait()
                return
            time.sleep(0.1)
        for fault in self.faults if process.poll() is None else []:
            if fault.moved_after_s is None:
                fault.moved_after_s = round(self._now() - fault.at_s, 1)
        if self.deck:
            self._for_a_while(self.draw.uniform(0, 5))  # somewhere in the order

    def _work(self) -> tuple[Any, ...]:
        """Return what is done so far: results that the server has, and steps of orders."""
        done = len(self.scene.run.events("order_done"))
        steps = []
        for facility in self.scene.clusters:
            with suppress(OSError, ValueError):
                orders = self.scene.spool(facility).orders()
                steps += [(o.id, o.progress().get("step"), o.has_result) for o in orders]
        return done, tuple(steps)

    def _resume(self) -> None:
        run = self.scene.run
        last = (run.said().strip().splitlines() or [""])[-1]
        self._note(exit_code=run.process.returncode, said=last)
        self.repair_all()  # as whoever gives the command again would
        self.sessions += 1
        self.scene.run = Run(run.dir, resume=True, output=run.output)

    def _note(self, **fields: Any) -> None:
        if self.faults:
            for name, value in fields.items():
                setattr(self.faults[-1], name, value)


def _deck(draw: random.Random, count: int, kinds: Sequence[str]) -> list[str]:
    deck: list[str] = []
    while len(deck) < count:
        deck += draw.sample(list(kinds), len(kinds))
    return deck[:count]


def _of_jobs(key: str) -> Iterator[tuple[psutil.Process, str]]:
    for process in psutil.process_iter(["environ", "status"]):
        job = (process.info["environ"] or {}).get("FLWR_HPC_JOB", "")
        ours = job.startswith(key) and process.pid != os.getpid()
        if ours and process.info["status"] != psutil.STATUS_ZOMBIE:
            yield process, job


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return figures of a campaign, and every fault."""
    faults = [fault for outcome in outcomes for fault in outcome.faults]
    kinds = Counter(fault.kind for fault in faults)
    return {
        "faults": len(faults),
        "runs": len(outcomes),
        "runs_without_a_flaw": sum(not outcome.flaws for outcome in outcomes),
        "kinds": dict(sorted(kinds.items())),
        "commands_that_ended": dict(Counter(f.kind for f in faults if f.exit_code is not None)),
        "each_run": [asdict(outcome) | {"flaws": outcome.flaws} for outcome in outcomes],
    }


def _without_folders(command: str) -> str:
    """Shorten the paths in a command to their last part: records name no machine's folders."""
    return re.sub(r"/[^ =]*/", "", command)
