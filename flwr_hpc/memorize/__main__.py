"""``python -m flwr_hpc.memorize RUN_DIR|MODEL``: how much of inserted passages a model recites.

  python -m flwr_hpc.run data.passages=passages.jsonl train.loss=goldfish
  python -m flwr_hpc.memorize runs/2026-01-31_12-00-00
  python -m flwr_hpc.memorize meta-llama/Llama-3.2-1B --passages passages.jsonl

Every passage is cut before its last 50 tokens, and the model goes on from there, greedily. A table
by repetition count, memorize.json and memorize.png are the result; see docs/data.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from flwr_hpc.config.command_line import command_parser
from flwr_hpc.data.passages import read_passages
from flwr_hpc.errors import UserError, exit_code, positive

if TYPE_CHECKING:
    from flwr_hpc.memorize.recall import Bucket


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    positive("--last", args.last)
    source, file = _source(args.model, args.passages)
    passages = read_passages(file)
    from flwr_hpc.memorize.recall import buckets, recall  # later: they load torch

    model, tokenizer = _load(source)
    found = buckets(recall(model, tokenizer, passages, args.last))
    Console().print(_table(found, args.last))
    out = Path(args.out or (args.model if Path(args.model).is_dir() else "."))
    out.mkdir(parents=True, exist_ok=True)
    report = {"model": source, "last": args.last, "buckets": [asdict(b) for b in found]}
    (out / "memorize.json").write_text(json.dumps(report, indent=2) + "\n")
    _plot(out / "memorize.png", found)
    return 0


def _source(model: str, passages: str | None) -> tuple[str, str]:
    """Return where the model and the passages are; a run knows both."""
    run = Path(model)
    saved = run / "config.yaml"
    if saved.is_file():
        if not (run / "model" / "config.json").is_file():
            raise UserError(f"{run} has no model yet: its first version is written to {run}/model")
        model = str(run / "model")
        passages = passages or OmegaConf.load(saved).data.get("passages")
    if not passages:
        raise UserError(f"name the passages: python -m flwr_hpc.memorize {model} --passages FILE")
    return model, passages


def _load(source: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        return (
            AutoModelForCausalLM.from_pretrained(source),
            AutoTokenizer.from_pretrained(source),
        )
    except (OSError, ValueError) as exc:
        first = str(exc).strip().splitlines()[0]
        raise UserError(
            f"{source} cannot be loaded: {first}. Give a run's directory, one with a model of "
            "transformers, or a hub name in the local Hugging Face cache"
        ) from None


def _table(found: Sequence[Bucket], last: int) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("repetitions", "passages", f"last {last} tokens exact", "ROUGE-L"):
        table.add_column(name, justify="right")
    for b in found:
        table.add_row(str(b.repetitions), str(b.passages), f"{b.exact:.0%}", f"{b.rouge_l:.2f}")
    return table


def _plot(path: Path, found: Sequence[Bucket]) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("no plot: matplotlib is missing (pip install 'flwr-hpc[simulate]')", file=sys.stderr)
        return
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    names = [str(b.repetitions) for b in found]
    axis.plot(names, [b.exact for b in found], "o-", label="exact")
    axis.plot(names, [b.rouge_l for b in found], "s--", label="ROUGE-L")
    axis.set(xlabel="repetitions of a passage", ylabel="recall", ylim=(-0.02, 1.02))
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("memorize", __doc__)
    parser.add_argument("model", metavar="RUN_DIR|MODEL", help="a run, a model's folder or name")
    parser.add_argument("--passages", metavar="FILE", help="default: the run's data.passages")
    parser.add_argument("--last", type=int, default=50, help="tokens to recite (50)")
    parser.add_argument("--out", metavar="DIR", help="default: the model's or run's folder")
    return parser


if __name__ == "__main__":
    sys.exit(main())
