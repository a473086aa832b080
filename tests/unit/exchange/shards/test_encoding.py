"""What jobs encode: any number of ranks, killed at any moment, with what was left out before."""

from __future__ import annotations

import shutil
import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from worlds.exchange.decoding import decoded
from worlds.exchange.shards import encode_shards, even_cuts

from flwr_hpc.exchange.client import SiteExchange
from flwr_hpc.exchange.codec import make_codec
from flwr_hpc.exchange.compression.encoder import make_encoder
from flwr_hpc.exchange.compression.feedback import Feedback
from flwr_hpc.exchange.records import RecordTensors
from flwr_hpc.exchange.shards.manifest import Manifest, WeightFiles
from flwr_hpc.exchange.store import make_store
from flwr_hpc.exchange.tensorfile import TensorFile, save, sha256_of
from flwr_hpc.exchange.tensors import BadPayload

TOPK2 = ["topk", "int2"]
BASE = "0" * 64  # version that all orders start from


def model(seed, by=1.0, of=None):
    """Tensors of which four ranks have whole blocks of every codec, and one that is no update."""
    rng = np.random.default_rng(seed)
    arrays = {
        "w": by * rng.standard_normal((8, 4096), dtype=np.float32),
        "b": by * rng.standard_normal(4 * 4096, dtype=np.float32),
        "n": np.arange(4),
    }
    if of:
        arrays |= {name: arrays[name] + of.tensor(name) for name in ("w", "b")}
    return RecordTensors(ArrayRecord({name: Array(array) for name, array in arrays.items()}))


def moved(order):
    """Return what is trained in an order."""
    return model(1 + int(order), by=0.01, of=model(0))


class Job:
    """A site's folder, and jobs of any number of ranks that train and encode there."""

    def __init__(self, folder, codec=TOPK2, gamma=1.0):
        self.folder, self.codec = folder, codec
        self.encoder = make_encoder(codec, gamma, folder / "feedback")
        self.base = folder / f"{BASE}.safetensors"
        save(model(0), self.base)
        self.metrics = {}

    def train(self, order, ranks=1):
        """Return the folder's manifest of what a job of so many ranks sends for an order."""
        trained, path = moved(order), self.folder / order / "weights.safetensors"
        cuts, start = even_cuts(trained.layout, ranks), self.encoder.start(order, self.base)
        manifest, _, self.metrics = encode_shards(self.encoder, path, trained, cuts, start)
        return manifest

    def decoded(self, path):
        return decoded(self.codec, path, self.base)

    def error(self, order):
        return read(self.folder / "feedback" / order / "error.json")


def read(path):
    whole = WeightFiles.open(path).whole
    return {name: whole.tensor(name) for name in whole.layout}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4", TOPK2], ids=str)
def test_any_number_of_ranks_goes_on_with_the_error(codec, tmp_path):
    """Protects updates and error feedback from a change of the world size: 2, 1, 2, 4 ranks send
    what one would have sent, and leave the same error."""
    one, many = Job(tmp_path / "one", codec), Job(tmp_path / "many", codec)
    for seq, ranks in enumerate((2, 1, 2, 4)):
        expected, found = one.train(str(seq)), many.train(str(seq), ranks)
        assert len(Manifest.read(found).shards) == ranks
        assert_same(many.decoded(found), one.decoded(expected))
        assert_same(many.error(str(seq)), one.error(str(seq)))
        assert many.metrics["codec_error"] == pytest.approx(one.metrics["codec_error"], rel=1e-3)
        assert 0 < many.metrics["codec_error"] < 1
        share = one.metrics["sent_share"]
        assert share <= many.metrics["sent_share"] < share + 0.01  # a header for each shard


def test_nothing_is_lost_but_the_last_error(tmp_path):
    """With gamma = 1 all that was sent and the last error are all that was trained."""
    job, base, total, sent = Job(tmp_path), model(0).tensor("w"), 0.0, 0.0
    for seq in range(5):
        found = job.decoded(job.train(str(seq), 1 + seq % 2))
        total = total + (moved(str(seq)).tensor("w") - base).astype(np.float64)
        sent = sent + (found["w"] - base)
    np.testing.assert_allclose(sent + job.error("4")["w"], total, atol=1e-5)


@pytest.mark.parametrize("died", ["before the error", "before the manifest", "before the result"])
def test_a_job_that_was_killed_is_encoded_again_as_before(died, tmp_path, monkeypatch):
    """Protects feedback from counting twice: an order is given the error that it was given, by
    another number of ranks too, and a successor that of the finished order."""
    undisturbed, job = Job(tmp_path / "undisturbed"), Job(tmp_path / "killed")
    for seq in "01":
        expected = undisturbed.decoded(undisturbed.train(seq))
    job.train("0")
    with monkeypatch.context() as patch:
        where = {
            "before the error": "flwr_hpc.exchange.compression.feedback.Feedback.publish",
            "before the manifest": "flwr_hpc.exchange.compression.encoder.Manifest.write",
        }
        if died in where:
            patch.setattr(where[died], killed)
            with pytest.raises(KeyboardInterrupt):
                job.train("1", 4)
        else:
            job.train("1", 4)
    found = job.train("1", 2)
    assert_same(job.decoded(found), expected)
    left = {path.name for path in found.parent.iterdir()}
    assert left == {found.name, *(shard.file for shard in Manifest.read(found).shards)}
    undisturbed.train("2")
    job.train("2", 2)
    assert_same(job.error("2"), undisturbed.error("2"))


def killed(*_):
    raise KeyboardInterrupt


def test_the_errors_of_two_orders_are_kept(tmp_path):
    """Protects the disk: of the last one, and of that before it, in no more files than needed."""
    job = Job(tmp_path)
    (tmp_path / "feedback" / "0").mkdir(parents=True)
    (tmp_path / "feedback" / "0" / ".half.tmp").touch()  # of a job that was killed
    for seq in range(4):
        job.train(str(seq), 4)
    job.train("3", 2)
    found = {folder.name: folder for folder in (tmp_path / "feedback").iterdir()}
    assert found.keys() == {"2", "3", "feedback.json"}
    assert len(list(found["3"].iterdir())) == 1 + 2


def test_a_successor_does_not_take_what_is_being_written(tmp_path, monkeypatch):
    """Protects error feedback where an allocation that is let go still writes order 1 as its
    successor ends order 2: neither fails, and the error of order 0 goes with one of them alone."""
    job, alone, undisturbed = (Job(tmp_path / name) for name in ("job", "alone", "undisturbed"))
    for site in (job, undisturbed):
        site.train("0")
    late = []
    with monkeypatch.context() as patch:
        patch.setattr(job.encoder, "publish", lambda *given: late.append(given) or ("", {}))
        slow = job.train("1", 2)
    assert_same(job.decoded(job.train("2")), alone.decoded(alone.train("2")))
    job.encoder.publish(*late[0])
    assert_same(job.decoded(slow), undisturbed.decoded(undisturbed.train("1")))
    assert_same(job.error("1"), undisturbed.error("1"))
    assert job.encoder.start("3", job.base).former == "1"


@pytest.mark.parametrize("spoil", [shutil.rmtree, lambda f: (f / "error.json").write_text("{}")])
def test_an_error_that_is_damaged_is_let_go(spoil, tmp_path):
    """The site goes on without it."""
    job, fresh = Job(tmp_path / "job"), Job(tmp_path / "fresh")
    job.train("0")
    spoil(tmp_path / "job" / "feedback" / "0")
    assert_same(job.decoded(job.train("1")), fresh.decoded(fresh.train("1")))


def test_an_error_is_kept_in_blocks(tmp_path):
    """Protects a job's memory: of a large tensor only some is there at a time."""
    codec, size, rng = make_codec("int8"), 4_000_000, np.random.default_rng(0)
    for name in ("base", "first"):
        array = rng.standard_normal((100, size // 100), dtype=np.float32)
        save(RecordTensors(ArrayRecord({"w": Array(array)})), tmp_path / name)
    base, trained = (TensorFile(tmp_path / name) for name in ("base", "first"))
    feedback, cut = Feedback(tmp_path / "error"), {"w": (0, 100)}
    codec.encode(trained, tmp_path / "p", base)
    sent = codec.decode(tmp_path / "p", base)
    tracemalloc.start()
    kept = feedback.keep("a", (0, 1), trained, sent, base, cut)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.8 * 4 * size
    share = feedback.publish("a", "", trained.layout, [kept])
    update = trained.tensor("w") - base.tensor("w")
    error = trained.tensor("w") - sent.tensor("w")
    assert share == pytest.approx(np.linalg.norm(error) / np.linalg.norm(update), rel=1e-3)


def test_without_feedback_none_is_kept(tmp_path):
    """Neither where it is not wanted, nor where nothing is left out."""
    for codec, gamma in ((TOPK2, 0.0), ("worlds.exchange.codecs.Xor", 0.9)):
        job = Job(tmp_path / str(gamma), codec, gamma)
        job.train("0", 2)
        assert not (tmp_path / str(gamma) / "feedback").exists()
        assert job.metrics.keys() == {"sent_share"}


def test_payloads_travel_as_they_are(tmp_path):
    """Protects login nodes: what the job wrote is linked into the store, and not read; no update
    becomes a plain message, however small."""
    job, content = Job(tmp_path), RecordDict()
    manifest, store = job.train("0", 2), make_store(str(tmp_path / "store"))
    exchange = SiteExchange(store, make_codec(TOPK2), inline_below_mb=1e3)
    exchange.send(content, "arrays", manifest, sha256_of(manifest), 7)
    assert not content.array_records
    for shard in Manifest.read(manifest).shards:
        payload = tmp_path / "store" / "node-7" / f"{shard.sha256}.payload"
        assert payload.samefile(manifest.parent / shard.file)
    again = Manifest.from_json(str(content["exchange.arrays"]["manifest"]))
    assert again.base == BASE
    assert [shard.rows for shard in again.shards] == [
        shard.rows for shard in Manifest.read(manifest).shards
    ]


def test_payloads_are_no_weights(tmp_path):
    """Protects a trainer from loading an update as its weights."""
    with pytest.raises(BadPayload, match="payloads of a codec"):
        WeightFiles.open(Job(tmp_path).train("0"))


def test_weights_that_no_version_stands_for_are_whole(tmp_path):
    """Those that came inside a message, and the first of all."""
    job = Job(tmp_path)
    for start in (None, tmp_path / f"inline-{BASE}.safetensors", tmp_path / "weights.json"):
        assert job.encoder.start("0", start) is None
    assert job.encoder.is_plain(None)
