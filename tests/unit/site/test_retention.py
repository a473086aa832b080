"""What a site keeps on disk: what the server may still ask for, and what open orders need."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from worlds.site.world import Killed, World, order

from flwr_hpc.spool import retention
from flwr_hpc.spool.folders import RECEIVED, mark_received


def test_old_orders_and_weights_are_pruned(world: World) -> None:
    """Protects the facility's disk, and everything an unfinished order needs."""
    weights = [world.spool.weights(f"{k:064d}") for k in range(12)]
    weights[0].parent.mkdir(parents=True)
    correction = world.spool.weights(f"{99:064d}")
    for k in range(12):
        weights[k].write_bytes(b"w")
        os.utime(weights[k], (k, k))
        extra_arrays = {"correction": correction} if k == 1 else {}
        for path in extra_arrays.values():
            path.write_bytes(b"c")
            os.utime(path, (0, 0))
        world.site.submit(order(k), weights[k], extra_arrays)
        os.utime(world.spool.order(order(k).id).path / "order.json", (k, k))
        if k != 1:
            world.done(order(k))
    world.site.submit(order(11), None)
    left = sorted(p.name for p in (world.spool.root / "orders").iterdir())
    assert left == [order(k).id for k in (1, 8, 9, 10, 11)]
    assert world.alloc(0).inbox() == left
    assert [w for w in weights if w.exists()] == [weights[k] for k in (1, 8, 9, 10, 11)]
    assert world.spool.order(order(1).id).extra_arrays() == {"correction": correction}
    assert correction.exists()


def settle(world: World, seq: int, settled: int) -> str:
    """Submit an order as the server does that needs none below `settled`; return its state."""
    weights = world.spool.weights(f"{seq:064d}")
    weights.parent.mkdir(parents=True, exist_ok=True)
    weights.write_bytes(b"w")
    return world.site.submit(replace(order(seq), settled=settled), weights).state


def left(world: World) -> tuple[list[str], list[str]]:
    orders = sorted(folder.id for folder in world.spool.orders())
    return orders, sorted(path.stem for path in world.spool.received_weights())


def test_what_the_server_has_taken_is_deleted(world: World) -> None:
    """Protects the facility's disk: of ten orders one is left, two where one waits for another."""
    for seq in range(10):
        settle(world, seq, settled=seq)
        assert left(world) == ([order(seq).id], [f"{seq:064d}"])
        world.done(order(seq))
    settle(world, 10, settled=9)
    assert left(world) == ([order(9).id, order(10).id], [f"{9:064d}", f"{10:064d}"])
    assert world.alloc(0).inbox() == [order(9).id, order(10).id]
    assert world.site.collect(order(9).id).state == "done"  # it may be asked for again


def test_a_settled_order_is_not_worked_on_again(world: World) -> None:
    """Protects from training twice by a message that was under way while its order was answered."""
    settle(world, 0, settled=0)
    world.done(order(0))
    settle(world, 1, settled=1)
    assert settle(world, 0, settled=0) == "failed"
    assert world.alloc(0).inbox() == [order(1).id]


def test_weights_of_an_order_that_is_not_written_yet_are_kept(world: World) -> None:
    """Protects what one message has just received while another's order is written."""
    settle(world, 0, settled=0)
    world.done(order(0))
    arriving = world.spool.weights(f"{7:064d}")
    arriving.write_bytes(b"w")
    newest = world.spool.order(order(0).id).published_ns
    os.utime(arriving, (0, 0))  # a link to what was written long ago
    mark_received(arriving)
    os.utime(arriving.with_suffix(RECEIVED), ns=(newest + 1, newest + 1))
    retention.prune(world.spool)
    assert arriving.exists()
    os.utime(arriving.with_suffix(RECEIVED), ns=(newest - 1, newest - 1))
    retention.prune(world.spool)
    assert arriving not in arriving.parent.iterdir()
    assert not arriving.with_suffix(RECEIVED).exists()


@pytest.mark.parametrize("moment", range(8))
def test_killed_while_it_deletes(
    world: World, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Protects what is still needed, and the quota, from a launcher that is killed anywhere."""
    settle(world, 0, settled=0)
    world.done(order(0))
    calls = itertools.count()

    def kill_at(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == moment:
                raise Killed
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(Path, "unlink", kill_at(Path.unlink))
        patch.setattr("shutil.rmtree", kill_at(shutil.rmtree))
        settle(world, 1, settled=1)
    world.restart()
    assert settle(world, 1, settled=1) in ("queued", "running", "starting")
    assert left(world) == ([order(1).id], [f"{1:064d}"])
    assert world.alloc(0).inbox() == [order(1).id]


def test_an_ended_run_leaves_its_last_checkpoint(world: World) -> None:
    """Protects the facility's disk after the run, and a run that is resumed with more rounds."""
    settle(world, 0, settled=0)
    world.done(order(0))
    settle(world, 1, settled=1)
    for seq, step in ((0, 4), (9, 8), (1, 12)):
        world.saved(order(seq), step)
    trained = world.spool.order(order(1).id).weights
    trained.write_bytes(b"t")
    drafts = [
        path.with_name(f".{path.name}.0a1b.tmp") for path in (trained, world.spool.weights("1"))
    ]
    for path in drafts:
        path.write_bytes(b"d")
    half = world.spool.checkpoints / ".run-fac-000001@0000000016.a0000.tmp"
    half.mkdir()
    retention.clear(world.spool)
    assert world.spool.received_weights() == []
    assert not any(path.exists() for path in (trained, *drafts))
    assert [p.name for p in world.spool.checkpoints.iterdir()] == ["run-fac-000001@0000000012"]
    assert settle(world, 2, settled=2) == "queued"
