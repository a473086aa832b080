"""kill -9 of every part of a run, in the middle of an order."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from worlds.jobs import send
from worlds.runs.run import ONE_SITE, Run, kill

FACILITIES = ("local_a", "local_b")


def _assert_as_undisturbed(run: Run, undisturbed: Run) -> None:
    """The model is the one an undisturbed run ends with, and every order was trained once."""
    ours = load_file(run.dir / "model" / "model.safetensors")
    theirs = load_file(undisturbed.dir / "model" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor, theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)
    for facility in FACILITIES:
        assert run.summary()["facilities"][facility]["steps"] == 300
    assert run.left_behind() == []


def _allocations(run: Run, facility: str) -> int:
    return len(list((run.dir / "facilities" / facility / "allocations").iterdir()))


def test_a_supernode_and_a_rank(tmp_path: Path, undisturbed: Run) -> None:
    """Protects orders: a restarted SuperNode finds its own by the facility; that of a job that
    dies is ended by another allocation, from the checkpoint."""
    run = Run(tmp_path / "run")
    run.until_training("local_b")
    kill(run.until(lambda: run.find("flower-supernode", f"{run.dir}/flower/site-local_b"))[0].pid)
    run.until_training(version=1)
    kill(max(r.pid for r in run.until(lambda: run.ranks("local_a"))))
    assert run.end() == 0, run.said()
    assert [_allocations(run, f) for f in FACILITIES] == [2, 1]
    _assert_as_undisturbed(run, undisturbed)


def test_the_client_apps_and_the_server_app(tmp_path: Path, undisturbed: Run) -> None:
    """Protects orders whose ClientApp dies: their jobs are found again; and a run whose ServerApp
    dies: it goes on from the last aggregation by itself."""
    run = Run(tmp_path / "run")
    run.until_training()
    run.until(lambda: send(signal.SIGKILL, run.children("flwr-clientapp")))
    run.until_training(version=1)
    kill(run.server_pid())
    assert run.end() == 0, run.said()
    assert [_allocations(run, f) for f in FACILITIES] == [1, 1]
    _assert_as_undisturbed(run, undisturbed)


def test_the_superlink_and_the_driver(tmp_path: Path, undisturbed: Run) -> None:
    """Protects a run whose SuperLink dies: it goes on in a new Flower run; and one whose driver
    dies: its processes end, its jobs live, and `resume=` finds them."""
    run = Run(tmp_path / "run")
    run.until_training()
    kill(run.children("flower-superlink")[0].pid)
    run.until_training(version=1)
    kill(run.process.pid)
    assert run.end() == -signal.SIGKILL
    again = Run(tmp_path / "run", resume=True)
    assert again.end() == 0, again.said()
    assert [_allocations(again, f) for f in FACILITIES] == [1, 1]
    _assert_as_undisturbed(again, undisturbed)


def test_a_corrupt_reply_is_refused(tmp_path: Path) -> None:
    """Protects the model: weights spoilt at a site are refused, asked for again, counted."""
    run = Run(tmp_path / "run", "federation.retries=0", settings=ONE_SITE)
    order = run.until_training()
    folder = run.dir / "facilities" / "local_a" / "orders" / order
    for rank in run.ranks("local_a"):  # so that the result is ours to spoil
        rank.suspend()
    spoil(folder)
    run.until(lambda: run.events("order_rejected"))  # else the worker's may come first
    for rank in run.ranks("local_a"):
        rank.resume()
    assert run.end() == 0, run.said()
    assert run.summary()["facilities"]["local_a"]["rejected"] >= 1


def spoil(folder: Path) -> None:
    """Publish a result with NaNs in the order's folder before the worker does."""
    from flwr_hpc.exchange.tensorfile import sha256_of, write_stream
    from flwr_hpc.protocol import Result
    from flwr_hpc.spool import OrderDir

    order = OrderDir(folder)
    _, weights = order.order()
    assert weights is not None
    tensors = load_file(weights)
    bad = [(name, np.full_like(t, np.nan)) for name, t in tensors.items()]
    write_stream(order.weights, bad)
    metrics = {"train_loss": 1.0}
    order.write_result(
        Result(
            order_id=folder.name,
            state="done",
            steps=1,
            tokens=1,
            examples=1,
            metrics=metrics,
            weights=order.weights.name,
            sha256=sha256_of(order.weights),
        )
    )
