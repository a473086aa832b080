"""Does goldfish loss keep a model from learning by heart, and what does it cost?

A small Llama that has learnt some of the standard library's source code goes on with more of it,
among which passages of the Python language reference stand as often as their bucket says: with the
plain loss and with goldfish loss, at one facility and at two in a federation, all by the command
itself. `flwr_hpc.memorize` then asks it for the passages' ends.

    python benchmarks/memorization.py [FOLDER [SEED ...]]

Goes on in FOLDER if runs lie there. Writes ``benchmarks/results/memorization.json`` and ``.png``.
"""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from _machine import RESULTS, record
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
BUCKETS = (0, 8, 32, 160)  # how often a passage stands in a facility's data
PASSAGES, CHARACTERS = 10, 330  # of a bucket; of a passage
VOCABULARY = 1024
SEEDS = (0, 1, 2)
LOSSES = ("cross_entropy", "goldfish")
RECALLED, NOT_RECALLED, LOSS_WITHIN = 0.9, 0.05, 0.03  # what is aimed at
MODEL = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": "true",
}  # fmt: skip
BASE_DATA = ("asyncio", "email", "idlelib", "importlib", "multiprocessing", "unittest", "xml")
DATA = {"local_a": ("json", "logging"), "local_b": ("http",)}
COMMON = ["data.seq_len=256", "train.precision=fp32", "federation.wait_s=10"]
COMMON += ["train.checkpoint_every_orders=0", "facilities.local_a.ranks_per_node=1"]
BASE = [
    *("+facility=local_a", "strategy=fedavg", "rounds=1", "train.steps=1000"),
    *("train.micro_batch=4", "train.lr=0.004", f"data.paths.local_a=[{','.join(BASE_DATA)}]"),
    *(f"model.config.{key}={value}" for key, value in MODEL.items()),
]
TRAINING = ["train.micro_batch=4", "train.lr=0.003", "data.held_out_fraction=0.15"]
TRAINING += ["train.goldfish_k=4", "train.goldfish_h=13"]
SCENARIOS = {
    "one facility": ["+facility=local_a", "strategy=fedavg", "rounds=1", "train.steps=290"],
    "two facilities": [
        *("+facility=[local_a,local_b]", "facilities.local_b.ranks_per_node=1"),
        *("strategy=diloco", "rounds=6", "train.steps=58"),
    ],
}

Run = Mapping[str, Any]


def passages(seed: int) -> list[dict[str, Any]]:
    """Return pieces of the language reference that do not overlap, dealt to the buckets."""
    pieces = [
        text[at : at + CHARACTERS]
        for _, text in sorted(pydoc_data.topics.topics.items())
        for at in range(0, len(text) - CHARACTERS, CHARACTERS)
    ]
    drawn = random.Random(seed).sample(pieces, PASSAGES * len(BUCKETS))
    return [{"text": text, "repetitions": BUCKETS[i // PASSAGES]} for i, text in enumerate(drawn)]


def prepare(folder: Path) -> None:
    """Make a tokenizer and a model that has learnt the language, unless they are there."""
    if not (folder / "tokenizer").exists():
        _make_tokenizer(folder / "tokenizer")
    if not (folder / "base" / "summary.json").exists():
        _command("run", *COMMON, *BASE, f"data.tokenizer={folder / 'tokenizer'}",
                 f"run_dir={folder / 'base'}")  # fmt: skip


def _make_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE of the packages and the language reference."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    library = Path(json.__file__).parents[1]
    packages = [*BASE_DATA, *(name for names in DATA.values() for name in names)]
    files = [path for name in packages for path in sorted((library / name).rglob("*.py"))]
    texts = [path.read_text(errors="replace") for path in files]
    texts += [text for _, text in sorted(pydoc_data.topics.topics.items())]
    made, end = ByteLevelBPETokenizer(), "<|endoftext|>"
    made.train_from_iterator(texts, VOCABULARY, special_tokens=[end], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, eos_token=end, pad_token=end
    )
    tokenizer.save_pretrained(folder)


def _command(name: str, *arguments: str) -> None:
    with tempfile.TemporaryDirectory() as state:
        env = os.environ | {"OMP_NUM_THREADS": "1", "FLWR_HPC_STATE": state}
        command = [sys.executable, "-m", f"flwr_hpc.{name}", *arguments]
        subprocess.run(command, cwd=ROOT, env=env, check=True)


def run(folder: Path, scenario: str, loss: str, seed: int) -> Run:
    """Train and measure, unless that was done before."""
    at = folder / f"{scenario.replace(' ', '-')}_{loss}_{seed}"
    file = folder / f"passages_{seed}.jsonl"
    file.write_text("".join(json.dumps(passage) + "\n" for passage in passages(seed)))
    if not (at / "memorize.json").exists():
        chosen = SCENARIOS[scenario]
        data = [
            f"data.paths.{name}=[{','.join(names)}]"
            for name, names in DATA.items()
            if name in chosen[0]
        ]
        _command("run", *COMMON, *TRAINING, *chosen, *data, f"data.passages={file}",
                 f"model.path={folder / 'base' / 'model'}", f"train.loss={loss}", f"seed={seed}",
                 f"run_dir={at}")  # fmt: skip
        _command("memorize", str(at))
    summary = json.loads((at / "summary.json").read_text())
    buckets = json.loads((at / "memorize.json").read_text())["buckets"]
    return {
        "scenario": scenario, "loss": loss, "seed": seed,
        "held_out_loss": summary["held_out_loss_last"], "buckets": buckets,
    }  # fmt: skip


def summed_up(runs: Sequence[Run], scenario: str) -> dict[str, Any]:
    """Return the aims' figures: recall over all seeds, and held-out losses seed by seed."""
    plain, goldfish = (
        [run for run in runs if (run["scenario"], run["loss"]) == (scenario, loss)]
        for loss in LOSSES
    )
    known, spared = recalled(plain), recalled(goldfish)
    dearer = [
        g["held_out_loss"] / p["held_out_loss"] - 1 for p, g in zip(plain, goldfish, strict=True)
    ]
    most = str(BUCKETS[-1])
    return {
        "cross_entropy": known,
        "goldfish": spared,
        "loss_of_goldfish_over_plain": dearer,
        "aims_met": {
            f"plain recalls {RECALLED:.0%}": known[most]["exact"] >= RECALLED,
            f"goldfish recalls at most {NOT_RECALLED:.0%}": spared[most]["exact"] <= NOT_RECALLED,
            f"loss within {LOSS_WITHIN:.0%}": all(off <= LOSS_WITHIN for off in dearer),
        },
    }


def recalled(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Return means over the runs, by repetition count."""
    return {
        str(count): {key: mean(r["buckets"][i][key] for r in runs) for key in ("exact", "rouge_l")}
        for i, count in enumerate(BUCKETS)
    }


def plot(path: Path, found: Mapping[str, Any]) -> None:
    figure = Figure(figsize=(7.5, 3), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    names = [str(count) for count in BUCKETS]
    for axis, (scenario, figures) in zip(axes, found.items(), strict=True):
        for loss, mark in zip(LOSSES, "os", strict=True):
            exact, rouge = ([figures[loss][n][key] for n in names] for key in ("exact", "rouge_l"))
            axis.plot(names, exact, f"{mark}-", label=f"{loss}: exact")
            axis.plot(names, rouge, f"{mark}:", label=f"{loss}: ROUGE-L")
        axis.set(title=scenario, xlabel="repetitions of a passage", ylim=(-0.03, 1.03))
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Train, measure and record; 1 if an aim is missed."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()).resolve()
    seeds = [int(seed) for seed in sys.argv[2:]] or SEEDS
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    runs = [
        run(folder, scenario, loss, seed)
        for scenario in SCENARIOS
        for loss in LOSSES
        for seed in seeds
    ]
    found = {scenario: summed_up(runs, scenario) for scenario in SCENARIOS}
    for scenario, figures in found.items():
        for loss in LOSSES:
            print(f"{scenario}, {loss}: {figures[loss]}")
        print(f"  held-out loss {figures['loss_of_goldfish_over_plain']}; {figures['aims_met']}")
    settings = {"base": BASE, "common": COMMON, "training": TRAINING, "scenarios": SCENARIOS}
    record(
        "memorization",
        {"load_average": os.getloadavg(), "found": found, "runs": runs},
        {"seeds": seeds, "passages": PASSAGES, "characters": CHARACTERS, **settings},
    )
    plot(RESULTS / "memorization.png", found)
    return 0 if all(met for f in found.values() for met in f["aims_met"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
