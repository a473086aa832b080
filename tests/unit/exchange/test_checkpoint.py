"""The server's checkpoints: any moment may be the last."""

from __future__ import annotations

import builtins
import os
import weakref

import numpy as np
import pytest

from flwr_hpc.exchange import checkpoint
from flwr_hpc.exchange.checkpoint import FileCheckpoints
from flwr_hpc.exchange.records import LazyArray, source_of
from flwr_hpc.exchange.tensorfile import sha256_of


def test_an_array_that_is_used_again_keeps_what_it_was(tmp_path):
    """Protects weights from a formula that computes one tensor after the other in one place."""
    place = np.zeros(3, np.float32)

    def counted():
        for i in range(3):
            place[:] = i
            yield f"w{i}", place

    record = FileCheckpoints(tmp_path).put("model", counted())
    assert [record[f"w{i}"].numpy().tolist() for i in range(3)] == [[i] * 3 for i in range(3)]


class Killed(BaseException):
    """Stands for kill -9."""


class Bomb:
    """Lets so many file operations through; from then on the process is dead."""

    def __init__(self, monkeypatch, fuse):
        self.left = fuse
        for module, name in [
            (builtins, "open"),
            (os, "open"),
            (os, "fsync"),
            (os, "replace"),
            (os, "rename"),
            (os, "unlink"),
            (os, "mkdir"),
        ]:
            monkeypatch.setattr(module, name, self.guard(getattr(module, name)))

    def guard(self, operation):
        def guarded(*args, **kwargs):
            if self.left <= 0:
                raise Killed
            self.left -= 1
            return operation(*args, **kwargs)

        return guarded


def sets(version):
    return {
        "global": [("w", np.full(3, version, np.float32)), ("n", np.array([version]))],
        "momentum": [("w", np.full(3, -version, np.float32))],
    }


def advance(checkpoints, version):
    for name, tensors in sets(version).items():
        checkpoints.put(name, iter(tensors))
    checkpoints.commit({"version": version, "tensors": ["global", "momentum"]})


def assert_whole(folder):
    """Return the version found, after looking at all of it."""
    checkpoints = FileCheckpoints(folder)
    state = checkpoints.restore()
    if state is None:
        return 0
    for name, tensors in sets(state["version"]).items():
        found = checkpoints.get(name)
        assert set(found) == {n for n, _ in tensors}
        for n, values in tensors:
            np.testing.assert_array_equal(found[n].numpy(), values)
    return state["version"]


def test_what_is_committed_is_restored(tmp_path):
    """State and tensors come back in a new process, as lazy records."""
    assert FileCheckpoints(tmp_path / "c").restore() is None
    advance(FileCheckpoints(tmp_path / "c"), 1)
    assert assert_whole(tmp_path / "c") == 1
    record = FileCheckpoints(tmp_path / "c").get("global")
    assert all(isinstance(array, LazyArray) for array in record.values())


def test_a_kill_at_any_file_operation_leaves_the_old_or_the_new_state(tmp_path, monkeypatch):
    """No moment exists at which the state is torn, and the next session can go on from it."""
    folder = tmp_path / "c"
    advance(FileCheckpoints(folder), 1)
    versions = []
    for fuse in range(1000):
        checkpoints = FileCheckpoints(folder)
        old = checkpoints.restore()["version"]
        with monkeypatch.context() as patch:
            bomb = Bomb(patch, fuse)
            try:
                advance(checkpoints, old + 1)
            except Killed:
                survived = False
            else:
                survived = True
        versions.append(assert_whole(folder) - old)
        assert versions[-1] in (0, 1)
        if survived:
            break
    assert bomb.left >= 0
    assert survived
    assert fuse > 20
    assert 0 in versions
    assert 1 in versions[:-1]  # killed after the new state was in place
    assert versions[-1] == 1
    assert len(list(folder.iterdir())) == 3  # remains of the killed are gone


def test_a_first_session_killed_at_any_point_starts_afresh(tmp_path, monkeypatch):
    """Half a first checkpoint is none."""
    for fuse in range(12):
        folder = tmp_path / str(fuse)
        with monkeypatch.context() as patch:
            Bomb(patch, fuse)
            with pytest.raises(Killed):
                advance(FileCheckpoints(folder), 1)
        assert assert_whole(folder) == 0


def test_sets_that_are_not_named_go_and_their_readers_stay(tmp_path):
    """Disk holds what the state needs; a strategy may still use an older version."""
    checkpoints = FileCheckpoints(tmp_path)
    old = checkpoints.put("v1", [("w", np.ones(3))])
    checkpoints.commit({"tensors": ["v1"]})
    checkpoints.put("v2", [("w", np.zeros(3))])
    checkpoints.commit({"tensors": ["v2"]})
    assert len(list(tmp_path.iterdir())) == 2
    np.testing.assert_array_equal(old["w"].numpy(), np.ones(3))
    with pytest.raises(KeyError):
        checkpoints.get("v1")
    with pytest.raises(KeyError):
        checkpoints.commit({"tensors": ["v1"]})


def test_a_name_put_again_changes_nothing_until_the_commit(tmp_path):
    """A strategy may call every version by the same name."""
    checkpoints = FileCheckpoints(tmp_path)
    advance(checkpoints, 1)
    for name, tensors in sets(2).items():
        checkpoints.put(name, tensors)
    assert assert_whole(tmp_path) == 1
    np.testing.assert_array_equal(checkpoints.get("global")["w"].numpy(), np.full(3, 2))


def test_a_new_set_may_be_made_from_the_one_it_replaces(tmp_path):
    """Rules read the old weights lazily while the new ones are written."""
    checkpoints = FileCheckpoints(tmp_path)
    record = checkpoints.put("w", [("w", np.ones(3))])
    checkpoints.commit({"tensors": ["w"]})
    for _ in range(3):
        record = checkpoints.put("w", ((n, a.numpy() * 2) for n, a in record.items()))
        checkpoints.commit({"tensors": ["w"]})
    np.testing.assert_array_equal(record["w"].numpy(), np.full(3, 8.0))


@pytest.mark.parametrize("name", ["../x", "", ".x", "a/b"])
def test_names_that_are_no_file_names_are_refused(tmp_path, name):
    """Names become file names."""
    with pytest.raises(ValueError, match="may hold"):
        FileCheckpoints(tmp_path).put(name, [])


class Computed:
    """An array that is there block by block."""

    shape, dtype = (2, 3), np.dtype(np.float32)

    def __iter__(self):
        yield from (np.full(4, 7, np.float32), np.full(2, 8, np.float32))


def test_what_is_computed_is_written_once(tmp_path, monkeypatch):
    """Protects disk and memory: with all shapes known, one pass, hashed on the way."""
    monkeypatch.setattr(checkpoint, "write_stream", None)
    record = FileCheckpoints(tmp_path).put("w", iter([("a", Computed()), ("b", np.int64(5))]))
    np.testing.assert_array_equal(record["a"].numpy(), [[7, 7, 7], [7, 8, 8]])
    assert int(record["b"].numpy()) == 5
    (path,) = tmp_path.iterdir()
    assert source_of(record)._sha256 == sha256_of(path)


def test_what_is_in_memory_is_written_as_it_comes(tmp_path):
    """Protects memory from a strategy that yields whole tensors: they are not gathered."""
    alive = []

    def tensors():
        for n in range(20):
            tensor = np.full(10, n, np.float32)
            alive.append(weakref.ref(tensor))
            assert sum(ref() is not None for ref in alive) <= 5
            yield f"w{n}", tensor
            del tensor

    record = FileCheckpoints(tmp_path, memory=100).put("w", tensors())
    assert [float(record[f"w{n}"].numpy()[9]) for n in range(20)] == list(range(20))
