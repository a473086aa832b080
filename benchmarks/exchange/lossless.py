"""What Zstandard saves of what codecs make of real updates, and what it costs.

One facility of the demo trains a Llama whose tensors have more than one frame, a few orders long;
each order's update is packed by every codec, and the bytes are compressed frame by frame as the
stage `zstd` does it: at levels 1 and 3, with the bytes of numbers in planes and as they lie. Whole
weights in float32 are there for comparison. CPU seconds of one thread, the fastest of some passes.

    OMP_NUM_THREADS=1 python benchmarks/exchange/lossless.py [--orders N] [OVERRIDE ...]

Writes ``benchmarks/results/lossless.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flwr_hpc.config.compose import compose_config
from flwr_hpc.exchange.codec import make_codec
from flwr_hpc.exchange.codecs import zstd
from flwr_hpc.exchange.compression.update import Packed, Section, UpdateCodec, Values, joined
from flwr_hpc.exchange.tensorfile import TensorFile
from flwr_hpc.train.rendezvous import join
from flwr_hpc.worker.ranks import Ranks

sys.path.append(str(Path(__file__).parents[1]))
from _machine import record
from learning import trainers

SHAPE = ("hidden_size=384", "intermediate_size=1536", "num_attention_heads=4")
SETTINGS = [
    *(f"model.config.{value}" for value in (*SHAPE, "num_key_value_heads=4")),
    "train.steps=20",
]
CODECS = ["bf16", "int8", "int4", "int2", "topk", "topk,int8", "topk,int2"]
PASSES = 5


class Float32(UpdateCodec):
    """Values as they are."""

    period = 1

    def sections(self, count: int) -> tuple[Section, ...]:
        return (("<f4", count),)

    def pack(self, values: Values) -> Packed:
        return joined(values)

    def unpack(self, packed: Packed, count: int) -> Values:
        return packed.view(np.float32)


@dataclasses.dataclass
class Frame:
    """Bytes that are compressed together."""

    packed: Packed
    sections: tuple[Section, ...]

    def as_it_lies(self) -> Frame:
        return Frame(self.packed, (("u1", self.packed.size),))


def frames(codec: UpdateCodec, tensors: list[Values]) -> Iterator[Frame]:
    """Yield what a codec makes of tensors, as the stage cuts it."""
    size = zstd.Zstd(codec)._frame
    for values in tensors:
        for start in range(0, values.size, size):
            part = values[start : start + size]
            yield Frame(codec.pack(part), codec.sections(part.size))


def compressed(frame: Frame, level: int) -> list[Packed]:
    planes = zstd._planes(frame.packed, frame.sections)
    return [zstd._compressed(plane, level) for plane in planes]


def expanded(frame: Frame, written: list[Packed]) -> Packed:
    sizes = zstd._sizes(frame.sections)
    planes = [zstd._expanded(w, size) for w, size in zip(written, sizes, strict=True)]
    return zstd._joined_planes(planes, frame.sections)


def saved(found: list[Frame], level: int) -> float:
    """Return the percentage of the bytes that is saved, the table of lengths counted."""
    written = [part.size + 4 for frame in found for part in compressed(frame, level)]
    return 100.0 * (1.0 - sum(written) / sum(frame.packed.size for frame in found))


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds of the fastest of some passes."""
    taken = []
    for _ in range(PASSES):
        began = time.thread_time()
        work()
        taken.append(time.thread_time() - began)
    return min(taken)


def measure(name: str, codec: UpdateCodec, updates: list[list[Values]]) -> dict[str, Any]:
    """Return a row: a codec and what the stage saves of the updates of all orders."""
    by_order = [list(frames(codec, tensors)) for tensors in updates]
    each = [saved(found, 1) for found in by_order]
    last = by_order[-1]
    written = [compressed(frame, 1) for frame in last]
    for frame, parts in zip(last, written, strict=True):
        np.testing.assert_array_equal(expanded(frame, parts), frame.packed)
    packing = seconds(lambda: [compressed(frame, 1) for frame in last])
    unpacking = seconds(lambda: [expanded(f, w) for f, w in zip(last, written, strict=True)])
    mb = sum(frame.packed.size for frame in last) / 1e6
    values = sum(tensor.size for tensor in updates[-1])
    return {
        "codec": name,
        "share": round(1e6 * mb / (4 * values), 4),
        "saved_percent": round(statistics.mean(each), 1),
        "saved_of_orders": [round(one, 1) for one in each],
        "share_left": round(1e6 * mb / (4 * values) * (1 - each[-1] / 100), 4),
        "saved_level_3": round(statistics.mean(saved(f, 3) for f in by_order), 1),
        "saved_without_planes": round(
            statistics.mean(saved([f.as_it_lies() for f in found], 1) for found in by_order), 1
        ),
        "compress_mb_s": round(mb / packing),
        "expand_mb_s": round(mb / unpacking),
        # Of the line: below it, what is saved takes longer to send than both sides compute.
        "worth_below_mbit_s": round(8 * mb * each[-1] / 100 / (packing + unpacking)),
    }


def train(orders: int, overrides: list[str], folder: Path) -> list[tuple[TensorFile, TensorFile]]:
    """Train; return the weights before and after each order."""
    config, group = compose_config([*SETTINGS, *overrides]), join(folder, Ranks())
    site = next(iter(trainers(config, group).values()))
    site.save_weights(folder / "0.safetensors")
    for number in range(1, orders + 1):
        site.train(config.train.steps)
        site.save_weights(folder / f"{number}.safetensors")
        print(f"order {number}: loss {site.evaluate().loss:.3f}", flush=True)
    group.close()
    files = [TensorFile(folder / f"{number}.safetensors") for number in range(orders + 1)]
    return list(itertools.pairwise(files))


def main() -> None:
    """Train, measure, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--orders", type=int, default=4)
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        pairs = train(args.orders, args.overrides, Path(scratch))
        updates = [
            [(new.tensor(n) - old.tensor(n)).reshape(-1) for n in new.layout] for old, new in pairs
        ]
        weights = [[new.tensor(n).reshape(-1) for n in new.layout] for _, new in pairs]
        rows = [measure("full", Float32(), weights)]
        for name in CODECS:
            codec = make_codec(name.split(","))
            assert isinstance(codec, UpdateCodec)
            rows.append(measure(name, codec, updates))
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    config = compose_config([*SETTINGS, *args.overrides])
    used = ("model", "data", "train")
    values = sum(tensor.size for tensor in weights[-1])
    figures = {"parameters": values, "zstd": zstd.zstd.zstd_version, "rows": rows}
    record("lossless", figures, {key: dataclasses.asdict(config)[key] for key in used})


if __name__ == "__main__":
    main()
