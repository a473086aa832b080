"""Several ranks call the app together, as under torchrun; rank 0 leads, through files.

In `AllocationDir.turn` rank 0 says which message it is and where it listens, and in
`OrderDir.rank_outcome` rank k leaves a `Failure` or None when it is through.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

from flwr_hpc.batch_mod.carry import Failure, load, save
from flwr_hpc.batch_mod.job_settings import JobSettings
from flwr_hpc.batch_mod.process import AppProcess, Stopped
from flwr_hpc.files import publish, read_json
from flwr_hpc.spool import AllocationDir, OrderDir
from flwr_hpc.worker.ranks import Ranks

LOOK_S = 0.1


@dataclass(frozen=True)
class Turn:
    """What rank 0 wants of the others."""

    attempt: str  # The start of the job this belongs to
    generation: int = 0  # Counts the processes of the app; all ranks replace theirs together
    host: str = ""
    port: int = 0
    number: int = 0  # Counts the messages
    order: str = ""  # Id of the message's order; empty: none
    ended: bool = False


class RankGroup:
    """Rank 0's side.

    Parameters
    ----------
    allocation : AllocationDir
    ranks : Ranks
    """

    def __init__(self, allocation: AllocationDir, ranks: Ranks) -> None:
        self._file, self._ranks = allocation.turn, ranks
        self._turn = Turn(ranks.attempt)

    def renew(self) -> dict[str, str]:
        """Let every rank start a new process of the app; return the environment of rank 0's."""
        if self._ranks.world_size == 1:
            return {}
        host = "127.0.0.1" if self._ranks.nodes == 1 else socket.gethostname()
        self._say(generation=self._turn.generation + 1, host=host, port=_free_port(), order="")
        return _env(self._ranks, self._turn)

    def call(self, order_id: str) -> None:
        """Let every rank give this message to the app."""
        self._say(number=self._turn.number + 1, order=order_id)

    def failure(self, order: OrderDir) -> Failure | None:
        """Return what went wrong on another rank, so far."""
        answers = (order.rank_outcome(k, self._ranks.attempt) for k in self._others())
        failures = (load(path) for path in answers if path.exists())
        return next((f for f in failures if f is not None), None)

    def wait(self, order: OrderDir, stop: Callable[[], bool]) -> Failure | None:
        """Wait until all ranks are through, or one failed.

        Raises
        ------
        Stopped
            If `stop` said so.
        """
        while (failure := self.failure(order)) is None:
            answers = (order.rank_outcome(k, self._ranks.attempt) for k in self._others())
            if all(path.exists() for path in answers):
                return None
            if stop():
                raise Stopped
            time.sleep(LOOK_S)
        return failure

    def end(self) -> None:
        """Let the other ranks leave."""
        self._say(ended=True)

    def _others(self) -> range:
        return range(1, self._ranks.world_size)

    def _say(self, **news: object) -> None:
        self._turn = Turn(**{**asdict(self._turn), **news})
        if self._ranks.world_size > 1:
            publish(self._file, json.dumps(asdict(self._turn)))


def follow(
    allocation: AllocationDir,
    ranks: Ranks,
    settings: JobSettings,
    stop: Callable[[], bool],
) -> None:
    """Be a rank other than 0: give the app every message that rank 0 gives it, until it ends."""
    spool = allocation.spool
    process: AppProcess | None = None
    done = Turn("")
    try:
        while not stop() and not (turn := _turn(allocation, ranks)).ended:
            if turn.generation > done.generation:
                if process is not None:
                    process.end()
                process = AppProcess(settings.app, settings.versions, _env(ranks, turn))
            if turn.number > done.number and turn.order and process is not None:
                over = partial(_over, allocation, ranks, turn, stop)
                _take_part(process, spool.order(turn.order), ranks, over)
            done = turn
            time.sleep(LOOK_S)
    finally:
        if process is not None:
            process.end()


def _take_part(
    process: AppProcess, order: OrderDir, ranks: Ranks, over: Callable[[], bool]
) -> None:
    while not order.request.exists():  # other nodes may see files later
        if over():
            return
        time.sleep(LOOK_S)
    try:
        failure = process.call(order.request, None, over)
    except Stopped:
        return
    save(order.rank_outcome(ranks.rank, ranks.attempt), failure)


def _over(allocation: AllocationDir, ranks: Ranks, seen: Turn, stop: Callable[[], bool]) -> bool:
    """Whether rank 0 has gone on, because a rank failed or it is time to end."""
    return stop() or _turn(allocation, ranks) != seen


def _turn(allocation: AllocationDir, ranks: Ranks) -> Turn:
    raw = read_json(allocation.turn)
    if raw is None or raw["attempt"] != ranks.attempt:
        return Turn(ranks.attempt)
    return Turn(**raw)


def _env(ranks: Ranks, turn: Turn) -> dict[str, str]:
    """Return what torchrun would set."""
    return {
        "RANK": str(ranks.rank),
        "WORLD_SIZE": str(ranks.world_size),
        "LOCAL_RANK": str(ranks.local_rank),
        "LOCAL_WORLD_SIZE": str(ranks.local_world_size),
        "MASTER_ADDR": turn.host,
        "MASTER_PORT": str(turn.port),
    }


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])
