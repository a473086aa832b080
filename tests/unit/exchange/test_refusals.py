"""What a site may send: anything else is refused, and the others' work goes on."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg
from worlds.exchange.federation import Federation, InProcess, initial, plain_site, values

from flwr_hpc.exchange.records import RecordTensors
from flwr_hpc.exchange.store import PREFIX
from flwr_hpc.exchange.tensorfile import save


def rewrite(change):
    """Return a spoiler that writes other arrays, or changes the metrics, at one node."""

    def spoil(node, path, content):
        if node == 12:
            arrays = dict(values(initial()))
            change(arrays, content)
            record = ArrayRecord({n: Array(np.asarray(a)) for n, a in arrays.items()})
            path = path.with_name("spoiled")
            save(RecordTensors(record), path)
        return path

    return spoil


def bytes_instead(make):
    def spoil(node, path, content):
        if node != 12:
            return path
        path.with_name("spoiled").write_bytes(make(path.read_bytes()))
        return path.with_name("spoiled")

    return spoil


def put(name, index, value):
    def change(arrays, content):
        arrays[name] = np.array(arrays[name])
        arrays[name][index] = value

    return rewrite(change)


BAD = {
    "nan": (put("w", (3, 2), np.nan), "'w' has a value that is not finite"),
    "infinity": (put("b", 0, -np.inf), "'b' has a value that is not finite"),
    "shape": (rewrite(lambda a, c: a.update(w=a["w"].T)), "shape"),
    "missing": (rewrite(lambda a, c: a.pop("b")), "missing"),
    "extra": (rewrite(lambda a, c: a.update(c=a["b"])), "unknown"),
    "double": (
        rewrite(lambda a, c: a.update(w=np.float64(a["w"]) * 1e300)),
        "dtype F64, expected F32",
    ),
    "huge": (put("w", (1, 1), 3e38), "squares of differences"),
    "integers": (rewrite(lambda a, c: a.update(b=np.arange(5))), "dtype"),
    "weight": (rewrite(lambda a, c: c["metrics"].update({"num-examples": np.nan})), "num-ex"),
    "negative": (rewrite(lambda a, c: c["metrics"].update({"num-examples": -1})), "num-ex"),
}
BAD_BYTES = {
    "cut": (bytes_instead(lambda raw: raw[:-4]), "not a valid"),
    "huge header": (bytes_instead(lambda raw: struct.pack("<Q", 1 << 40) + raw[8:]), "claims"),
    "empty": (bytes_instead(lambda raw: b""), "0 bytes, expected"),
    "too large": (bytes_instead(lambda raw: raw + bytes(5000)), "bytes, expected"),
    "too small": (bytes_instead(lambda raw: raw[:60]), "60 bytes, expected"),
}


def assert_refused(federation, says):
    result = federation.run(2, min_train_nodes=3)
    assert federation.grid.rejected == 2
    event, fields = federation.events[0]
    assert event == "order_rejected"
    assert fields["facility"] == "12"
    assert says in fields["reason"]
    assert all(np.isfinite(a).all() for a in values(result.arrays).values())
    fair = FedAvg().start(InProcess(plain_site, nodes=(11, 13)), initial(), 2)
    for name, array in values(fair.arrays).items():
        np.testing.assert_allclose(values(result.arrays)[name], array, rtol=1e-6)
    assert len(federation.files("store")) <= 1
    assert len(federation.files("server")) <= 1


@pytest.mark.parametrize("inline_below_mb", [0.0, 1.0])
@pytest.mark.parametrize(("spoil", "says"), BAD.values(), ids=BAD.keys())
def test_a_bad_reply_is_refused_and_the_round_goes_on(tmp_path, spoil, says, inline_below_mb):
    """The model is what the other sites make of it; nothing stays on disk."""
    assert_refused(Federation(tmp_path, inline_below_mb, spoil=spoil), says)


@pytest.mark.parametrize(("spoil", "says"), BAD_BYTES.values(), ids=BAD_BYTES.keys())
def test_a_malformed_payload_is_refused_and_the_round_goes_on(tmp_path, spoil, says):
    """So is what is no safetensors file at all."""
    assert_refused(Federation(tmp_path, spoil=spoil), says)


def bit_flip(federation, ref):
    path = federation.folder / "store" / str(ref["key"])
    raw = path.read_bytes()
    path.unlink()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def gone(federation, ref):
    (federation.folder / "store" / str(ref["key"])).unlink()


def elsewhere(federation, ref):
    ref["key"] = f"../../{ref['sha256']}.payload"


@pytest.mark.parametrize(
    ("tamper", "says"), [(bit_flip, "sha256"), (gone, "not in"), (elsewhere, "not a reference")]
)
def test_a_payload_that_is_not_what_was_sent_is_refused(tmp_path, tamper, says):
    """The hash in the message decides, and a key cannot point out of the store."""
    federation = Federation(tmp_path)

    def site(message):
        content = federation.site(message)
        if message.metadata.dst_node_id == 12 and f"{PREFIX}arrays" in content:
            tamper(federation, content[f"{PREFIX}arrays"])
        return content

    federation.inner.site = site
    result = federation.run(1, min_train_nodes=3)
    assert federation.grid.rejected == 1
    assert says in federation.events[0][1]["reason"]
    assert all(np.isfinite(a).all() for a in values(result.arrays).values())
