"""Runs of the commands to their last round, with faults that a seed draws.

A fault comes when the run has moved since the last one was repaired, or, as often, at once. A
command that has ended is given again after a while. After its end every run is held to the
undisturbed one's weights, to one time for every order, and to leaving nothing behind. What runs,
and what can happen to it, is a scene's: `slurm.campaign`, `centres.campaign`.
"""

from __future__ import annotations

import random
import re
import subprocess
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Generic, Self, TypeVar

import psutil
from lab.cluster import Cluster
from lab.host import LabError
from lab.machine import PATIENCE_S
from safetensors.numpy import load_file
from worlds.jobs import STALLED_S

# Rounds only of whole orders of all sites, and patience with many faults.
ROUNDS = 6
PATIENT = (
    "federation.wait_s=10", "federation.retries=50", "federation.restarts=50",
    "federation.min_sites=2", "federation.max_failed_rounds=50", "federation.retry_delay_s=1",
)  # fmt: skip
AT_ONCE = 0.5
AWAY_S = 10.0  # until a command is given again, at most
SESSIONS = 20  # of one run, at most
TRIES = 5  # to repair something
FORK_SERVER = "flwr_hpc.site.start.fork_server"  # and each ClientApp, which is a fork of it

T = TypeVar("T")


class Missed(Exception):
    """There was nothing to hit at this moment."""


@dataclass(frozen=True)
class Harm:
    """What was hit, and how it is repaired after a while; None: whoever was hit has to."""

    what: str
    repair: Callable[[], object] | None = None
    lasts_s: tuple[float, float] = (3.0, 15.0)  # at least, at most


@dataclass
class Struck:
    """A fault and what became of it."""

    kind: str
    what: str  # What was hit
    at_s: float  # Since the run's first start
    repaired_after_s: float | None  # None: whoever was hit had to help himself
    moved_after_s: float | None = None  # Until the work moved again; None: the run was over
    exit_code: int | None = None  # If a command ended of it
    said: str = ""  # The command's last line then


@dataclass
class Outcome:
    """One run of a campaign."""

    seed: str
    seconds: float
    faults: list[Struck]
    sessions: int
    finished: bool = False
    equal_weights: bool = False
    stalled: int = 0  # How often nothing moved for `STALLED_S`, and the commands were killed
    twice: list[str] = field(default_factory=list)  # Work, and jobs
    left: list[str] = field(default_factory=list)  # Processes and jobs
    partial_orders: int = 0
    sent_home: list[str] = field(default_factory=list)  # Sites that were away at the run's end

    @property
    def flaws(self) -> list[str]:
        """What should not have been."""
        found = [*(f"twice: {name}" for name in self.twice), *(f"left: {it}" for it in self.left)]
        found += [f"it stalled, {self.stalled} times"] if self.stalled else []
        found += [] if self.finished else ["it did not finish"]
        found += [] if self.equal_weights else ["its weights are not the undisturbed run's"]
        return found


class Scene(ABC):
    """A run under way, as whoever typed its commands sees it."""

    draw: random.Random

    @property
    @abstractmethod
    def commands(self) -> Mapping[str, subprocess.Popen[Any]]:
        """Return the commands that were typed last, by where; the first one's end is the run's."""

    @abstractmethod
    def again(self, where: str) -> None:
        """Type what the manual says after a command's end."""

    @abstractmethod
    def said(self, where: str) -> str:
        """Return what the commands have printed there."""

    @abstractmethod
    def work(self) -> object:
        """Return what is done so far: results that the server has, and steps of orders."""

    def ended(self) -> list[str]:
        """Return where commands have ended before the run has."""
        return [where for where, command in self.commands.items() if command.poll()]

    def is_over(self) -> bool:
        return next(iter(self.commands.values())).poll() == 0

    def goes_on(self) -> bool:
        return not self.ended() and not self.is_over()

    def one(self, found: Sequence[T]) -> T:
        if not found:
            raise Missed("there is none now")
        return self.draw.choice(found)


S = TypeVar("S", bound=Scene)
Kinds = Mapping[str, Callable[[S], Harm]]


class Campaign(ABC, Generic[S]):
    """Where runs are made, and the weights that every one of them has to end with."""

    kinds: Kinds[S]
    settings: Sequence[str]  # Of the runs
    expected: Mapping[str, Any]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as begun:
            begun.callback(self.stack.close)
            self.set_up()
            begun.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stack.close()

    @abstractmethod
    def set_up(self) -> None:
        """Make what runs need, and the undisturbed one."""

    @abstractmethod
    def begin(self, seed: str) -> S:
        """Start a run where nothing is left of the one before."""

    @abstractmethod
    def check(self, outcome: Outcome, scene: S) -> None:
        """Hold a run that has ended to what must be."""

    def outcomes(self, seed: int, count: int, kinds: Sequence[str] = ()) -> Iterator[Outcome]:
        """Do `count` faults, each kind as often as the others, in as many runs as that takes."""
        deck, runs = _deck(random.Random(seed), count, kinds or list(self.kinds)), 0
        while deck:
            yield self.run(f"{seed}.{runs}", deck)
            runs += 1

    def run(self, seed: str, deck: list[str]) -> Outcome:
        """Make one run, and do the faults of the deck to it until it ends."""
        scene = self.begin(seed)
        play = _Play(scene, self.kinds, seed, deck)
        try:
            outcome = play.to_the_end()
            self.check(outcome, scene)
        finally:
            play.repair_all()
            for command in scene.commands.values():
                if command.poll() is None:
                    command.terminate()
                    command.wait()
        return outcome

    def is_expected(self, model: Path) -> bool:
        """Tell whether a model's weights are the undisturbed run's, bit by bit."""
        with suppress(OSError):
            found = load_file(model / "model.safetensors")
            return found.keys() == self.expected.keys() and all(
                found[name].tobytes() == tensor.tobytes() for name, tensor in self.expected.items()
            )
        return False


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

    def __init__(self, scene: Scene, kinds: Kinds[Any], seed: str, deck: list[str]) -> None:
        self.scene, self.kinds, self.draw = scene, kinds, scene.draw
        self.deck, self.seed, self.began = deck, seed, time.monotonic()
        self.faults: list[Struck] = []
        self.sessions, self.stalled = 1, 0
        self.repairs: list[_Repair] = []

    def to_the_end(self) -> Outcome:
        """Do faults and give commands again until the run is over."""
        while self.sessions < SESSIONS:
            if self.faults and self.deck and self.draw.random() < AT_ONCE:
                self._for_a_while(self.draw.uniform(0, 10))
            else:
                self._until_it_moves()
            if self.scene.is_over():
                break
            if ended := self.scene.ended():
                self._again(ended)
            elif self.deck:
                self._strike()
        self.repair_all()
        seconds = round(self._now(), 1)
        return Outcome(self.seed, seconds, self.faults, self.sessions, stalled=self.stalled)

    def repair_all(self) -> None:
        while self.repairs:
            self._repair(due_only=False)

    def _now(self) -> float:
        return time.monotonic() - self.began

    def _strike(self) -> None:
        """Do the deck's next fault that finds something to hit."""
        for kind in list(self.deck):
            at_s = self._now()
            try:
                harm = self.kinds[kind](self.scene)
            except (Missed, LabError, psutil.Error, OSError):
                continue
            self.deck.remove(kind)
            after = None if harm.repair is None else self.draw.uniform(*harm.lasts_s)
            rounded = None if after is None else round(after, 1)
            self.faults.append(Struck(kind, harm.what, round(at_s, 1), rounded))
            print(f"  {self.seed} {at_s:6.1f} s: {kind}: {harm.what}", flush=True)
            if harm.repair is not None and after is not None:
                self.repairs.append(_Repair(harm.repair, self._now() + after))
            return
        self._for_a_while(0.5)

    def _for_a_while(self, seconds: float) -> None:
        end = self._now() + seconds
        while self._now() < end and self.scene.goes_on():
            self._repair()
            time.sleep(0.1)

    def _repair(self, due_only: bool = True) -> None:
        for repair in [r for r in self.repairs if self._now() > r.due_s or not due_only]:
            if repair.succeeds() or repair.tries == TRIES:
                self.repairs.remove(repair)
            else:
                repair.due_s = self._now() + 2.0

    def _until_it_moves(self) -> None:
        """Wait until what was hit is repaired and some order has got on, or a command ended."""
        before, since = self.scene.work(), self._now()
        while self.scene.goes_on():
            self._repair()
            if not self.repairs and self.scene.work() != before:
                break
            if self._now() - since > STALLED_S:  # give the rest of the campaign a chance
                self.stalled += 1
                for command in self.scene.commands.values():
                    command.kill()
                    command.wait()
                return
            time.sleep(0.1)
        for fault in self.faults if self.scene.goes_on() else []:
            if fault.moved_after_s is None:
                fault.moved_after_s = round(self._now() - fault.at_s, 1)
        if self.deck:
            self._for_a_while(self.draw.uniform(0, 5))  # somewhere in the order

    def _again(self, ended: Sequence[str]) -> None:
        """Repair what is broken and give the commands again, as who comes back after a while."""
        first = ended[0]
        last = (self.scene.said(first).strip().splitlines() or [""])[-1]
        if self.faults:
            self.faults[-1].exit_code = self.scene.commands[first].returncode
            self.faults[-1].said = last
        time.sleep(self.draw.uniform(0, AWAY_S))
        self.repair_all()
        self.sessions += 1
        for where in ended:
            self.scene.again(where)


def _deck(draw: random.Random, count: int, kinds: Sequence[str]) -> list[str]:
    deck: list[str] = []
    while len(deck) < count:
        deck += draw.sample(list(kinds), len(kinds))
    return deck[:count]


def by_name(*functions: Callable[[S], Harm]) -> dict[str, Callable[[S], Harm]]:
    """Return kinds of faults by their names, as one says them."""
    return {function.__name__.replace("_", " "): function for function in functions}


def program(words: Sequence[str]) -> str:
    """Return the name of a Flower program, whoever interprets or wraps it; empty if it is none."""
    names = [Path(word).name for word in words]
    return next((w for w in names if w.startswith(("flower-", "flwr-")) or w == FORK_SERVER), "")


def check_jobs(outcome: Outcome, cluster: Cluster, key: str) -> None:
    """Note the jobs of a run that were submitted twice, or are still there.

    Slurm is given time to end what was cancelled; what never goes is left behind.
    """
    completing = ("squeue", "-h", "-a", "-t", "COMPLETING", "-o", "%A")
    with suppress(LabError):
        cluster.until(lambda: not cluster.slurm(*completing), PATIENCE_S, "jobs' end")
    listed = cluster.slurm("squeue", "-h", "-a", "--states=all", "-o", "%j %T").split()
    jobs = list(zip(listed[::2], listed[1::2], strict=True))
    names = Counter(name for name, _ in jobs if name.startswith(key))
    outcome.twice += [name for name, times in names.items() if times > 1]
    alive = ("RUNNING", "PENDING", "SUSPENDED", "COMPLETING")
    outcome.left += [f"job {name}" for name, state in jobs if state in alive]


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return figures of a campaign, and every fault."""
    faults = [fault for outcome in outcomes for fault in outcome.faults]
    moved = [fault.moved_after_s for fault in faults if fault.moved_after_s is not None]
    kinds = Counter(fault.kind for fault in faults)
    return {
        "faults": len(faults),
        "runs": len(outcomes),
        "runs_without_a_flaw": sum(not outcome.flaws for outcome in outcomes),
        "moved_after_s": {"median": median(moved), "most": max(moved)} if moved else {},
        "kinds": dict(sorted(kinds.items())),
        "commands_that_ended": dict(Counter(f.kind for f in faults if f.exit_code is not None)),
        "each_run": [asdict(outcome) | {"flaws": outcome.flaws} for outcome in outcomes],
    }


def without_folders(command: str) -> str:
    """Shorten the paths in a command to their last part: records name no machine's folders."""
    return re.sub(r"/[^ =]*/", "", command)
