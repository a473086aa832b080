"""What a site keeps on disk: what the server may still ask for, and what open orders need."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict
from safetensors.numpy import save_file
from worlds.site.world import Killed, World, order

from flwr_hpc.exchange.client import SiteExchange
from flwr_hpc.exchange.codec import make_codec
from flwr_hpc.exchange.store import PREFIX, make_store
from flwr_hpc.exchange.tensorfile import TensorFile, sha256_of
from flwr_hpc.protocol import ARRAYS
from flwr_hpc.site import client_app
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


def test_what_is_settled_goes_before_more_is_received(world: World) -> None:
    """Protects the facility's disk from holding an order's weights, and the next one's, at once;
    and what the coming order is an update of."""
    for seq in range(2):
        settle(world, seq, settled=0)
    world.done(order(0))
    trained = [world.spool.order(order(seq).id).weights for seq in range(2)]
    for path in trained:
        path.write_bytes(b"t")
    coming, received = replace(order(2), settled=1), world.spool.received_weights()
    retention.make_room(world.spool, coming, {received[0]})
    assert [path.exists() for path in (*trained, *received)] == [False, True, True, True]
    retention.make_room(world.spool, replace(coming, run_key="another"))
    assert all(path.exists() for path in received)
    retention.make_room(world.spool, coming)
    assert [path.exists() for path in received] == [False, True]
    assert world.site.collect(order(0).id).state == "done"  # until the next one is published


def test_a_message_brings_weights_in_the_place_of_settled_ones(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the disk as a message comes, and what its weights are an update of."""
    store, codec = make_store(f"{tmp_path}/store"), make_codec("int8")
    launcher: Any = SimpleNamespace(
        site=world.site, exchange=SiteExchange(store, codec, 0.0, downlink=codec)
    )
    there, get = list[set[str]](), type(store).get

    def watched(*args: Any, **kwargs: Any) -> None:
        there.append({path.name for path in world.spool.received_weights()})
        get(*args, **kwargs)

    monkeypatch.setattr(type(store), "get", watched)
    base, files = "", list[str]()
    for seq in range(3):
        path = tmp_path / f"{seq}.safetensors"
        if base:
            before = TensorFile(world.spool.weights(base))
            sha256 = codec.encode(before, path, before)
        else:
            save_file({"w": np.full(8, seq, np.float32)}, path)
            sha256 = sha256_of(path)
        ref = replace(store.put(path, "global", sha256), base=base)
        content = RecordDict({f"{PREFIX}{ARRAYS}": ref.to_record()})
        message: Any = SimpleNamespace(content=content)
        status = client_app._submit(message, replace(order(seq), settled=seq), launcher)
        assert status.state == "queued"
        world.done(order(seq))
        world.spool.order(order(seq).id).weights.write_bytes(b"t")
        base = ref.version
        files.append(world.spool.weights(base).name)
    assert there == [set(), {files[0]}, {files[1]}]


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
