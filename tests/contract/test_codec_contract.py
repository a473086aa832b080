"""What every codec must do."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from flwr_hpc.exchange.codec import FullWeights, sha256_of
from flwr_hpc.exchange.records import RecordTensors
from flwr_hpc.exchange.tensors import BadPayload, check

# One row per codec: how far a value may be from what was sent.
CODECS = [pytest.param(FullWeights(), 0.0, id="FullWeights")]


def tensors(seed):
    rng = np.random.default_rng(seed)
    return RecordTensors(
        ArrayRecord(
            {
                "w": Array(rng.standard_normal((40, 30), dtype=np.float32)),
                "b": Array(rng.standard_normal(30)),
                "scale": Array(np.asarray(rng.standard_normal(), dtype=np.float32)),
                "none": Array(np.zeros((0, 3), np.float32)),
            }
        )
    )


@pytest.mark.parametrize(("codec", "tolerance"), CODECS)
def test_a_payload_decodes_to_what_was_encoded(codec, tolerance, tmp_path):
    """Names, shapes and values survive, given the base that both sides have."""
    base, sent = tensors(0), tensors(1)
    sha256 = codec.encode(sent, tmp_path / "payload", base)
    assert sha256 == sha256_of(tmp_path / "payload")
    received = codec.decode(tmp_path / "payload", base)
    check(received, sent.layout)
    for name in sent.layout:
        np.testing.assert_allclose(received.tensor(name), sent.tensor(name), atol=tolerance)


@pytest.mark.parametrize(("codec", "tolerance"), CODECS)
def test_encoding_is_reproducible(codec, tolerance, tmp_path):
    """The same weights have the same name in a store."""
    base, sent = tensors(0), tensors(1)
    assert codec.encode(sent, tmp_path / "a", base) == codec.encode(sent, tmp_path / "b", base)


@pytest.mark.parametrize(("codec", "tolerance"), CODECS)
@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_cut_payload_is_refused(codec, tolerance, keep, tmp_path):
    """A malformed payload is an error of one kind, before any number is used."""
    base = tensors(0)
    codec.encode(tensors(1), tmp_path / "payload", base)
    (tmp_path / "cut").write_bytes((tmp_path / "payload").read_bytes()[:keep])
    with pytest.raises(BadPayload):
        check(codec.decode(tmp_path / "cut", base), base.layout)
