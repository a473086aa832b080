"""What is found on this machine before anything starts."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from flwr_hpc.config.compose import compose_config
from flwr_hpc.errors import UserError
from flwr_hpc.gate import peers
from flwr_hpc.server import preflight

FEDAVG = "strategy._target_=flwr.serverapp.strategy.FedAvg"
NAME = "some-org/Some-Model"


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test an empty Hugging Face cache, and packages that are all there."""
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(preflight, "find_spec", lambda name: name)
    monkeypatch.setattr(preflight.sources, "check", lambda *_, **__: None)  # has its own tests
    return tmp_path / "hub"


def check(*overrides: str) -> None:
    preflight.check(compose_config(list(overrides)))


def fault(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        check(*overrides)
    return str(caught.value)


def test_a_strategy_that_waits_for_more_sites_than_there_are() -> None:
    """Protects Flower's defaults of two nodes from waiting for ever with one facility."""
    fix = [f"strategy.{key}=1" for key in preflight.MIN_NODES]
    said = fault(FEDAVG, "+facility=local_a")
    assert "but the run has 1 facility" in said
    assert " ".join(fix) in said
    check(FEDAVG, "+facility=local_a", *fix)
    check(FEDAVG)


def test_an_exact_average_of_adapters_wants_plain_ones() -> None:
    """Protects users from a run that would end at its first order, or be plain FedAvg."""
    exact = ("strategy=fedex_lora", "model.lora.r=4", f"model.path={NAME}")
    assert NAME in fault(*exact)  # it is the checkpoint that is not here
    assert "e.g. model.lora.r=8" in fault("strategy=fedex_lora")
    for wrong in ("dora=true", "freeze_a=true"):
        assert f"Leave out model.lora.{wrong}, or" in fault(*exact, f"model.lora.{wrong}")


def test_a_facility_of_another_rank_wants_a_strategy_that_stacks() -> None:
    """Protects averages from factors that were never trained, and users from a job that fails."""
    both = ("+facility=[local_a,local_b]", "model.lora.r=4", f"model.path={NAME}")
    of_four = (*both, "facilities.local_b.lora_r=2")
    assert "use strategy=flora" in fault("strategy=fedex_lora", *of_four)
    assert NAME in fault("strategy=flora", *of_four)
    for wrong in ("0", "5"):
        found = fault("strategy=flora", *both, f"facilities.local_b.lora_r={wrong}")
        assert "from 1 to model.lora.r=4" in found


def test_a_chat_template_is_read_before_anything_starts(tmp_path: Path) -> None:
    """Protects a job's wait in the queue from a misspelt path."""
    template = tmp_path / "own.jinja"
    assert f"chat_template={template} cannot be read" in fault(f"data.chat_template={template}")
    template.write_text("{{ messages }}")
    check(f"data.chat_template={template}")
    check("data.chat_template=chatml")


def test_passages_are_read_before_anything_starts(tmp_path: Path) -> None:
    """Protects users from jobs that fail over a file that was never there."""
    with pytest.raises(UserError, match=r"passages .*p\.jsonl cannot be read"):
        check(f"data.passages={tmp_path / 'p.jsonl'}")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects from a job that dies of an import."""
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    assert "pip install 'flwr-hpc[wandb]'" in fault("tracking=wandb")
    assert "pip install 'flwr-hpc[train]'" in fault()


def test_4_bits_need_one_package_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects from a wait in the queue for a job that lacks bitsandbytes."""
    monkeypatch.setattr(preflight, "find_spec", lambda name: name != "bitsandbytes" or None)
    lora = ["model.path=/m", "model.lora.r=8", "model.lora.quantize=nf4"]
    said = fault("+facility=local_a", "facilities.local_a.gpus_per_node=2", *lora)
    assert "bitsandbytes cannot be imported" in said
    assert "pip install 'flwr-hpc[qlora]'" in said


def test_stores_are_file_systems_that_fsspec_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects from an exchange that nobody reaches."""
    for good in ("/shared/x", "file:///shared/x", "memory://x", "simplecache::memory://x"):
        check(f"exchange.store={good}")
    assert "no file system 'sftpp'. Did you mean 'sftp'?" in fault("exchange.store=sftpp://host/x")

    def missing(protocol: str) -> None:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    assert "install gcsfs" in fault("exchange.store=gs://bucket/x")


@pytest.mark.parametrize(
    ("url", "extra"),
    [("s3://b/x", "s3"), ("sftp://h/x", "sftp"), ("simplecache::ssh://h/x", "sftp")],
)
def test_a_store_says_which_extra_it_lacks(
    url: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects from a run that fails at its first payload, and from SFTP to any host at all."""
    monkeypatch.setattr("flwr_hpc.exchange.stores.fsspec.find_spec", lambda name: None)
    assert f"pip install 'flwr-hpc[{extra}]'" in fault(f"exchange.store={url}")


@pytest.mark.parametrize("key", ["model.path", "data.tokenizer"])
def test_checkpoints_are_folders_or_cached(key: str, hub: Path, tmp_path: Path) -> None:
    """Protects from a job that finds out without a network that there is no model."""
    said = fault(f"{key}={NAME}")
    assert f"neither a folder nor in the Hugging Face cache ({hub})" in said
    assert "hf download some-org/Some-Model" in said
    assert "facilities.local_a.internet=true" in said
    online = [f"facilities.{name}.internet=true" for name in ("local_a", "local_b")]
    check(f"{key}={NAME}", "+facility=[local_a,local_b]", *online)
    (hub / "models--some-org--Some-Model" / "snapshots").mkdir(parents=True)
    check(f"{key}={NAME}")
    check(f"{key}={tmp_path}")
    for wrong in ("/no/such/folder", "./models/x", "a/b/c"):
        assert f"{key}={wrong}: there is no such folder" in fault(f"{key}={wrong}")


def test_a_checkpoint_is_not_fed_bytes_that_it_never_saw(tmp_path: Path) -> None:
    """Protects from training a model on ids that mean other words to it."""
    saved = tmp_path / "tokenizer_config.json"
    saved.write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    check(f"model.path={tmp_path}")
    said = fault(f"model.path={tmp_path}", "data.tokenizer=byte")
    assert "Leave data.tokenizer out" in said
    saved.write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    check(f"model.path={tmp_path}", "data.tokenizer=byte")


def test_another_cache_may_be_named_for_the_job(tmp_path: Path) -> None:
    """Protects facilities whose environment says where models lie."""
    (tmp_path / "own" / "models--some-org--Some-Model" / "snapshots").mkdir(parents=True)
    one = ["+facility=local_a", f"model.path={NAME}"]
    check(*one, f"facilities.local_a.env.HF_HUB_CACHE={tmp_path / 'own'}")
    check(*one, "facilities.local_a.setup=['export HF_HOME=/elsewhere']")
    fault(*one)


def test_a_host_that_keeps_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects users where the system does not tell whose a connection is: they decide first."""
    monkeypatch.setattr(peers, "can_tell", lambda *_: False)
    said = fault("+facility=local_a")
    assert "run code as you" in said
    assert "federation.shared_host=true" in said
    check("+facility=local_a", "federation.shared_host=true")


def test_what_lies_at_a_remote_facility_is_not_judged(tmp_path: Path) -> None:
    """Protects facilities whose file systems this machine does not see."""
    check("+facility=slurm", "facilities.slurm.account=p1", "model.path=/scratch/x")


def test_a_python_that_lacks_what_jobs_need(tmp_path: Path) -> None:
    """Protects users from waits in the queue for a job that cannot start."""
    own = tmp_path / "python"  # without site-packages
    own.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S "$@"\n')
    own.chmod(0o755)
    given = ["+facility=slurm", "facilities.slurm.account=p1", f"facilities.slurm.python={own}"]
    said = fault(*given)
    assert f"{own}, lacks submitit, flwr, torch" in said
    assert f"{own} -m pip install 'flwr-hpc[train]'" in said
    check(*given, "facilities.slurm.setup=[module load python]")  # which may bring them
    check(*given, "facilities.slurm.container=/images/x.sif")
    own.write_text("made for another machine")
    check(*given)
    own.unlink()  # on the compute nodes alone
    check(*given)
