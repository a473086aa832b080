"""FFA-LoRA on a real trainer of one rank: what is written, trained and averaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from safetensors.numpy import load_file
from worlds.train.torch_ranks import SEQ_LEN, TRAIN, TinyCorpus, TinyTokenizer, tiny_model

from flwr_hpc.config.schema import LoraConfig, ModelConfig
from flwr_hpc.errors import UserError
from flwr_hpc.train.model import build
from flwr_hpc.train.rendezvous import join
from flwr_hpc.train.trainer import Trainer
from flwr_hpc.worker.ranks import Ranks
from strategies.parts.lora.adapters import inexactness, mean_of


def test_two_sites_with_one_a_are_averaged_exactly(tmp_path: Path) -> None:
    """Protects FFA-LoRA's claim: the first weights hold A, training leaves it, the figure is 0."""
    group = join(tmp_path / "ranks", Ranks(0, 1, 0, 1), timeout_s=600)
    built = tiny_model(lora=True, freeze_a=True)
    trainer = Trainer(built, TinyCorpus(), TRAIN, TRAIN.steps, group, 0)
    trainer.stage_initial(tmp_path / "initial").publish()
    initial = load_file(tmp_path / "initial")
    b = {name: value for name, value in initial.items() if ".lora_B." in name}
    a = {name: value for name, value in initial.items() if ".lora_A." in name}
    assert set(initial) == {*a, *b}
    assert len(a) == len(b) > 0
    sites = []
    for scale in (1.0, 3.0):
        trainer.load_weights(_file(tmp_path / "b", b))
        trainer.lr_scale = scale
        trainer.train(2)
        trainer.save_weights(tmp_path / "trained")
        sites.append(load_file(tmp_path / "trained"))
    trainer.stage_initial(tmp_path / "end").publish()
    end = load_file(tmp_path / "end")
    group.close()
    assert all(np.array_equal(end[name], a[name]) for name in a)
    assert all(site.keys() == b.keys() for site in sites)
    assert all(not np.array_equal(sites[0][name], sites[1][name]) for name in b)
    whole = [ArrayRecord({n: Array(t) for n, t in (site | a).items()}) for site in sites]
    assert inexactness(mean_of(whole, [1.0, 2.0])) == 0.0


def _file(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    from safetensors.numpy import save_file

    save_file(tensors, path)
    return path


def test_embeddings_cannot_keep_their_a(tmp_path: Path) -> None:
    """Protects from an adapter that can never learn: peft begins an embedding's A at zero."""
    tiny_model().model.save_pretrained(tmp_path)  # type: ignore[operator]
    lora = LoraConfig(r=2, target_modules="embed_tokens,q_proj", freeze_a=True)
    with pytest.raises(UserError, match="adapters of embeddings"):
        build(ModelConfig(path=str(tmp_path), lora=lora), TinyTokenizer(), 0, SEQ_LEN)
