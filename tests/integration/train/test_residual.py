"""FedEx-LoRA and FLoRA on real trainers: a version is the average of the sites' merged models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import worlds.train.residual_scenarios as scenario
from flwr.app import Array, ArrayRecord
from safetensors.numpy import load_file, save_file
from worlds.train.torch_ranks import LLAMA, Team, start_teams, tiny_model

from flwr_hpc.server.model_dir import write_model
from strategies import Runtime
from strategies.lora.fedex_lora import FedExLora
from strategies.lora.flora import FLoRA
from strategies.parts import rules
from strategies.parts.buffer import Update

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
WEIGHTS = (3.0, 1.0)


@pytest.fixture(scope="module")
def teams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Team]]:
    yield from start_teams(tmp_path_factory.mktemp, (1, 2))


@dataclass
class Federation:
    """Two sites of one rank and a server, over a checkpoint in a folder."""

    team: Team
    folder: Path
    files: dict[str, str]
    ranks: tuple[int | None, int | None] = (None, None)  # of the sites' adapters

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def version(self, number: int) -> tuple[Path, Path | None]:
        """Return the files of a version's adapter and of its residual."""
        residual = self.folder / f"residual-{number}.safetensors"
        weights = self.folder / f"version-{number}.safetensors"
        return weights, residual if residual.exists() else None

    def merged(self, name: str, weights: Path, residual: Path | None) -> dict[str, np.ndarray]:
        """Return what peft makes of the adapter that a run would leave: one whole model."""
        import peft
        from transformers import AutoModelForCausalLM

        folder = self.folder / name
        folder.mkdir()
        for file, text in self.files.items():
            (folder / file).write_text(text)
        for _ in range(2):  # the second time as a run that had ended already
            write_model(folder, record(weights), residual=record(residual) if residual else None)
        model = AutoModelForCausalLM.from_pretrained(self.base)
        whole = peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
        whole.save_pretrained(folder / "merged")
        return {n: t.detach().numpy().astype(np.float64) for n, t in whole.state_dict().items()}

    def trained(self, number: int) -> list[Path]:
        """Have both sites train from a version."""
        paths = [self.folder / f"trained-{number}-{site}" for site in (0, 1)]
        for site, to in enumerate(paths):
            where = self.base, *self.version(number), site, to
            self.team.run(scenario.trained, *where, lora_r=self.ranks[site])
        return paths

    def aggregate(self, strategy: FedExLora, number: int, paths: list[Path]) -> None:
        """Make the next version of what they trained."""
        strategy.arrays = record(self.version(number)[0])
        updates = [
            Update(
                strategy.keep_tensors("delta", rules.record_delta(strategy.arrays, record(path))),
                *(f"site{k}", f"order-{k}", number, 1, 1, 1),
            )
            for k, path in enumerate(paths)
        ]
        new = {name: np.asarray(tensor) for name, tensor in strategy.merge(updates, WEIGHTS)}
        assert strategy.residual is not None
        save_file(new, self.folder / f"version-{number + 1}.safetensors")
        residual = {name: array.numpy() for name, array in strategy.residual.items()}
        save_file(residual, self.folder / f"residual-{number + 1}.safetensors")


def record(path: Path) -> ArrayRecord:
    return ArrayRecord({name: Array(tensor) for name, tensor in load_file(path).items()})


def federation(team: Team, folder: Path, config: dict[str, Any]) -> Federation:
    tiny_model(model=config).model.save_pretrained(folder / "base")  # type: ignore[operator]
    built = tiny_model(lora=True, path=str(folder / "base"))
    save_file(
        {built.names[n]: p.detach().numpy() for n, p in built.model.named_parameters()
         if n in built.names}, folder / "version-0.safetensors",
    )  # fmt: skip
    return Federation(team, folder, built.files)


@pytest.mark.parametrize(
    ("config", "strategy", "ranks"),
    [
        (LLAMA, FedExLora(), (None, None)),
        (GPT2, FedExLora(), (None, None)),
        (LLAMA, FLoRA(), (None, 2)),
    ],
    ids=["llama", "gpt2", "unlike ranks"],
)
def test_a_version_is_the_average_of_the_merged_models(
    teams: dict[int, Team],
    tmp_path: Path,
    config: dict[str, Any],
    strategy: FedExLora,
    ranks: tuple[int | None, int | None],
) -> None:
    """Protects the claim end to end, over three versions: what sites train on, what the server
    makes of it and what peft loads of a run's end are one model, to 1e-5."""
    fed = federation(teams[2 if ranks[1] else 1], tmp_path, config)
    fed.ranks = ranks
    strategy.runtime = Runtime()
    for number in range(3):
        paths = fed.trained(number)
        before = fed.version(number)[1]
        sites = [fed.merged(f"site-{number}-{k}", p, before) for k, p in enumerate(paths)]
        fed.aggregate(strategy, number, paths)
        weights, residual = fed.version(number + 1)
        after = fed.merged(f"global-{number + 1}", weights, residual)
        apart = fed.merged(f"apart-{number + 1}", weights, before)
        wrong, left_out = 0.0, 0.0
        for name, tensor in after.items():
            expected = np.average([site[name] for site in sites], axis=0, weights=WEIGHTS)
            wrong = max(wrong, float(np.abs(tensor - expected).max()))
            left_out = max(left_out, float(np.abs(apart[name] - expected).max()))
        assert wrong < 1e-5 < 0.05 * left_out
    config_file = json.loads((tmp_path / "global-3" / "adapter_config.json").read_text())
    assert config_file["lora_alpha"] / config_file["r"] == 2.0
    assert config_file["r"] > 4

    merged = teams[1].run(scenario.plain_loss, tmp_path / "global-3" / "merged")
    whole, without = teams[1].run(scenario.losses, fed.base, weights, [residual, None])
    assert whole == pytest.approx(merged, rel=1e-5)
    assert abs(without - merged) > 1e-4


@pytest.mark.parametrize("options", [{}, {"tensor": 2}], ids=["sharded", "split"])
def test_frozen_weights_are_set_and_never_added_to(
    teams: dict[int, Team], tmp_path: Path, options: dict[str, Any]
) -> None:
    """Protects sites that join late or start again, and shards: whatever a job had before, an
    order's residual makes the same weights of it, to the bit, and on two ranks the same."""
    fed = federation(teams[1], tmp_path, LLAMA)
    weights, _ = fed.version(0)
    shapes = {name: tensor.shape for name, tensor in load_file(weights).items()}
    files: list[Path | None] = [None]
    for rank in (2, 5):
        rng = np.random.default_rng(rank)
        path = tmp_path / f"rank-{rank}.safetensors"
        sizes = {n: (rank, s[1]) if ".lora_A." in n else (s[0], rank) for n, s in shapes.items()}
        drawn = {n: 0.2 * rng.standard_normal(s, dtype=np.float32) for n, s in sizes.items()}
        save_file(drawn, path)
        files.append(path)
    plain, two, five = files
    one = teams[1].run(scenario.losses, fed.base, weights, [plain, two, five])
    assert len(set(one)) == 3
    ranks = teams[2].run(
        scenario.losses, fed.base, weights, [five, plain, two, five, plain], **options
    )
    assert ranks[0] == ranks[3]
    assert ranks[1] == ranks[4]
    assert ranks[1:4] == pytest.approx(one, rel=1e-5)


def test_a_residual_that_does_not_fit_is_refused(teams: dict[int, Team], tmp_path: Path) -> None:
    """One that lacks a layer, or is of other sizes, changes nothing and is named."""
    fed = federation(teams[1], tmp_path, LLAMA)
    good = load_file(fed.version(0)[0])
    name = min(good)
    for wrong in ({k: x for k, x in good.items() if k != name}, {**good, name: good[name][:, 1:]}):
        save_file(wrong, tmp_path / "wrong")
        assert name in teams[2].run(scenario.refusal, fed.base, tmp_path / "wrong")


@pytest.mark.parametrize("number", [1, 2])
def test_a_weight_that_two_layers_share_is_refused(
    teams: dict[int, Team], tmp_path: Path, number: int
) -> None:
    """Protects tied embeddings: what is left out of the head would go into them, too."""
    fed = federation(teams[1], tmp_path, {**LLAMA, "tie_word_embeddings": True})
    found = teams[number].run(
        scenario.refusal, fed.base, fed.version(0)[0], targets="q_proj,lm_head"
    )
    assert "lm_head: its weight is that of another layer" in found
    assert not teams[number].run(scenario.refusal, fed.base, fed.version(0)[0])
