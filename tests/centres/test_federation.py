"""Centres that share nothing train one model: `serve` at a host, `join` at three."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from lab.centres import Centres
from lab.host import LabError
from lab.place import STRANGER
from lab.remote import Listener
from worlds.hosts.pbs import bring_pbs
from worlds.hosts.stranger import open_to_others
from worlds.hosts.visitors import (
    EVERYTHING,
    LOOPBACK,
    PRIVATE,
    PUBLIC,
    Address,
    Opened,
    Requests,
    knock,
)
from worlds.runs.across import DATA, Tensors, on_one_host
from worlds.runs.joined import PORT, Joined

from flwr_hpc.config.invitation import Invitation, read_invitation
from flwr_hpc.gate.certificate import new_certificate

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
STEPS, ROUNDS = 80, 3
SETTINGS = (f"train.steps={STEPS}", f"rounds={ROUNDS}", "strategy=diloco")
PROTOBUF = {"content-type": "application/protobuf"}  # else Flower looks no further
PAYLOAD = f"{'b' * 64}.payload"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    """Return what the same training comes to on one host."""
    return on_one_host(tmp_path_factory.mktemp("alone"), *SETTINGS, sites=tuple(DATA))


@pytest.fixture
def joined(three_centres: Centres, tmp_path: Path) -> Joined:
    """Return what is to be typed at four hosts whose lines are bad: Slurm, own ranks, PBS."""
    bring_pbs(three_centres["centre_c"])
    joined = Joined(three_centres, tmp_path, *SETTINGS)
    for site in joined.sites:
        site.link.set(rate_mbit=20, rtt_ms=80, loss=0.01)
    return joined


def test_reboots_and_strangers_change_no_bit(joined: Joined, alone: Tensors) -> None:
    """Protects the promise: one model over 20 Mbit/s, 80 ms and 1 % loss, bit by bit that of one
    host, also when the server's and the sites' hosts are rebooted, whoever else is on them."""
    opened = Opened([joined.server, *joined.sites])
    with_slurm, with_own_ranks, with_pbs = joined.sites
    joined.serve()
    joined.deliver()
    for site in (with_slurm, with_own_ranks):
        joined.join(site)
    started = {with_slurm.name, with_own_ranks.name}
    joined.until(lambda: {e["facility"] for e in joined.events("supernode_started")} == started)
    # The run waits for the third site, however long it takes.
    _check_strangers(joined, opened.now())
    _check_credentials(joined)
    _check_certificate(joined)
    joined.join(with_pbs)
    joined.until(lambda: all(0 in joined.orders(site) for site in joined.sites))
    _check_ports(opened.now())
    joined.reboot(joined.server)
    joined.resume()
    joined.until(lambda: 1 in joined.orders(with_slurm))
    joined.reboot(with_slurm)  # its job goes on, on another node
    joined.join(with_slurm)
    joined.until(lambda: 2 in joined.orders(with_own_ranks))
    joined.reboot(with_own_ranks)  # its job has ended, too
    joined.join(with_own_ranks)
    joined.ends_like(alone, ROUNDS * STEPS)
    _check_files(joined)
    assert [len(joined.allocations(site)) for site in joined.sites] == [1, 2, 1]
    done = [event["order_id"] for event in joined.events("order_done")]
    assert len(done) == len(set(done))


def _check_ports(opened: dict[str, set[Listener]]) -> None:
    """Hold what listens to the documentation: one port for the world, at the server."""
    server, with_slurm, with_own_ranks, with_pbs = opened.values()
    assert [(e.address, e.port) for e in server if e.address != LOOPBACK] == [("*", PORT)]
    assert len(server) == 2  # the other one is the gate's, for processes of its user
    assert [entry.address for entry in with_slurm] == [LOOPBACK]
    for site in (with_own_ranks, with_pbs):  # they are their own compute nodes, too
        assert {entry.address for entry in site} == {LOOPBACK}


def _check_strangers(joined: Joined, opened: dict[str, set[Listener]]) -> None:
    """Come with what opens nothing: as another user of each host, and from another host."""
    server, elsewhere = joined.server, joined.sites[1]
    outside: Address = ("https", server.address, PORT)
    for host in (server, elsewhere):
        assert knock(host, outside, EVERYTHING) == PUBLIC
    for host, scheme in ((server, "https"), (joined.sites[0], "http")):
        (port,) = (entry.port for entry in opened[host.name] if entry.address == LOOPBACK)
        assert knock(host, (scheme, LOOPBACK, port), EVERYTHING) == PRIVATE
        # Nor does its address lead there from elsewhere.
        assert knock(elsewhere, (scheme, host.address, port), EVERYTHING[:1], wait_s=3.0) == [0]


def _check_files(joined: Joined) -> None:
    """Look into what others on a host could read."""
    for host, folder in (
        (joined.server, joined.run_dir),
        *((s, joined.home(s)) for s in joined.sites),
    ):
        assert open_to_others(host.outside(folder)) == {}
        with pytest.raises(LabError, match="Permission denied"):
            host.run("ls", folder, user=STRANGER)
    letter = joined.path(f"invitations/{joined.sites[0].name}.json")
    assert letter.stat().st_mode & 0o777 == 0o600


def _check_credentials(joined: Joined) -> None:
    """Show what belongs to another site, or no longer to anybody, from another centre's host."""
    server, (first, second, _) = joined.server, joined.sites
    mine = _letter(joined, second.name)
    credentials = json.loads(joined.path("invitations/credentials.json").read_text())
    theirs = f"/v1/exchange/node-{credentials[first.name]['node_id']}/{PAYLOAD}"
    key = base64.b64encode(credentials[first.name]["public_key"].encode()).decode()
    asked: Requests = [
        ("GET", "/v1/join", _bearer(mine)),  # so that the others could succeed
        *((method, theirs, _bearer(mine)) for method in ("GET", "PUT", "DELETE")),
        # In the other's name, whose key it does not have, and as nobody that was invited.
        ("POST", "/v1/fleet/pull-messages", {"flwr-public-key": key, **PROTOBUF}),
        ("POST", "/v1/fleet/pull-messages", {"flwr-public-key": base64.b64encode(b"me").decode()}),
    ]
    outside: Address = ("https", server.address, PORT)
    joined_as, *others, as_first, as_nobody = knock(second, outside, asked, user=second.user)
    assert (joined_as, others, as_nobody) == (200, [404] * 3, 401)
    assert as_first in (401, 403)  # by Flower

    def invited(action: str) -> Invitation:
        _serve(joined, action)
        return _letter(joined, "guest")

    old, new = invited("invite"), invited("invite")
    asks: Requests = [("GET", "/v1/join", _bearer(letter)) for letter in (old, new)]
    assert knock(second, outside, asks) == [401, 200]
    _serve(joined, "revoke")
    assert knock(second, outside, asks) == [401, 401]


def _check_certificate(joined: Joined) -> None:
    """Join whoever answers with another certificate."""
    host = joined.sites[1]
    pem, _ = new_certificate(joined.server.name)
    wrong = replace(_letter(joined, host.name), certificate=pem)
    host.write(f"/home/{host.user}/wrong.json", json.dumps(asdict(wrong)))
    words = ("--config-dir=conf", f"+facility={host.name}", "data.paths=[json]", "site.dir=wrong")
    with pytest.raises(LabError, match=r"(?s)exit code 2: .*another certificate"):
        host.run("python", "-m", "flwr_hpc.join", "wrong.json", *words)


def _serve(joined: Joined, action: str) -> None:
    words = ("python", "-m", "flwr_hpc.serve", action, "guest", joined.run_dir)
    joined.server.run(*words)


def _letter(joined: Joined, site: str) -> Invitation:
    return read_invitation(joined.path(f"invitations/{site}.json"))


def _bearer(letter: Invitation) -> dict[str, str]:
    return {"Authorization": f"Bearer {letter.token}"}
