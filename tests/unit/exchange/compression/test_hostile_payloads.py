"""Payloads of every codec that mean harm: refused in bounded memory, or an update like another."""

from __future__ import annotations

import random
import resource
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from worlds.exchange.payloads import (
    FINITE,
    OF_FRAMES,
    PERHAPS,
    POSITIONS,
    REFUSED,
    Payload,
    frame,
)

from flwr_hpc.exchange.codec import codec_names, make_codec
from flwr_hpc.exchange.codecs.zstd import zstd
from flwr_hpc.exchange.records import RecordTensors
from flwr_hpc.exchange.tensors import BadPayload, check

ALONE = [name for name in codec_names() if name != "zstd" and make_codec(name).relative]
STAGES = [*ALONE, "topk,int2", "topk,int8", "bf16,zstd", "int4,zstd", "topk,int2,zstd"]
EACH = 50  # payloads of a kind; with 10 codecs and 12 to 14 kinds 6,000
MEMORY = 8 << 20  # bytes, of payloads of 10 kB at most
SHAPES = {"w": (70, 64), "b": (30,), "odd": (4097,), "one": ()}


def weights(seed: int) -> RecordTensors:
    rng = np.random.default_rng(seed)
    arrays = {n: Array(rng.standard_normal(s).astype(np.float32)) for n, s in SHAPES.items()}
    return RecordTensors(ArrayRecord({**arrays, "count": Array(np.arange(5))}))


@contextmanager
def at_most(extra: int) -> Iterator[None]:
    """Let the process have so much more address space, numpy's and the library's, and no more."""
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("stages", STAGES)
def test_a_hostile_payload_is_refused_in_bounded_memory(stages, tmp_path):
    """Protects server and sites from whatever another site's bytes claim to be."""
    codec, base, new = make_codec(stages.split(",")), weights(0), weights(1)
    codec.encode(new, tmp_path / "honest", base)
    data = (tmp_path / "honest").read_bytes()
    packed = {name: base.layout[name].size for name in SHAPES}
    honest, rng, outcomes = (
        Payload.of(stages, codec, data, packed),
        random.Random(stages),
        Counter(),
    )
    assert stages in FINITE
    attacks = [a for a in REFUSED if a.__name__ != "positions" or stages in POSITIONS]
    attacks += OF_FRAMES * honest.compressed
    path = tmp_path / "payload"
    tracemalloc.start()
    with at_most(64 << 20):
        for attack in [*attacks, *PERHAPS] * EACH:
            path.write_bytes(attack(honest.copy(), rng))
            try:
                received = codec.decode(path, base, base.layout)
                check(received, base.layout, codec.dtypes)
                save_all(received)
            except BadPayload:
                outcomes[attack.__name__, "refused"] += 1
            else:
                outcomes[attack.__name__, "taken"] += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert {a.__name__: outcomes[a.__name__, "taken"] for a in attacks} == dict.fromkeys(
        (a.__name__ for a in attacks), 0
    )
    assert outcomes["noise", "taken"] > 0  # else the test spoils more than it says
    assert peak < MEMORY


def test_a_frame_that_is_made_by_hand_can_be_read():
    """Protects the test above: what is wrong with its frames is what it says, and not more."""
    assert zstd.decompress(frame(4000)) == bytes(4000)
    assert zstd.decompress(frame(1024, 1024, 7)) == bytes(2055)
    assert zstd.decompress(frame(4000, window=20)) == bytes(4000)


def save_all(received) -> None:
    """Read what was taken as the server does, in ranges: they are those of what was checked."""
    for name, info in received.layout.items():
        values, read = received.tensor(name).reshape(-1), received.reader(name)
        assert np.isfinite(values).all()
        np.testing.assert_array_equal(read(slice(0, info.size // 2)), values[: info.size // 2])
