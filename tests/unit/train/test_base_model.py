"""Sites whose adapters would lie on different frozen bases."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from worlds.train.torch_ranks import TRAIN, TinyCorpus, tiny_model

from flwr_hpc.errors import UserError
from flwr_hpc.protocol import BASE, Order
from flwr_hpc.train import base_model
from flwr_hpc.train.base_model import (
    base_sha256,
    check_base,
    in_precision,
    load_quantized,
    quantized,
    with_factors,
)
from flwr_hpc.train.rendezvous import join
from flwr_hpc.train.trainer import Trainer
from flwr_hpc.worker.ranks import Ranks

TENSORS = {f"w{i}": np.arange(6, dtype=np.float32).reshape(2, 3) + i for i in range(3)}


def checkpoint(folder: Path, *parts: tuple[str, ...], **changed: np.ndarray) -> Path:
    """Write a checkpoint, its tensors dealt out among so many files."""
    folder.mkdir()
    for number, names in enumerate(parts or [tuple(TENSORS)]):
        tensors = {name: (TENSORS | changed)[name] for name in names}
        save_file(tensors, folder / f"model-{number}.safetensors")
    return folder


def test_the_same_tensors_have_the_same_hash(tmp_path: Path) -> None:
    """Protects sites with equal bases in other files, and adapters from bases that differ."""
    cache = tmp_path / "cache"
    whole = base_sha256(checkpoint(tmp_path / "whole"), cache)
    split = base_sha256(checkpoint(tmp_path / "split", ("w2",), ("w0", "w1")), cache)
    half = {"w1": TENSORS["w1"].astype(np.float16)}
    others = [checkpoint(tmp_path / "other", w0=TENSORS["w0"] + 1e-6),
              checkpoint(tmp_path / "half", **half)]  # fmt: skip
    assert whole == split
    assert len({whole, *(base_sha256(folder, cache) for folder in others)}) == 3


def test_a_base_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the start of later jobs from reading the checkpoint, unless its files changed."""
    folder, cache = checkpoint(tmp_path / "base"), tmp_path / "cache"
    first = base_sha256(folder, cache)
    monkeypatch.setattr(base_model, "_of_tensors", lambda _: "read again")
    assert base_sha256(folder, cache) == first
    os.utime(folder / "model-0.safetensors", ns=(1, 1))
    assert base_sha256(folder, cache) == "read again"


def test_a_frozen_a_belongs_to_the_base() -> None:
    """Protects FFA-LoRA: a site with another A is refused as one with another base is."""
    a = torch.arange(6.0).reshape(2, 3)
    hashes = [with_factors("base", [("q", factor)]) for factor in (a, a.clone(), a + 1, a.T)]
    assert hashes[0] == hashes[1]
    assert len({*hashes, with_factors("other", [("q", a)]), with_factors("base", [])}) == 5
    assert with_factors("base", []) == "base"


@pytest.mark.parametrize(("theirs", "refused"), [("a" * 64, False), ("b" * 64, True), ("", False)])
def test_an_order_of_another_base_is_refused(theirs: str, refused: bool) -> None:
    """Protects the average: adapters of different bases have no common meaning."""
    order = Order("run", "lumi", 1, "train", options={BASE: theirs} if theirs else {})
    if refused:
        with pytest.raises(UserError, match=r"base of lumi \(model.path\).*aaaaaaaaaaaa here"):
            check_base(order, "a" * 64)
    else:
        check_base(order, "a" * 64)


def test_a_packed_base_is_another_one() -> None:
    """Protects adapters from a base in another precision than the one they were trained on."""
    assert in_precision("base", "none") == "base"
    assert len({"base", in_precision("base", "nf4"), in_precision("other", "nf4")}) == 3


def test_packed_weights_are_not_cut(tmp_path: Path) -> None:
    """Protects 4-bit weights: whole numbers can be neither averaged nor cast to bf16 by FSDP."""
    group = join(tmp_path, Ranks(0, 1, 0, 1), timeout_s=600)
    built = tiny_model(lora=True)
    packed = torch.nn.Parameter(torch.arange(8, dtype=torch.uint8), requires_grad=False)
    built.model.get_submodule("base_model.model.lm_head").register_parameter("packed", packed)
    train = replace(TRAIN, precision="bf16")
    trainer = Trainer(built, TinyCorpus(), train, TRAIN.steps, group, 0)
    names = {type(p).__name__ for p in built.model.parameters()}
    assert (names, quantized(built.model)) == ({"DTensor", "Parameter"}, {packed})
    assert "packed" not in " ".join(trainer.exchanged)
    group.close()


def test_4_bits_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects users of an environment without it from a traceback in the job."""
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(UserError, match=r"pip install 'flwr-hpc\[qlora\]' in the environment"):
        load_quantized(None, "path")
