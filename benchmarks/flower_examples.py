"""Flower's own examples, first in plain Flower and then in batch jobs: is it the same model?

  git clone https://github.com/flwrlabs/flower
  pip install flwr-datasets pillow tensorboard
  python benchmarks/flower_examples.py --checkout flower --config-dir DIR --facility NAME [NAMES]

FlowerTune wants a Python environment with the versions that it pins, and with this package.

Through Flower's own SuperLink and two SuperNodes. What is changed in a copy of an example: the line
with `flwr_hpc.batch`, a seed in the package's `__init__.py` (without which two runs of plain Flower
differ as well), and random data in folders of the data sets' names, which `load_dataset` takes for
them. `flower_standins/` holds what cannot be had offline. The copies' code is Flower's, not ours.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.torch import load_file

from flwr_hpc.flower.commands import FLOWER_ENV
from flwr_hpc.server.bundle import connection

ROOT = Path(__file__).parents[1]
NODES = 2
SEED = "\nimport random, numpy, torch\nrandom.seed(0), numpy.random.seed(0), torch.manual_seed(0)\n"
# By Flower, after the examples of a checkout as of 2026-04; a newer one needs none of it.
RENAMED = {
    "from flwr.common.typing import UserConfig": "from flwr.app import UserConfig",
    "from flwr.client.typing import": "from flwr.clientapp.typing import",
}
ONE_LINE = "import flwr_hpc\napp = ClientApp(mods=[flwr_hpc.batch()])\n"


@dataclass(frozen=True)
class Example:
    """An example, and what is to be known of it."""

    folder: str
    package: str
    config: str  # For `flwr run -c`
    before: str = "app = ClientApp()\n"  # What the line with the mod takes the place of
    plain: str = ""  # What it takes the place of in plain Flower, if not itself
    batch: str = ONE_LINE
    model: str = "final_model.pt"  # What it leaves, where its ServerApp ran


LOCAL_DP = "{}from flwr.clientapp.mod import LocalDpMod\n"
LOCAL_DP += "app = ClientApp(mods=[{}LocalDpMod(1, 0.1, 1, 0.1)])\n"
QUICKSTART = "num-server-rounds=2 fraction-evaluate=1.0"
EXAMPLES = {
    "quickstart-pytorch": Example("quickstart-pytorch", "pytorchexample", QUICKSTART),
    "local-dp": Example(  # no evaluation: `LocalDpMod` refuses replies without weights
        "quickstart-pytorch", "pytorchexample", "num-server-rounds=2 fraction-evaluate=0.0",
        plain=LOCAL_DP.format("", ""),
        batch=LOCAL_DP.format("import flwr_hpc\n", "flwr_hpc.batch(), "),
    ),
    "custom-mods": Example(
        "custom-mods", "custom_mods", QUICKSTART,
        before="app = ClientApp(\n    mods=[\n",
        batch="import flwr_hpc\napp = ClientApp(\n    mods=[\n        flwr_hpc.batch(),\n",
    ),
    "advanced-pytorch": Example("advanced-pytorch", "pytorch_example", "num-server-rounds=2"),
    "quickstart-huggingface": Example(
        "quickstart-huggingface", "huggingface_example",
        'num-server-rounds=2 fraction-train=1.0 fraction-evaluate=1.0 model-name="./bert"',
    ),
    "flowertune-llm": Example(
        "flowertune-llm", "flowertune_llm",
        'num-server-rounds=2 strategy.fraction-train=1.0 model.name="./llama" '
        "train.training-arguments.per-device-train-batch-size=2",
        model="results/*/peft_2/adapter_model.*",
    ),
}  # fmt: skip


def write_data(folder: Path) -> None:
    """Write random data sets under the names of those that the examples download."""
    from datasets import Dataset
    from PIL import Image

    random = np.random.default_rng(0)

    def images(rows: int, key: str, *shape: int) -> dict[str, list[Any]]:
        pixels = random.integers(0, 256, (rows, *shape), dtype=np.uint8)
        return {key: [Image.fromarray(p) for p in pixels], "label": [i % 10 for i in range(rows)]}

    def texts(rows: int) -> dict[str, list[Any]]:
        words = ["good", "bad", "film", "plot", "actor"]
        return {"text": [" ".join(random.choice(words, 20)) for _ in range(rows)],
                "label": [i % 2 for i in range(rows)]}  # fmt: skip

    def orders(rows: int) -> dict[str, list[Any]]:
        said = texts(rows)["text"]
        return {"instruction": said, "input": [""] * rows, "output": said}

    for split, rows in (("train", 160), ("test", 40)):
        for name, columns in (
            ("uoft-cs/cifar10", images(rows, "img", 32, 32, 3)),
            ("zalando-datasets/fashion_mnist", images(rows, "image", 28, 28)),
            ("stanfordnlp/imdb", texts(rows)),
            ("vicgalle/alpaca-gpt4", orders(rows)),
        ):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Dataset.from_dict(columns).to_parquet(folder / name / f"{split}.parquet")
    write_bert(folder / "bert")
    write_llama(folder / "llama")


def write_bert(folder: Path) -> None:
    """Write a tiny BERT of random weights."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "plot", "actor"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(words), intermediate_size=32, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)


def write_llama(folder: Path) -> None:
    """Write a tiny Llama of random weights, and a tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: k for k, word in enumerate(["<unk>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(words), intermediate_size=128, **sizes)
    ).save_pretrained(folder)


def copy_example(example: Example, checkout: Path, target: Path, line: str) -> None:
    """Copy an example with another line for its ClientApp, and a seed."""
    shutil.copytree(checkout / "examples" / example.folder, target)
    client = target / example.package / "client_app.py"
    text = client.read_text()
    assert text.count(example.before) == 1, f"{client} is not as it was: look at it"
    client.write_text(text.replace(example.before, line))
    for path in target.rglob("*.py"):
        for old, new in RENAMED.items():
            path.write_text(path.read_text().replace(old, new))
    init = target / example.package / "__init__.py"
    init.write_text(init.read_text() + SEED)


class Flower:
    """SuperLink and SuperNodes in a folder."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self._args, self._port = folder, args, free_port()
        self._bin = Path(sys.executable).parent
        paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(":")]
        standins = ROOT / "benchmarks" / "flower_standins"
        own = {
            "FLWR_HOME": str(folder / "home"), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1", "PATH": f"{self._bin}:{os.environ['PATH']}",
            "PYTHONPATH": ":".join([p for p in paths if p] + [str(standins)]),
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "WANDB_DISABLED": "true",  # else transformers takes the stand-in for the whole
        }  # fmt: skip
        self._env = {**os.environ, **FLOWER_ENV, **own}
        self._processes: list[subprocess.Popen[bytes]] = []
        (folder / "home").mkdir()
        config = connection(f"127.0.0.1:{self._port}")
        (folder / "home" / "config.toml").write_text(config)

    def start(self) -> None:
        """Start the servers; `flwr run` waits for them."""
        address = f"127.0.0.1:{self._port}"
        needs = "--disable-runtime-dependency-installation"
        self._start("superlink", "flower-superlink", f"--port={self._port}", needs)
        while not _listening(self._port):
            time.sleep(0.2)
        settings = {"facility": self._args.facility, "config-dir": self._args.config_dir}
        words = [f'flwr-hpc.{k}="{v}"' for k, v in settings.items() if v]
        words += ["flwr-hpc.nodes=1", "flwr-hpc.idle-timeout-s=120", *self._args.set]
        for k in range(NODES):
            config = " ".join([f"partition-id={k} num-partitions={NODES}", *words])
            port, node = f"--port={free_port()}", f"--node-config={config}"
            self._start(f"node{k}", "flower-supernode", f"--superlink={address}", port, node)

    def run(self, app: Path, example: Example) -> dict[str, Any]:
        """Run an app to its end and return its model."""
        for old in self.folder.glob(example.model):
            old.unlink()
        command = [str(self._bin / "flwr"), "run", str(app), "flwr-hpc", "--stream"]
        command += ["-c", example.config]
        done = subprocess.run(
            command, env=self._env, cwd=self.folder, capture_output=True, text=True, check=False
        )
        (app / "run.log").write_text(done.stdout + done.stderr)
        model = next(self.folder.glob(example.model), None)
        if model is None:
            raise RuntimeError(
                f"no model. {app}/run.log ends:\n{(done.stdout + done.stderr)[-2000:]}"
            )
        if "and 0 failures" not in done.stdout or re.search(r"and [1-9]\d* failures", done.stdout):
            raise RuntimeError(f"messages failed: see {app}/run.log and {self.folder}/node0.log")
        loaded: dict[str, Any]
        loaded = load_file(model) if model.suffix == ".safetensors" else torch.load(model)
        return loaded

    def jobs(self) -> int:
        """Return how many jobs there were so far."""
        return len(list(self.folder.glob("flwr-hpc-batch/*/*/*/allocations/*/job.json")))

    def stop(self) -> None:
        """End Flower's processes; jobs end by themselves when idle."""
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()

    def _start(self, name: str, program: str, *arguments: str) -> None:
        with open(self.folder / f"{name}.log", "wb") as log:
            command = [str(self._bin / program), "--insecure", *arguments]
            self._processes.append(
                subprocess.Popen(command, stdout=log, stderr=log, env=self._env, cwd=self.folder)
            )


def free_port() -> int:
    """Return a port that nobody has now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _listening(port: int) -> bool:
    return any(c.laddr.port == port and c.status == "LISTEN" for c in psutil.net_connections("tcp"))


@contextlib.contextmanager
def flower(args: argparse.Namespace) -> Iterator[Flower]:
    """Run Flower's servers in a folder that is kept if something goes wrong."""
    folder = Path(tempfile.mkdtemp(prefix="flower-examples-", dir=args.workdir))
    write_data(folder)
    servers = Flower(folder, args)
    try:
        servers.start()
        yield servers
    finally:
        servers.stop()
    print(f"logs: {folder}")


def compare(name: str, servers: Flower, checkout: Path) -> dict[str, Any]:
    """Run an example both ways and hold the models against each other."""
    example, models, seconds = EXAMPLES[name], [], []
    before = servers.jobs()
    for way, line in (("plain", example.plain or example.before), ("batch", example.batch)):
        app = servers.folder / name / way
        copy_example(example, checkout, app, line)
        began = time.monotonic()
        models.append(servers.run(app, example))
        seconds.append(round(time.monotonic() - began))
    plain, batch = models
    same = plain.keys() == batch.keys() and all(torch.equal(plain[k], batch[k]) for k in plain)
    jobs = servers.jobs() - before
    assert jobs, "nothing ran in a job"
    return {
        "example": name,
        "equal": same,
        "jobs": jobs,
        "plain_s": seconds[0],
        "batch_s": seconds[1],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", type=Path, help="a clone of flwrlabs/flower")
    parser.add_argument("examples", nargs="*", help=f"of: {', '.join(EXAMPLES)}")
    parser.add_argument("--facility", default="local_a")
    parser.add_argument("--config-dir", default="", help="with facility files of yours")
    parser.add_argument(
        "--workdir", default=None, help="a shared folder (default: a temporary one)"
    )
    parser.add_argument("--set", nargs="*", default=[], help="more of the node config")
    args = parser.parse_intermixed_args()
    if args.checkout is None:  # `make bench` runs every script as it stands
        print("left out: name a clone of flwrlabs/flower with --checkout DIR")
        return 0
    for package in ("flwr_datasets", "PIL"):
        if importlib.util.find_spec(package) is None:
            parser.error(f"needs {package}: pip install flwr-datasets pillow tensorboard")
    failed = False
    with flower(args) as servers:
        for name in args.examples or EXAMPLES:
            try:
                result = compare(name, servers, args.checkout)
            except (RuntimeError, AssertionError) as exc:
                result = {"example": name, "error": str(exc)}
            failed |= not result.get("equal", False)
            print(json.dumps(result), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
