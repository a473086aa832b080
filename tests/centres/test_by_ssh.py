"""One command trains adapters at three centres that share nothing, over SSH that keeps breaking."""

from __future__ import annotations

import random
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from lab.centres import Centres
from lab.host import LabError
from lab.remote import Host
from transformers import AutoConfig, AutoModelForCausalLM
from worlds.hosts.pbs import bring_pbs
from worlds.runs.across import DATA, Tensors, on_one_host
from worlds.runs.by_ssh import BySsh

from flwr_hpc.data.batches import load_tokenizer

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
SEED, KILLS, PAUSE_S = 1, 20, 5.0
STEPS, ROUNDS = 40, 4
SETTINGS = (
    *("model.lora.r=4", "data.tokenizer=byte", "strategy=diloco"),
    *(f"train.steps={STEPS}", f"rounds={ROUNDS}"),
    # A message that is lost with its connection is not missed before; allocations are idle so long.
    "federation.reply_grace_s=60",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint to adapt."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model("llama", **sizes, **heads, vocab_size=len(load_tokenizer("byte")))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Tensors:
    """Return what the same training comes to on one host."""
    settings = (*SETTINGS, f"model.path={base}")
    return on_one_host(tmp_path_factory.mktemp("alone"), *settings, sites=tuple(DATA))


def test_connections_are_killed_at_random_moments(
    three_centres: Centres, tmp_path: Path, base: Path, alone: Tensors
) -> None:
    """Protects a run of days from lines of hours: twenty connections of SSH are killed, at either
    end; every site is met again, trains every order once, and the adapter is that of one host."""
    bring_pbs(three_centres["centre_c"])
    run = BySsh(three_centres, tmp_path, *SETTINGS, base=base)
    for site in run.sites:
        site.link.set(rate_mbit=20, rtt_ms=80, loss=0.01)
    run.begin()
    run.until(lambda: {e["facility"] for e in run.events("supernode_started")} == set(DATA))
    draw, killed, held = random.Random(SEED), Counter[str](), ""
    while killed.total() < KILLS:  # as many from each version on, but for the last
        version = killed.total() * (ROUNDS - 1) // KILLS
        run.until(lambda version=version: len(run.events("aggregated")) >= version)  # type: ignore[misc]
        if version == ROUNDS - 2 and not held:
            held = _suspended_job(run.sites[0])  # or the run could end before the last of them
        time.sleep(draw.uniform(0, PAUSE_S))
        host, pid = draw.choice(run.until(run.connections))
        with suppress(LabError):  # its other end was killed just before
            host.run("kill", "-9", str(pid), user="root")
            killed[host.name] += 1
    _slurm(run.sites[0], "scontrol", "resume", held)
    run.ends_like(alone, ROUNDS * STEPS)
    assert 0 < killed["server"] < KILLS  # at either end
    assert [run.allocations(site) for site in run.sites] == [["a0000"]] * len(run.sites)
    notes = run.events("site_note")
    met = Counter(e["facility"] for e in notes if "its site runs on" in e["note"])
    lost = Counter(e["facility"] for e in notes if "line is lost" in e["note"])
    assert all(met[name] > 1 and lost[name] for name in DATA), notes
    assert run.connections() == []


def _suspended_job(site: Host) -> str:
    job = _slurm(site, "squeue", "-h", "-t", "RUNNING", "-o", "%A").strip()
    _slurm(site, "scontrol", "suspend", job)
    return job


def _slurm(site: Host, *words: str) -> str:
    assert site.cluster is not None
    return site.cluster.slurm(*words)
