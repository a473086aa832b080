"""Versions sent as updates of what a site has: fewer bytes, and nothing left out is lost."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error
from worlds.exchange.federation import NODES, Federation

from flwr_hpc.errors import UserError
from flwr_hpc.exchange.codec import make_codec, make_downlink
from flwr_hpc.exchange.store import PREFIX
from flwr_hpc.exchange.tensorfile import TensorFile
from flwr_hpc.exchange.tensors import BadPayload
from flwr_hpc.spool.folders import received_ns

SIZE = 100_000


def weights(seed, by=1.0, of=None):
    """Random weights, or others near them."""
    values = by * np.random.default_rng(seed).standard_normal(SIZE, dtype=np.float32)
    start = 0 if of is None else of["w"].numpy()
    return ArrayRecord({"w": Array(np.asarray(start + values, np.float32))})


class Line:
    """A federation whose sites train nothing; notes what each message refers to."""

    def __init__(self, folder, downlink="int8", codec="bf16"):
        self.federation = Federation(folder, codec=codec, downlink=downlink)
        self.federation.site.spoil = self._as_it_came
        self.federation.inner.site = self._answer
        self.folder = folder / "sites"

    def _answer(self, message):
        try:
            return self.federation.site(message)
        except BadPayload as exc:  # as of a ClientApp that raises
            return Error(2, str(exc))

    def _as_it_came(self, node, path, content):
        path.unlink()
        path.hardlink_to(self.files(node)[-1])
        return path

    def send(self, arrays, *nodes):
        """Return the references in the messages to some nodes, and their replies."""
        begun = len(self.federation.inner.pushed)
        replies = self.federation.train(*nodes, arrays=arrays)
        sent = self.federation.inner.pushed[begun:]
        return [m.content[f"{PREFIX}arrays"] for m in sent], replies

    def files(self, node):
        """Return what a site received, oldest first."""
        found = (self.folder / f"site{node}").glob("*.safetensors")
        return sorted(found, key=received_ns)

    def at(self, node):
        """Return the weights that a site received last."""
        return TensorFile(self.files(node)[-1]).tensor("w")


def test_the_second_version_is_sent_as_an_update(tmp_path):
    """A quarter of the bytes in int8, encoded once for all sites that have the same."""
    line, first = Line(tmp_path), weights(0)
    whole, _ = line.send(first, *NODES)
    second = weights(1, by=0.01, of=first)
    parts, replies = line.send(second, *NODES)
    assert {r["base"] for r in whole} == {""}
    assert {r["base"] for r in parts} == {whole[0]["sha256"]}
    assert len({r["key"] for r in parts}) == 1
    assert parts[0]["bytes"] < 0.27 * whole[0]["bytes"]
    for node in NODES:
        np.testing.assert_array_equal(line.at(node), line.at(NODES[0]))
        np.testing.assert_allclose(line.at(node), second["w"].numpy(), atol=5e-4)
    assert not any(r.has_error() for r in replies)


@pytest.mark.parametrize("downlink", ["int4", ["topk", "int2"]], ids=str)
def test_what_is_left_out_comes_with_later_versions(downlink, tmp_path):
    """A version that stays the same reaches the site in the end."""
    line, first = Line(tmp_path, downlink), weights(0)
    line.send(first, 11)
    last = weights(1, by=0.01, of=first)
    errors = []
    for step in range(6):
        line.send(weights(10 + step, by=1e-9, of=last), 11)  # another file, hardly other weights
        errors.append(np.linalg.norm(line.at(11) - last["w"].numpy()))
    assert all(b < a for a, b in itertools.pairwise(errors))
    assert errors[-1] < (1e-3 if downlink == "int4" else 0.9) * errors[0]


def test_an_update_is_of_the_version_that_the_strategy_knows(tmp_path):
    """A site that changes nothing sends back nothing but what the strategy has already.

    With weights in place of updates it would take back what the downlink left out.
    """
    line, first = Line(tmp_path, ["topk", "int2"]), weights(0)
    line.send(first, 11)
    second = weights(1, by=0.01, of=first)
    _, (reply,) = line.send(second, 11)
    found = reply.content["arrays"]["w"].numpy()
    assert np.abs(line.at(11) - second["w"].numpy()).max() > 1e-3
    np.testing.assert_allclose(found, second["w"].numpy(), atol=1e-6)


def test_a_site_that_lost_its_version_gets_the_next_whole(tmp_path):
    """It says so once."""
    line, first = Line(tmp_path), weights(0)
    line.send(first, 11, 12)
    for file in line.files(11):
        file.unlink()
    (part, other), (reply, good) = line.send(weights(1, of=first), 11, 12)
    assert part["base"] == other["base"] != ""
    assert "which is not here" in reply.error.reason
    assert not good.has_error()
    (whole, part), replies = line.send(weights(2, of=first), 11, 12)
    assert (whole["base"], bool(part["base"])) == ("", True)
    assert not any(r.has_error() for r in replies)


def test_a_new_site_gets_all_and_each_an_update_of_its_own(tmp_path):
    """Sites of asynchronous strategies have unlike versions."""
    line = Line(tmp_path)
    record = weights(0)
    (a,), _ = line.send(record, 11)
    record = weights(1, by=0.01, of=record)
    (b,), _ = line.send(record, 12)
    last = weights(2, by=0.01, of=record)
    refs, _ = line.send(last, *NODES)
    assert [r["base"] for r in refs] == [a["sha256"], b["sha256"], ""]
    for node in NODES:
        np.testing.assert_allclose(line.at(node), last["w"].numpy(), atol=1e-3)


def test_the_same_update_of_two_versions_makes_two(tmp_path):
    """Its bytes are the same: the site must not take one for the other."""
    line = Line(tmp_path)
    a, b = weights(0), weights(1)
    line.send(a, 11)
    (first,), _ = line.send(weights(2, by=0.0, of=a), 11)
    line.send(b, 12)
    line.send(weights(3, by=0.0, of=b), 12)
    assert first["base"]
    np.testing.assert_array_equal(line.at(11), a["w"].numpy())
    np.testing.assert_array_equal(line.at(12), b["w"].numpy())


def test_other_tensors_are_sent_whole(tmp_path):
    """As fragments of the weights are."""
    line = Line(tmp_path)
    line.send(weights(0), 11)
    (ref,), _ = line.send(ArrayRecord({"w": Array(np.ones(7, np.float32))}), 11)
    assert ref["base"] == ""


def test_what_is_kept_does_not_grow(tmp_path):
    """One version per site that differs from the others', and the newest."""
    line, record = Line(tmp_path), weights(0)
    for step in range(6):
        record = weights(step, by=0.01, of=record)
        line.send(record, *NODES)
    assert len(line.federation.files("store/global")) <= 2
    assert len(line.federation.files("server")) <= 5
    line.federation.grid.close()
    assert not line.federation.files("store")


@pytest.mark.parametrize(
    "setting", ["topkk", "worlds.exchange.codecs.Half", [], ["int8", "topk"]], ids=str
)
def test_what_cannot_be_a_downlink(setting):
    """Said before anything starts."""
    with pytest.raises(UserError, match=r"exchange\.downlink"):
        make_downlink(setting, make_codec("int8"))


def test_the_way_back_must_send_updates_too():
    """Else every reply would take back what the downlink left out."""
    with pytest.raises(UserError, match=r"exchange\.codec sends whole weights"):
        make_downlink("int8", make_codec("full"))
    assert make_downlink("full", make_codec("full")) is None
