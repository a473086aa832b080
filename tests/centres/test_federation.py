"""Centres that share nothing train one model: `serve` at a host, `join` at two, over bad lines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lab.centres import Centres
from lab.place import TEMPLATES
from lab.remote import Host, Listener
from numpy.typing import NDArray
from safetensors.numpy import load_file
from worlds.runs.joined import DATA, PORT, SETTINGS, Joined
from worlds.runs.run import Run, trained_steps

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
STEPS, ROUNDS = 40, 2
LENGTH = [f"train.steps={STEPS}", f"rounds={ROUNDS}", "strategy=diloco"]

Tensors = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    """Return what the same training comes to on one host, by `run`."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "conf" / "facility").mkdir(parents=True)
    own = []
    for name, data in DATA.items():
        text = TEMPLATES.get_template("facility_local.yaml.j2").render(name=name)
        (folder / "conf" / "facility" / f"{name}.yaml").write_text(text)
        own.append(f"data.paths.{name}=[{data}]")
    where = [f"--config-dir={folder}/conf", f"+facility=[{','.join(DATA)}]"]
    run = Run(folder / "run", *where, *own, *LENGTH, settings=SETTINGS)
    assert run.end() == 0, run.said()
    tensors: Tensors = load_file(folder / "run" / "model" / "model.safetensors")
    return tensors


@pytest.fixture
def joined(centres: Centres, tmp_path: Path) -> Joined:
    """Return what is to be typed at three hosts whose lines are bad."""
    joined = Joined(centres, tmp_path, *LENGTH)
    for site in joined.sites:
        site.link.set(rate_mbit=20, rtt_ms=80, loss=0.01)
    return joined


def ends_like(joined: Joined, alone: Tensors) -> None:
    """Wait for the end; every order was trained once, and the weights are those of one host."""
    joined.end()
    for site in joined.sites:
        assert trained_steps(site.outside(f"/home/{site.user}")) == ROUNDS * STEPS
    found: Tensors = load_file(joined.path("model/model.safetensors"))
    assert found.keys() == alone.keys()
    for name, tensor in alone.items():
        assert np.array_equal(found[name], tensor), name
    for host in (joined.server, *joined.sites):  # who is killed takes a moment
        joined.until(lambda host=host: not living(host, "flwr"))  # type: ignore[misc]


def living(host: Host, word: str) -> list[str]:
    """Return the commands of a host's user that hold a word; one that has ended is none."""
    lines = host.run("ps", "-U", host.user, "-o", "stat=", "-o", "args=").splitlines()
    return [line for line in lines if word in line and not line.startswith("Z")]


def opened(host: Host, before: list[Listener]) -> list[Listener]:
    """Return what listens on a host in addition to what listened before."""
    return sorted(set(host.listening()) - set(before))


def test_the_same_weights_as_on_one_host(joined: Joined, alone: Tensors) -> None:
    """Protects the promise: one model over 20 Mbit/s, 80 ms and 1 % loss, bit by bit the same;
    and one open port, at the server."""
    hosts = [joined.server, *joined.sites]
    before = {host.name: host.listening() for host in hosts}
    joined.begin()
    joined.until(lambda: all(joined.orders(site) for site in joined.sites))
    server, *sites = (opened(host, before[host.name]) for host in hosts)
    assert [(entry.address, entry.port) for entry in server if entry.address != "127.0.0.1"] == [
        ("*", PORT)
    ]
    assert len(server) == 2  # the other one is the gate's, for processes of its user
    with_slurm, with_own_ranks = sites  # the second one is its own compute node, too
    assert [entry.address for entry in with_slurm] == ["127.0.0.1"]
    assert {entry.address for entry in with_own_ranks} == {"127.0.0.1"}
    ends_like(joined, alone)
