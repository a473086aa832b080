"""A newcomer's codec and store: one class each, on both ways, and nothing else changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg
from worlds.exchange.federation import Federation, InProcess, initial, plain_site, values

from flwr_hpc.config.compose import compose_config
from flwr_hpc.errors import UserError
from flwr_hpc.exchange.codec import make_codec
from flwr_hpc.exchange.shards.parcel import Parcel
from flwr_hpc.exchange.store import PREFIX, Reference, make_store
from flwr_hpc.exchange.stores.file import FileStore
from flwr_hpc.exchange.stores.fsspec import FsspecStore
from flwr_hpc.server.preflight import trained_parameters


def run(federation, rounds=2):
    """Run FedAvg over the exchange; return how far each array is from a run without one."""
    found = federation.run(rounds, min_train_nodes=3)
    plain = FedAvg(min_train_nodes=3).start(InProcess(plain_site), initial(), rounds)
    assert federation.grid.rejected == 0, federation.events
    pairs = zip(values(found.arrays).values(), values(plain.arrays).values(), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


def test_a_codec_of_ones_own_is_used_on_both_ways(tmp_path):
    """float16, to the site and back: nothing but the name of the class selects it."""
    federation = Federation(tmp_path, codec="worlds.exchange.codecs.Half")
    sizes, plain = [], Federation(tmp_path / "plain")
    for each in (federation, plain):
        record = each.inner.site
        each.inner.site = lambda message, record=record: _noting(message, record(message), sizes)
    assert 0 < run(federation) < 1e-2  # rounded, on the way there or back
    half, sizes[:] = list(sizes), []
    assert run(plain) < 1e-6
    assert len(half) == len(sizes) == 2 * 3 * 3  # rounds; to train, back, to evaluate; nodes
    assert all(a < b for a, b in zip(half, sizes, strict=True))


def _noting(message, content, sizes):
    for record in (message.content, content):
        sizes += [
            sum(part.ref.bytes for part in Parcel.from_record(r, "node").parts)
            for k, r in record.items()
            if k.startswith(PREFIX)
        ]
    return content


def test_the_demo_sends_its_weights_through_the_store(tmp_path):
    """What a newcomer sees is what a large run does: no weights inside Flower's messages."""
    recipe = (Path(__file__).parents[3] / "Makefile").read_text()
    assert "\n\t$(PY) -m flwr_hpc.run\n" in recipe.partition("\ndemo:")[2][:80]
    config = compose_config([])
    count = trained_parameters(config)
    federation = Federation(tmp_path, config.exchange.inline_below_mb, config.exchange.codec)
    weights = ArrayRecord({"w": Array(np.zeros(count, np.float32))})
    federation.train(11, 12, arrays=weights)
    for message in federation.inner.pushed:
        assert not message.content.array_records
        assert Reference.from_record(message.content[f"{PREFIX}arrays"]).bytes > 4 * count


def test_a_codec_may_be_relative_to_what_both_sides_have(tmp_path):
    """Replies hold the bits that differ from the version the site was sent; it comes out exact."""
    federation = Federation(tmp_path, codec="worlds.exchange.codecs.Xor")
    bases, site = [], federation.inner.site

    def noting(message):
        content = site(message)
        if f"{PREFIX}arrays" in content:
            there, back = message.content[f"{PREFIX}arrays"], content[f"{PREFIX}arrays"]
            assert not there["base"]  # what is published must be readable by any site
            bases.append(Parcel.from_record(back, "node").base == there["sha256"])
        return content

    federation.inner.site = noting
    assert run(federation) < 1e-6
    assert bases == [True] * 6
    assert len(federation.files("server")) <= 1  # the versions opened as bases are gone again


def test_a_base_that_is_not_published_is_refused(tmp_path):
    """A reply to a session that is over, or a lie."""
    federation = Federation(tmp_path, codec="worlds.exchange.codecs.Xor")
    site = federation.inner.site

    def elsewhere(message):
        content = site(message)
        record = content[f"{PREFIX}arrays"]
        sent = Parcel.from_record(record, "node")
        record["manifest"] = str(record["manifest"]).replace(sent.base, "0" * 64)
        return content

    federation.inner.site = elsewhere
    (reply,) = federation.train(11)
    assert "not published" in reply.error.reason
    assert not list((tmp_path / "store" / "node-11").iterdir())


def test_a_store_of_ones_own_is_used_on_both_ways(tmp_path):
    """The scheme of the URL names the class."""
    url = f"worlds.exchange.codecs.Drawer://{tmp_path}/drawer"
    federation = Federation(tmp_path, store=url)
    assert run(federation) < 1e-6
    assert list((tmp_path / "drawer" / "global").iterdir())
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("/folder", FileStore),
        ("file:///folder", FileStore),
        ("memory://x", FsspecStore),
        ("s3://bucket/x", FsspecStore),
    ],
)
def test_any_other_place_is_fsspecs(url, kind):
    """A folder needs no scheme, and a bucket no class."""
    assert type(make_store(url)) is kind


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fulll", "Did you mean 'full'"),
        ("nowhere.to.Be", "exchange.codec=nowhere.to.Be cannot be imported"),
        ("worlds.exchange.codecs.Nothing", "cannot be imported"),
        ("worlds.exchange.codecs.Drawer", "there is no such codec"),
        ("", "Valid: bf16, full"),
    ],
)
def test_what_is_no_codec_is_refused_with_the_valid_names(name, says):
    """Also a class of another kind."""
    with pytest.raises(UserError, match=says):
        make_codec(name)
