"""Where replies are fetched and checked: beside the loop, or, where time is virtual, within it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


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


def _run(future: Future[T], fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> None:
    try:
        future.set_result(fn(*args, **kwargs))
    except Exception as exc:
        future.set_exception(exc)
