"""How every strategy is run: ours drive the loop themselves, all others by Flower's hooks."""

from __future__ import annotations

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from strategies.engine.engine import Engine
from strategies.engine.flower.hooks import FlowerHooks
from strategies.engine.loop import Driver, EvaluateFn, EventLoop, History
from strategies.engine.runtime import Runtime


def run_strategy(
    strategy: Strategy,
    grid: Grid,
    initial_arrays: ArrayRecord,
    num_rounds: int = 3,
    *,
    train_config: ConfigRecord | None = None,
    evaluate_config: ConfigRecord | None = None,
    evaluate_fn: EvaluateFn | None = None,
    timeout: float | None = None,
    runtime: Runtime | None = None,
    engine: Engine | None = None,
) -> Result:
    """Run any strategy from its last checkpoint, or from the start.

    Parameters
    ----------
    strategy : Strategy
        Ours, Flower's or a user's. The hooks ``configure_*`` and ``aggregate_*`` are called as by
        Flower's own ``start``; ``steps`` in the train config becomes the order's steps.
    grid, initial_arrays, num_rounds, train_config, evaluate_config, evaluate_fn :
        As of ``Strategy.start``. After a resume the initial arrays are not used.
    timeout : float or None
        Seconds after which a round aggregates what has arrived; default:
        ``Settings.round_deadline_s``.
    runtime, engine :
        Default: plain Flower surroundings, and an engine that is released at the end.

    Raises
    ------
    RunFailed
        If the run cannot go on, or no version came of it.
    """
    runtime = runtime or Runtime()
    used = engine or Engine(grid, runtime)
    history = History(evaluate_fn)
    driver: Driver
    if isinstance(strategy, Driver):
        driver = strategy
    else:
        driver = FlowerHooks(strategy, grid, evaluate_config or ConfigRecord(), history, timeout)
    driver.configure(train_config or ConfigRecord())
    loop = EventLoop(driver, used, history, type(strategy).__name__)
    try:
        loop.begin(initial_arrays, num_rounds)
        return loop.run()
    finally:
        if engine is None:
            used.release()
