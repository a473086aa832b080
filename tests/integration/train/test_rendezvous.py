"""How ranks meet: torch's groups over values that only this job's ranks can read and write."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from worlds.train.torch_ranks import Team, start_team

from flwr_hpc.train.rendezvous import Group, RankStore, prove
from flwr_hpc.worker.lifeline import PeerLostError
from flwr_hpc.worker.meeting import SECRET_BYTES, Host, Values

SECRET = b"s" * SECRET_BYTES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("allocation")


@pytest.fixture(scope="module")
def team(folder: Path) -> Iterator[Team]:
    team = start_team(folder, 2)
    yield team
    team.close()
    assert [process.exitcode for process in team.processes] == [0, 0]


def _listening(group: Group) -> Any:
    connections = psutil.Process().net_connections("tcp")
    return group.broadcast([c.laddr.ip for c in connections if c.status == "LISTEN"])


def test_ranks_of_one_node_listen_on_its_loopback_interface_alone(team: Team) -> None:
    """Protects ranks from every other host: rank 0's values and gloo's listeners."""
    addresses = team.run(_listening)
    assert addresses
    assert set(addresses) == {"127.0.0.1"}


def test_the_secret_lies_in_a_file_of_its_owner(team: Team, folder: Path) -> None:
    """Protects the secret from other users of the shared file system."""
    (file,) = folder.glob("rendezvous-*.json")
    assert file.stat().st_mode & 0o777 == 0o600


def _meet_another(group: Group) -> str:
    """Let rank 1 be someone who does not know the secret."""
    secret = SECRET if group.ranks.rank == 0 else b"guessed"
    try:
        prove(group.control, group.ranks, secret, timeout_s=60)
    except PeerLostError as exc:
        return str(exc)
    return "believed"


def test_a_stranger_at_gloos_door_is_found_out(team: Team) -> None:
    """Protects ranks from unpickling what a stranger sends, who was faster than a rank."""
    assert "took the place of a rank" in team.run(_meet_another)


@pytest.fixture
def stores() -> list[Any]:
    """Return torch's own store and ours."""
    host = Host("127.0.0.1", SECRET)
    return [dist.HashStore(), RankStore(Values(host.address, SECRET), timeout_s=0.3)]


def test_values_are_kept_as_torch_keeps_them(stores: list[Any]) -> None:
    """Protects torch's groups: each question has the answer that torch's own store gives."""

    def ask(store: Any) -> list[Any]:
        store.set("a", "1")
        store.set("bytes", bytes(range(256)).decode("latin1"))
        store.append("a", "2")
        store.multi_set(["x", "y"], ["7", "8"])
        return [
            store.get("a"), store.get("bytes"), store.add("n", 3), store.add("n", -5),
            store.get("n"), store.add("a", 1), store.check(["a", "x"]), store.check(["a", "no"]),
            store.compare_set("new", "", "first"), store.compare_set("new", "other", "second"),
            store.compare_set("new", "first", "third"), store.compare_set("none", "some", "4"),
            store.check(["none"]), store.multi_get(["x", "y"]), store.delete_key("x"),
            store.delete_key("x"), store.wait(["a", "y"]), store.wait(["a"], timedelta(seconds=1)),
        ]  # fmt: skip

    for prefixed in (False, True):
        theirs, ours = (dist.PrefixStore("p", s) if prefixed else s for s in stores)
        assert ask(ours) == ask(theirs)
    theirs, ours = stores
    assert ours.num_keys() == theirs.num_keys()


def test_a_value_that_does_not_come_is_a_lost_peer(stores: list[Any]) -> None:
    """Protects the order: a rank that waits in vain, or whose rank 0 is gone, has lost a peer."""
    ours = stores[1]
    with pytest.raises(dist.DistStoreError, match="in vain for missing"):
        ours.get("missing")
    gone = RankStore(Values(("127.0.0.1", 1), SECRET), timeout_s=1)
    with pytest.raises(dist.DistNetworkError, match="rank 0 of this allocation is gone"):
        gone.set("a", "1")
