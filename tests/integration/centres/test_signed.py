"""A server's public socket and Flower's signatures: whose they are, and when they were made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from worlds.hosts.signed import Signer, heartbeat, reply
from worlds.runs.centres import Centres

from flwr_hpc.config.invitation import read_invitation
from flwr_hpc.gate.credentials import read_credentials


@dataclass(frozen=True)
class World:
    """A server that waits for its sites, and what is known of their nodes."""

    port: int
    nodes: dict[str, int]
    a: Signer
    b: Signer

    def ask(self, headers: dict[str, str], node: str = "a") -> int:
        return heartbeat(self.port, headers, self.nodes[node])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    centres = Centres(tmp_path_factory.mktemp("centres"))
    try:
        letters = centres.run / "invitations"
        known = centres.until(
            lambda: (
                (found := read_credentials(letters / "credentials.json"))
                and all(credential.node_id for credential in found.values())
                and found
            )
        )
        a, b = (
            Signer(read_invitation(letters / f"{s}.json").private_key, known[s].public_key)
            for s in "ab"
        )
        yield World(centres.port, {site: known[site].node_id for site in "ab"}, a, b)
    finally:
        centres.end()


def test_a_node_that_signs_is_heard(world: World) -> None:
    """Protects the tests below from a request that nobody would get an answer to."""
    assert [world.ask(world.a.headers()), world.ask(world.b.headers(), "b")] == [200, 200]


def test_what_was_signed_at_another_time_is_refused(world: World) -> None:
    """Protects a site from who repeats its requests later, or has signatures made ahead."""
    ages = ({"age_s": 400.0}, {"age_s": 400.0, "said_age_s": 0.0}, {"age_s": -60.0})
    assert [world.ask(world.a.headers(**age)) for age in ages] == [401] * 3


def test_what_another_has_signed_is_refused(world: World) -> None:
    """Protects a site from other sites, and from who is no site: its node is its key's alone."""
    posing = Signer(world.b.private_ssh, world.a.public_pem)
    nobody = world.b.headers() | {"flwr-public-key": "AAAA"}
    bare = {k: v for k, v in world.a.headers().items() if k != "flwr-signature"}
    assert [world.ask(h) for h in (posing.headers(), world.b.headers(), nobody, bare)] == [401] * 4


def test_a_node_replies_in_its_own_name_alone(world: World) -> None:
    """Protects a site from another one that signs well: Flower looks at who signed a request and
    not at whom its messages say they are from."""
    a, b = world.nodes["a"], world.nodes["b"]
    status, said = reply(world.port, world.b.headers(), b, source=a, run_id=1)
    assert (status, said) == (403, "a node replies in its own name alone\n")
    assert reply(world.port, world.b.headers(), a, source=a, run_id=1)[0] == 401  # Flower's
    status, said = reply(world.port, world.b.headers(), b, source=b, run_id=1)
    assert "own name" not in said  # Flower has looked at it
    assert status not in (401, 403)
