"""The model as a Hugging Face directory: small files that a site makes, and the weights."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from flwr.app import ArrayRecord

from flwr_hpc.exchange.records import lazy_record, tensors
from flwr_hpc.exchange.tensorfile import TensorFile, write_stream
from flwr_hpc.files import publish, read_json
from flwr_hpc.protocol import BASE, BASE_FILE
from strategies.engine.messages import part_of

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


def write_model(folder: Path, arrays: ArrayRecord, factors: Path | None = None) -> None:
    """Complete a Hugging Face directory (a model's or an adapter's) with its weights.

    With `factors`, what `set_factors_apart` has kept belongs to them.
    """
    adapter = (folder / "adapter_config.json").exists()
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    kept = tensors(lazy_record(TensorFile(factors))) if factors else ()
    write_stream(folder / name, itertools.chain(tensors(arrays), kept))
