"""Where replies are fetched and checked: beside the loop, or, where time is virtual, within it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")


class Inline(Executor):
    """Runs a task as it is submitted."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        _run(future, fn, *args, **kwargs)
        return future


class DaemonThreads(Executor):
    """Runs every task in a thread of its own.

    A server has a task per site. One that hangs, as on a file system that is gone, neither takes
    another's place nor keeps the process from ending, as the threads of a pool would.
    """

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        target = lambda: _run(future, fn, *args, **kwargs)  # noqa: E731
        threading.Thread(target=target, name="exchange", daemon=True).start()
        return future


def in_threads(
    work: Callable[[T], R],
    items: Sequence[T],
    most: int,
    on_failure: Callable[[], object] = lambda: None,
) -> list[R]:
    """Do a piece of work for each item, a few at once; return what came of each.

    Raises what fails first, once the others under way have ended: `on_failure` may hurry them.
    None is begun after it.
    """
    if min(most, len(items)) < 2:
        return [work(item) for item in items]
    done: dict[int, R] = {}
    failed: list[Exception] = []
    waiting, lock = iter(enumerate(items)), threading.Lock()

    def take_turns() -> None:
        while not failed:
            with lock:
                turn = next(waiting, None)
            if turn is None:
                return
            try:
                done[turn[0]] = work(turn[1])
            except Exception as exc:
                failed.append(exc)
                on_failure()

    threads = DaemonThreads()
    for thread in [threads.submit(take_turns) for _ in range(min(most, len(items)))]:
        thread.result()
    try:
        if failed:
            raise failed[0]
    finally:
        failed.clear()  # else it and its traceback, with all that hangs on it, are a cycle
    return [done[i] for i in range(len(items))]


def _run(future: Future[T], fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> None:
    try:
        future.set_result(fn(*args, **kwargs))
    except Exception as exc:
        future.set_exception(exc)
    finally:
        del future  # else it, the error and this frame of its traceback are a cycle
