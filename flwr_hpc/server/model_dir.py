"""The model as a Hugging Face directory: small files that a site makes, and the weights."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from flwr_hpc.exchange.records import lazy_record, tensors
from flwr_hpc.exchange.tensorfile import TensorFile, aligned, write_safetensors, write_stream
from flwr_hpc.exchange.tensors import Layout, TensorInfo
from flwr_hpc.files import publish, read_json
from flwr_hpc.protocol import BASE, BASE_FILE
from strategies.engine.messages import part_of
from strategies.parts.rules import Record

# What transformers, tokenizers and peft save as text. No code: who loads the model would run it.
SMALL_FILES = (
    "adapter_config.json",
    BASE_FILE,
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "README.md",
    "special_tokens_map.json",
    "spiece.vocab",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
MODEL, ADAPTER = "model.safetensors", "adapter_model.safetensors"
INDEX = f"{MODEL}.index.json"
SHARD_BYTES = 5 * 10**9
MOST_BYTES = 64 << 20  # of a file; tokenizers of 250,000 words have 20 to 35 million

log = logging.getLogger("flwr_hpc")


def publish_files(folder: Path, files: Mapping[str, str]) -> None:
    """Write the small files that a site sent, as far as a model has such files."""
    for name, text in files.items():
        if name not in SMALL_FILES:
            log.warning("left out of %s: '%s' is no file of a model", folder, name[:100])
        elif len(data := text.encode(errors="replace")) > MOST_BYTES:
            log.warning("left out of %s: %s has %d bytes", folder, name, len(data))
        else:
            publish(folder / name, data)


def base_options(folder: Path) -> dict[str, str]:
    """Return the options of orders that have sites compare their base; none without an adapter."""
    try:
        sha256 = str((read_json(folder / BASE_FILE) or {}).get("sha256", ""))
    except ValueError:  # what a site sent
        return {}
    return {BASE: sha256} if re.fullmatch("[0-9a-f]{64}", sha256) else {}


def set_factors_apart(path: Path, initial: ArrayRecord) -> ArrayRecord:
    """Keep an adapter's A, which stays as it is, in a file; return what is trained."""
    frozen = [name for name in initial if ".lora_A." in name]
    write_stream(path, tensors(part_of(initial, frozen)))
    return part_of(initial, [name for name in initial if name not in frozen])


def write_model(
    folder: Path,
    arrays: ArrayRecord,
    factors: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    residual: Record | None = None,
) -> None:
    """Complete a Hugging Face directory (a model's or an adapter's) with its weights.

    One tensor after the other is loaded. Files left by an earlier call that cut the model
    otherwise are removed: transformers would take them first.

    Parameters
    ----------
    folder : Path
    arrays : ArrayRecord
    factors : Path or None
        What `set_factors_apart` has kept, which belongs to them.
    shard_bytes : int
        Larger models are cut into files of at most so many bytes of tensors, with the index that
        transformers reads; a larger tensor has a file of its own. An adapter is one file.
    residual : Record or None
        What training added to the frozen weights; it becomes a part of the adapter,
        ``B A + U V = [B U] [A; V]``.
    """
    if (folder / "adapter_config.json").exists():
        kept = tensors(lazy_record(TensorFile(factors))) if factors else ()
        plain = itertools.chain(tensors(arrays), kept)
        write_stream(folder / ADAPTER, _widened(folder, arrays, residual) if residual else plain)
        return
    infos = {name: _info(array) for name, array in arrays.items()}
    parts = _shards(infos, shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    for name, part in zip(names if len(parts) > 1 else [MODEL], parts, strict=True):
        layout = aligned({tensor: infos[tensor] for tensor in part})
        write_safetensors(folder / name, ((t, arrays[t].numpy()) for t in layout), layout)
    written = {MODEL}
    if len(parts) > 1:
        publish(folder / INDEX, _index(infos, dict(zip(names, parts, strict=True))))
        written = {INDEX, *names}
    for old in [folder / MODEL, folder / INDEX, *folder.glob("model-*-of-*.safetensors")]:
        if old.name not in written:
            old.unlink(missing_ok=True)


def _info(array: Array) -> TensorInfo:
    scalar = TensorInfo.of(np.empty(0, np.dtype(array.dtype)))
    return TensorInfo(scalar.dtype, tuple(array.shape))


def _shards(layout: Layout, most: int) -> list[list[str]]:
    """Deal out tensors in their order; a new file begins where one would grow above `most`."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, info in layout.items():
        if parts[-1] and size + info.nbytes > most:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += info.nbytes
    return parts


def _index(layout: Layout, files: Mapping[str, list[str]]) -> str:
    total = {
        "total_parameters": sum(info.size for info in layout.values()),
        "total_size": sum(info.nbytes for info in layout.values()),
    }
    of = {name: file for file, names in files.items() for name in names}
    return json.dumps({"metadata": total, "weight_map": of}, indent=2, sort_keys=True) + "\n"


def _widened(
    folder: Path, arrays: ArrayRecord, residual: Record
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield an adapter with its residual, all of one rank; note that in its configuration."""
    config = read_json(folder / "adapter_config.json") or {}
    most = max(len(v.numpy()) for name, v in residual.items() if ".lora_A." in name)
    rank = most + next(len(a.numpy()) for name, a in arrays.items() if ".lora_A." in name)
    scale = config["lora_alpha"] / config["r"]  # the same at any rank: it may be noted already
    noted = {**config, "r": rank, "lora_alpha": scale * rank}
    publish(folder / "adapter_config.json", json.dumps(noted, indent=2, sort_keys=True))
    for name, array in arrays.items():
        axis = 0 if ".lora_A." in name else 1
        both = np.concatenate([array.numpy(), residual[name].numpy()], axis)
        missing = [(0, 0), (0, 0)]
        missing[axis] = (0, rank - both.shape[axis])
        yield name, np.pad(both, missing)
