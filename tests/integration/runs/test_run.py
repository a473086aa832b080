"""Whole runs of the command: real Flower processes, real jobs, real torch.distributed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from worlds.runs.run import ONE_SITE, ROOT, Run


def test_run_directory_is_complete(undisturbed: Run) -> None:
    """Protects what a user finds after a run."""
    for name in ("config.yaml", "run.json", "events.jsonl", "summary.json", "report.html"):
        assert (undisturbed.dir / name).stat().st_size > 0, name
    assert sorted(p.name for p in (undisturbed.dir / "jobs").iterdir()) == [
        "local_a.sh",
        "local_b.sh",
    ]
    assert {p.stem for p in (undisturbed.dir / "logs").glob("*.log")} >= {"superlink", "server_app"}


def test_summary_tells_what_happened(undisturbed: Run) -> None:
    """Protects the fields of summary.json that users and sweeps read."""
    summary = undisturbed.summary()
    assert summary["status"] == "finished"
    assert summary["strategy"] == "strategies.diloco.DiLoCo"
    assert summary["versions"] == 2
    assert summary["wall_s"] > 0
    for facility in ("local_a", "local_b"):
        site = summary["facilities"][facility]
        assert site["held_out_loss_last"] < site["held_out_loss_first"]
        assert site["steps"] == 300
        assert site["tokens"] > 0
        assert {"queue", "startup", "load", "train", "transfer", "idle"} <= set(site["seconds"])
        assert site["seconds"]["train"] > 0


def test_model_loads_with_transformers(undisturbed: Run) -> None:
    """Protects `AutoModelForCausalLM.from_pretrained(run/model)`, tokenizer included."""
    code = """if True:
        import sys
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
        assert not info["unexpected_keys"] and not info["mismatched_keys"], info
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
        ids = tokenizer("import ", return_tensors="pt", add_special_tokens=False)
        print(tokenizer.decode(model.generate(**ids, max_new_tokens=8)[0]))
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(undisturbed.dir / "model")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "import" in done.stdout


def test_no_process_is_left(undisturbed: Run) -> None:
    """Protects login nodes from forgotten processes."""
    assert undisturbed.left_behind() == []


def test_last_line_says_where_and_how_to_load(undisturbed: Run) -> None:
    """Protects the command's last word."""
    last = undisturbed.said().strip().splitlines()[-1]
    assert "with spaces/model" in last
    assert "from_pretrained" in last


def test_every_order_is_in_the_event_log(undisturbed: Run) -> None:
    """Protects the record: each order sent was done, once."""
    sent = {e["order_id"] for e in undisturbed.events("order_sent")}
    done = [e["order_id"] for e in undisturbed.events("order_done")]
    assert sorted(sent) == sorted(done)
    assert len(set(done)) == len(done)


def test_a_run_that_has_ended_leaves_its_last_checkpoints(undisturbed: Run) -> None:
    """Protects disks: of weights the model and the server's checkpoint are left; of each site its
    last checkpoint, which has the optimizer's state."""
    weights = sorted(undisturbed.dir.rglob("*.safetensors"))
    places = [str(p.relative_to(undisturbed.dir).parts[0]) for p in weights]
    assert places == ["checkpoints", "checkpoints", "model"]
    for facility in ("local_a", "local_b"):
        checkpoints = undisturbed.dir / "facilities" / facility / "checkpoints"
        assert len(list(checkpoints.iterdir())) == 1


def test_a_finished_run_is_not_started_again(undisturbed: Run) -> None:
    """Protects an allocation from being asked for in vain."""
    again = Run(undisturbed.dir, resume=True)
    assert again.end() == 0
    assert "finished already" in again.said()


def test_a_finished_run_goes_on_for_more_rounds(undisturbed: Run, tmp_path: Path) -> None:
    """Protects `resume=` with more rounds, also of a run that was moved."""
    moved = tmp_path / "moved"
    shutil.copytree(undisturbed.dir, moved)
    again = Run(moved, "rounds=3", "train.steps=30", resume=True)
    assert again.end() == 0, again.said()
    summary = again.summary()
    assert summary["versions"] == 3
    assert summary["facilities"]["local_a"]["steps"] == 330


def test_asynchronous_strategy_with_updates_both_ways(tmp_path: Path) -> None:
    """Protects FedBuff end to end, and weights that travel as compressed 8-bit updates there and
    back: those of the site with two ranks in shards."""
    few = ("rounds=3", "train.steps=40", "exchange.inline_below_mb=0", "train.shards_above_mb=0")
    small = ("exchange.codec=[int8,zstd]", "exchange.downlink=[int8,zstd]")
    run = Run(tmp_path / "run", "strategy=fedbuff", *few, *small)
    assert run.end() == 0, run.said()
    trained = [e["metrics"] for e in run.events("order_done") if e["kind"] == "train"]
    assert all(metrics["sent_share"] < 0.4 for metrics in trained)
    sent = [(e["update"], e["mb"]) for e in run.events("weights_sent")]
    whole, updates = ([mb for update, mb in sent if update is kind] for kind in (False, True))
    assert (len(whole), len(updates)) >= (2, 2)
    assert max(updates) < 0.4 * min(whole)
    for site in run.summary()["facilities"].values():
        assert site["held_out_loss_last"] < site["held_out_loss_first"]


@pytest.mark.parametrize(
    ("strategy", "freeze_a"),
    [("fedadam", True), ("fedex_lora", False), ("flora", False)],
    ids=["ffa-lora", "fedex-lora", "flora"],
)
def test_adapters_of_a_checkpoint(
    undisturbed: Run, tmp_path: Path, strategy: str, freeze_a: bool
) -> None:
    """Protects LoRA from end to end: only the adapter travels, with what makes its average exact,
    and peft loads what the run leaves."""
    base = undisturbed.dir / "model"
    lora = ["model.lora.r=4", f"model.path={base}", f"data.tokenizer={base}"]
    lora.append(f"model.lora.freeze_a={str(freeze_a).lower()}")
    lora.append("facilities.local_a.ranks_per_node=1")
    if strategy == "flora":
        lora.append("facilities.local_b.lora_r=2")
    run = Run(tmp_path / "run", f"strategy={strategy}", *lora, "train.lr=0.01", "train.steps=40")
    assert run.end() == 0, run.said()
    for site in run.summary()["facilities"].values():
        assert site["held_out_loss_last"] < site["held_out_loss_first"]
    inexact = [e["lora_inexactness"] for e in run.events("aggregated")]
    assert max(inexact) < 1e-8
    config = json.loads((run.dir / "model" / "adapter_config.json").read_text())
    assert (config["r"] > 4) is not freeze_a
    assert not (run.dir / "model" / "model.safetensors").exists()
    code = (
        "import sys; from peft import AutoPeftModelForCausalLM as M; M.from_pretrained(sys.argv[1])"
    )
    model = str(run.dir / "model")
    done = subprocess.run([sys.executable, "-c", code, model], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_two_runs_at_once(tmp_path: Path) -> None:
    """Protects runs on one host from each other."""
    few = ("train.steps=30", "rounds=1")
    runs = [Run(tmp_path / str(k), *few, f"seed={k}", settings=ONE_SITE) for k in (1, 2)]
    assert [run.end() for run in runs] == [0, 0], runs[0].said() + runs[1].said()


def test_ctrl_c_cancels_and_tells_how_to_go_on(tmp_path: Path) -> None:
    """Protects Ctrl-C: exit 130, jobs and processes gone, resumable."""
    run = Run(tmp_path / "run", "train.steps=200", settings=ONE_SITE)
    run.until_training()
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130
    assert run.left_behind() == []
    assert "resume=" in run.said()
    assert run.summary()["status"] == "interrupted"
    again = Run(tmp_path / "run", resume=True)
    assert again.end() == 0, again.said()
    assert again.summary()["facilities"]["local_a"]["steps"] == 400


def test_data_error_from_the_job_ends_the_run(tmp_path: Path) -> None:
    """Protects users from an endless retry of what only the job can see is wrong."""
    good = tmp_path / "a.jsonl"
    good.write_text("\n".join(json.dumps({"text": f"record {k} " * 20}) for k in range(50)))
    run = Run(
        tmp_path / "run",
        "data=jsonl",
        f"data.paths.local_a=[{good}]",
        "data.seq_len=100000",
        "model.config.max_position_embeddings=100000",
        settings=ONE_SITE,
    )
    assert run.end() == 2
    assert "local_a" in run.said()
    assert "seq_len" in run.said()
    assert "Traceback" not in run.said()
    assert run.left_behind() == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "resume"),
        (["--cfg", "job"], 0, "facilities"),
        (["dry_run=true"], 0, "submitit"),
        (["rouns=3"], 2, "rounds"),
        (["resume=/nowhere"], 2, "not a run directory"),
        (["strategy._target_=no.such.Thing"], 2, "no.such.Thing"),
        (["data.paths.local_a=[nosuchpackage]"], 2, "nosuchpackage"),
    ],
)
def test_quick_answers(tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    """Protects what starts nothing: right exit code, no traceback, nothing written."""
    done = subprocess.run(
        [sys.executable, "-m", "flwr_hpc.run", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
