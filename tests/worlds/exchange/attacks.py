"""Attacks of one site on the exchange, drawn from a seed: each reply is refused, or right.

The attacker owns a node, its folder in the store and its replies; another site is honest. What an
accepted reply holds is compared with what the official library reads in the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import socket
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from safetensors.numpy import load, save
from worlds.exchange.federation import Federation, values
from worlds.exchange.shards import random_cuts

from flwr_hpc.exchange.grid import REJECTED
from flwr_hpc.exchange.records import RecordTensors
from flwr_hpc.exchange.store import PREFIX, Reference, node_folder
from flwr_hpc.protocol import ARRAYS, METRICS, ORDER, STATUS, Order, to_json

ATTACKER, HONEST = 12, 11
MODEL = {
    "embed.weight": np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6),
    "head.bias": np.arange(5, dtype=np.float64),
    "scale": np.asarray(0.5, dtype=np.float32),
    "count": np.arange(3),
    "mask": np.array([True, False]),
    "none": np.zeros((0, 2), np.float32),
}
ODD = [
    0,
    1,
    -1,
    7,
    2**31,
    2**63 - 1,
    2**64,
    -(2**63),
    1e300,
    "x",
    None,
    [],
    {},
    True,
    "\x00",
    "é" * 9,
]


class Attacks:
    """A server, an honest site and an attacker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.federation = Federation(folder)
        self.grid = self.federation.grid
        self.grid.expect(record(MODEL))
        self.mine = folder / "store" / node_folder(ATTACKER)
        self.honest = self._honest()
        self.outcomes: Counter[str] = Counter()
        self.kinds = [getattr(self, n) for n in sorted(dir(self)) if n.startswith("attack_")]

    def run(self, seed: int) -> str:
        """Make one attack; AssertionError if it succeeds. Returns which one it was."""
        rng = random.Random(seed)
        attack = rng.choice(self.kinds)
        self.federation.inner.pushed.clear()  # these two are the test's, and grow
        self.federation.events.clear()
        shutil.rmtree(self.mine, ignore_errors=True)
        self.mine.unlink(missing_ok=True)
        self.mine.mkdir(parents=True)
        content = RecordDict({METRICS: MetricRecord({"num-examples": 5})})
        expected: Callable[[], dict[str, np.ndarray]] | None = attack(rng, content)
        reply = self._answer(ATTACKER, content)
        accepted = reply.has_content() and ARRAYS in reply.content
        self.outcomes[f"{attack.__name__[7:]}: {'right' if accepted else 'refused'}"] += 1
        if accepted:
            self._check(reply.content, expected)
        elif reply.has_error():
            assert reply.error.code == REJECTED, reply.error.reason
            assert "it cannot be read:" not in reply.error.reason, reply.error.reason
        return attack.__name__

    def check_honest(self) -> None:
        """The honest site is served as ever, and the attacks have left nothing at the server."""
        self._honest_put()
        reply = self._answer(HONEST, self.honest)
        for name, array in values(reply.content[ARRAYS]).items():
            np.testing.assert_array_equal(array, MODEL[name])
        del reply
        assert len(self.federation.files("server")) == 0

    # --- the sites ----------------------------------------------------------------------------

    def _answer(self, node: int, content: RecordDict) -> Message:
        self.federation.inner.site = lambda message: content
        order = ConfigRecord({"json": to_json(Order("run", "a", 1, "train"))})
        message = Message(RecordDict({ORDER: order}), node, "query.collect")
        (reply,) = self.grid.send_and_receive([message])
        return reply

    def _honest(self) -> RecordDict:
        ref = self._honest_put()
        metrics = MetricRecord({"num-examples": 5})
        return RecordDict({METRICS: metrics, PREFIX + ARRAYS: ref.to_record()})

    def _honest_put(self) -> Reference:
        path = self.folder / "honest"
        path.write_bytes(save(MODEL))
        return self.federation.store.put(path, node_folder(HONEST))

    def _put(self, content: RecordDict, data: bytes, **lies: Any) -> None:
        digest = hashlib.sha256(data).hexdigest()
        (self.mine / f"{digest}.payload").write_bytes(data)
        fields = {"key": f"{self.mine.name}/{digest}.payload", "sha256": digest}
        content[PREFIX + ARRAYS] = ConfigRecord({**fields, "bytes": len(data), **lies})

    def _check(self, content: RecordDict, expected: Any) -> None:
        """What is accepted looks like the model, and is what the bytes say."""
        assert set(content.array_records) == {ARRAYS}
        found = values(content[ARRAYS])
        assert list(found) == list(MODEL)
        for name, array in found.items():
            assert array.shape == MODEL[name].shape
            assert np.isfinite(array.astype(MODEL[name].dtype)).all()
        assert expected is not None, "nothing of this attack may be accepted"
        for name, array in expected().items():
            np.testing.assert_array_equal(found[name], array)

    # --- attacks: each changes a reply, and returns how its arrays read if they are accepted -----

    def attack_bytes(self, rng: random.Random, content: RecordDict) -> Any:
        """Flip, cut, lengthen, or make up the bytes of a payload."""
        data = bytearray(save(MODEL))
        for _ in range(rng.choice([0, 1, 1, 2, 8])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        data += rng.choice([b"", b"", bytes(rng.randrange(40)), rng.randbytes(5000)])
        data = data[: rng.choice([len(data), len(data), rng.randrange(len(data))])]
        data = data if rng.random() < 0.9 else bytearray(rng.randbytes(rng.randrange(1, 700)))
        self._put(content, bytes(data))
        return lambda: load(bytes(data))

    def attack_header(self, rng: random.Random, content: RecordDict) -> Any:
        """Change names, dtypes, shapes, offsets, entries or the length of the header."""
        raw = save(MODEL)
        length = int.from_bytes(raw[:8], "little")
        header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
        for _ in range(rng.choice([1, 1, 3])):
            mutate(rng, header)
        text = json.dumps(header).encode()
        text = rng.choice([text, text, text + b" " * rng.randrange(20_000), b"[" * 3000])
        size = rng.choice([len(text)] * 6 + [0, 1 << 40, 2**64 - 1, len(text) + 1])
        data = struct.pack("<Q", size) + text + body
        self._put(content, data)
        return lambda: load(data)

    def attack_values(self, rng: random.Random, content: RecordDict) -> Any:
        """Send other dtypes, and values that are not finite or too large."""
        arrays = {n: a.copy() for n, a in MODEL.items()}
        for name in rng.sample(sorted(arrays), rng.randrange(1, 4)):
            kind = rng.choice([np.float16, np.float32, np.float64, np.int64, np.uint8])
            arrays[name] = arrays[name].astype(rng.choice([kind, arrays[name].dtype.type]))
            if arrays[name].size and arrays[name].dtype.kind == "f":
                odd = rng.choice([np.nan, np.inf, -np.inf, 1e300, 3e38, 1e19, -1e5, 2.5])
                with np.errstate(over="ignore"):
                    arrays[name].flat[rng.randrange(arrays[name].size)] = odd
        if rng.random() < 0.5:
            data = save(arrays)
            self._put(content, data, dtype=rng.choice(["", "F16", "BF16", "F64", "I8"]))
            return lambda: load(data)
        content[ARRAYS] = record(arrays)
        return lambda: arrays

    def attack_reference(self, rng: random.Random, content: RecordDict) -> Any:
        """Name what is not there, another's, or not of this form."""
        data = save(MODEL)
        self._put(content, data)
        ref, sha256 = content[PREFIX + ARRAYS], hashlib.sha256(data).hexdigest()
        keys = [f"{f}/{sha256}.payload" for f in (node_folder(HONEST), "global", "..", "/etc", "")]
        change = rng.choice(["key", "sha256", "bytes", "base", "dtype", "missing", "record"])
        if change == "key":
            ref["key"] = rng.choice([*keys, sha256, "x" * 10_000, f"{self.mine.name}/../{keys[0]}"])
        elif change == "sha256":
            ref["sha256"] = rng.choice(["0" * 64, "", sha256.upper(), "é" * 64])
        elif change == "bytes":
            ref["bytes"] = rng.choice([0, -1, len(data) + 1, len(data) - 1, 10**15, 1.5, "9", [1]])
        elif change == "missing":
            del ref[rng.choice(["key", "sha256", "bytes"])]
        elif change == "record":
            content[PREFIX + ARRAYS] = rng.choice([record(MODEL), MetricRecord({"key": 1})])
        else:
            ref[change] = rng.choice(["0" * 64, "0" * 10, "BF16", "x", 3, b"x"])
        return lambda: load(data)

    def attack_shards(self, rng: random.Random, content: RecordDict) -> Any:
        """Cut rows twice, or not at all; lie of sizes, names and hashes; spoil a shard."""
        whole = RecordTensors(record(MODEL))
        cuts = [dict(cut) for cut in random_cuts(whole.layout, rng.randint(1, 5), rng)]
        files = [save({n: whole.rows(n, *rows) for n, rows in cut.items()}) for cut in cuts]
        change = rng.choice(["none", "rows", "text", "field", "bytes", "value", "tensors"])
        if change in ("bytes", "value"):
            at = rng.randrange(len(files))
            data = bytearray(files[at])
            spot = rng.randrange(len(data)) if change == "bytes" else len(data) - 1
            data[spot] = rng.randrange(256)
            files[at] = bytes(data)
        hashes = [hashlib.sha256(data).hexdigest() for data in files]
        for digest, data in zip(hashes, files, strict=True):
            (self.mine / f"{digest}.payload").write_bytes(data)
        numbers = {name: i for i, name in enumerate(whole.layout)}
        shards: list[dict[str, Any]] = [
            {
                "sha256": digest, "bytes": len(data), "file": "",
                "rows": [[*rows, [numbers[n]]] for n, rows in cut.items()],
            }
            for digest, data, cut in zip(hashes, files, cuts, strict=True)
        ]  # fmt: skip
        tensors = {n: [i.dtype, i.shape] for n, i in whole.layout.items()}
        if change == "rows":
            rows = rng.choice(shards)["rows"]
            rng.choice(rows)[rng.randrange(3)] = rng.choice(ODD)
        elif change == "field":
            rng.choice(shards)[rng.choice(["sha256", "bytes", "rows", "file"])] = rng.choice(ODD)
        elif change == "tensors":
            tensors[rng.choice([*tensors, "x"])] = rng.choice([*ODD, ["F32", [4, 7]], ["I8", [3]]])
        text = json.dumps({"tensors": tensors, "shards": shards})
        if change == "text":
            at = rng.randrange(len(text))
            text = text[:at] + chr(rng.randrange(32, 300)) + text[at + rng.randrange(3) :]
        content[PREFIX + ARRAYS] = ConfigRecord({"manifest": text, "base": "", "dtype": ""})

        def read() -> dict[str, np.ndarray]:
            parts = {n: np.zeros_like(a) for n, a in MODEL.items()}
            for data, cut in zip(files, cuts, strict=True):
                for name, array in load(data).items():
                    part = parts[name]
                    part[slice(*cut[name]) if part.ndim else ...] = array
            return parts

        return read

    def attack_entry(self, rng: random.Random, content: RecordDict) -> Any:
        """Have something else than a regular file lie there, or be on the way there."""
        data = save(MODEL)
        self._put(content, data, **({"bytes": 0} if rng.random() < 0.1 else {}))
        (path,) = self.mine.iterdir()
        elsewhere = self.mine / "elsewhere"
        path.rename(elsewhere)
        kind = rng.choice(["gone", "fifo", "folder", "socket", "link", "device", "up", "disk"])
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as sock, inside(self.mine):
                sock.bind("s")
                os.rename("s", path.name)
        elif kind == "link":
            target = rng.choice([elsewhere, "/dev/zero", "/dev/tty", path, "/etc/passwd", "/"])
            path.symlink_to(target)
        elif kind == "device" and os.geteuid() == 0:
            os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))
        elif kind == "up":
            elsewhere.rename(path)
            moved = self.folder / "moved"
            shutil.rmtree(moved, ignore_errors=True)
            self.mine.rename(moved)
            self.mine.symlink_to(moved)
        elif kind == "disk":
            with open(path, "wb") as f:
                f.truncate(rng.choice([len(data), 1 << 40]))
        return None

    def attack_inline(self, rng: random.Random, content: RecordDict) -> Any:
        """Send arrays that are not what they say."""
        arrays = record(MODEL)
        name = rng.choice(sorted(MODEL))
        fields = {k: getattr(arrays[name], k) for k in ("dtype", "shape", "stype", "data")}
        for key in rng.sample(sorted(fields), rng.choice([1, 1, 2])):
            fields[key] = {
                "dtype": lambda: rng.choice(["float64", "O", "x", "bfloat16", "", "<M8[s]", "V9"]),
                "shape": lambda: rng.choice([(), (-1,), (1 << 62, 4), (4, 6, 1), (0,)]),
                "stype": lambda: rng.choice(["safetensors", "pickle", "", "torch"]),
                "data": lambda: npy(rng, fields["data"]),
            }[key]()
        broken = Array(fields["dtype"], fields["shape"], fields["stype"], fields["data"])
        content[ARRAYS] = ArrayRecord({**arrays, name: broken})
        return dict

    def attack_unasked(self, rng: random.Random, content: RecordDict) -> Any:
        """Add records that nobody asked for to what is good."""
        data = save(MODEL)
        self._put(content, data)
        key = rng.choice(["further", "gradient", PREFIX + "gradient", PREFIX, "metrics2", ORDER])
        huge = Reference.of(self.mine.name, "0" * 64, 10**15).to_record()
        content[key] = rng.choice([record(MODEL), huge, MetricRecord({"num-examples": 10**9})])
        return lambda: load(data)

    def attack_records(self, rng: random.Random, content: RecordDict) -> Any:
        """Send records of the wrong kind, or weights that would spoil the average."""
        data = save(MODEL)
        self._put(content, data)
        odd = rng.choice([math.nan, math.inf, -1, -0.5, [1, 2], 3])
        content[METRICS] = rng.choice(
            [MetricRecord({"num-examples": odd}), ConfigRecord({"num-examples": 5}), record(MODEL)]
        )
        content[STATUS] = rng.choice([ConfigRecord({"json": "{"}), record({}), MetricRecord()])
        return lambda: load(data)


def record(arrays: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def mutate(rng: random.Random, header: dict[str, Any]) -> None:
    """Change one thing in a table of contents."""
    name = rng.choice(sorted(header))
    entry = header[name]
    change = rng.randrange(7)
    if change == 0:
        header[rng.choice(["", "other", "__metadata__", "é" * 50, name * 9])] = header.pop(name)
    elif change == 1:
        del header[name]
    elif change == 2:
        header[f"further{rng.randrange(9)}"] = entry
    elif change == 3:
        header[name] = rng.choice(ODD)
    elif not isinstance(entry, dict) or "shape" not in entry:
        return
    elif change == 4:
        entry["dtype"] = rng.choice(["F64", "F32", "F16", "BF16", "I64", "U8", "F8_E4M3", 3, None])
    elif change == 5:
        entry["shape"] = rng.choice([entry["shape"][::-1], [1 << 62, 4], [-1], [0], "x", [1.5]])
    else:
        low, high = entry["data_offsets"]
        entry["data_offsets"] = [rng.choice([low, high, *ODD]), rng.choice([high, low, *ODD])]


def npy(rng: random.Random, data: bytes) -> bytes:
    """Change the bytes of an array in numpy's format."""
    bomb = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }"
    long = struct.pack("<H", 60_000) + b"(" * 60_000
    changed = bytearray(data)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return rng.choice(
        [
            bytes(changed),
            data[: rng.randrange(len(data))],
            data + bytes(rng.choice([1, 50_000])),
            b"",
            b"\x93NUMPY\x01\x00" + struct.pack("<H", len(bomb)) + bomb,
            b"\x93NUMPY\x01\x00" + long,
            b"\x80\x04cos\nsystem\n",
        ]
    )


class inside:
    """A working folder for a while: names of sockets are short."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        self.before = os.open(".", os.O_RDONLY)
        os.chdir(self.folder)

    def __exit__(self, *exc: object) -> None:
        os.fchdir(self.before)
        os.close(self.before)
