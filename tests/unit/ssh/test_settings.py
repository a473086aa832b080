"""What is sent to a site's host: all that belongs to its centre, and in words that `join` takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flwr_hpc.config.compose import compose_config
from flwr_hpc.config.invitation import FORMAT, Invitation, run_settings, versions
from flwr_hpc.config.schema import Config
from flwr_hpc.join.configure import site_config
from flwr_hpc.ssh.settings import FACILITY, facility_file, join_words

BY_SSH = [
    "+facility=[local_a,lumi]", "facilities.lumi.ssh=lumi", "facilities.lumi.account=p_1",
    "facilities.lumi.python=/p/my env/bin/python", "facilities.lumi.env.X=a: b",
    "facilities.lumi.setup=[\"module load x, y\"]",
]  # fmt: skip


def _composed_there(config: Config, folder: Path) -> Config:
    """Do there what is typed there."""
    run, missing = run_settings(config)
    invitation = Invitation(
        format=FORMAT, site="lumi", address="127.0.0.1:4", certificate="", token="",
        private_key="", run_key="r", sites=list(config.facilities), versions=versions(), run=run,
        missing=missing,
    )  # fmt: skip
    conf = folder / "conf" / "facility"
    conf.mkdir(parents=True)
    (conf / f"{FACILITY}.yaml").write_text(facility_file(config, "lumi"))
    path, option, config_dir, *words = join_words(config, "lumi", str(folder))
    assert (path, option) == (f"{folder}/invitation.json", "--config-dir")
    return site_config(invitation, words, config_dir)


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["data=jsonl", "data.paths.lumi=[/d/a b.jsonl,/d/ü*.jsonl]", "data.paths.local_a=[/x]"],
        ["allocation=per_round", "allocation.renew_ahead=02:00:00", "site.limits.node_hours=2.5"],
        ["federation.shared_host=true", "site.limits.walltime=02:00:00"],
    ],
)
def test_a_site_there_has_what_was_set_here(changes: list[str], tmp_path: Path) -> None:
    """Protects from a site whose jobs are other ones than the command says."""
    config = compose_config([*BY_SSH, *changes])
    there = _composed_there(config, tmp_path / "ein Ort")
    assert there.facilities == {
        "lumi": replace(
            config.facilities["lumi"], ssh=None, ssh_python=None, ssh_install=False, join=[]
        )
    }
    assert there.data.paths.get("lumi") == config.data.paths.get("lumi")
    assert there.data.kind == config.data.kind
    assert (there.allocation, there.site.limits) == (config.allocation, config.site.limits)
    assert there.federation.shared_host == config.federation.shared_host
    assert there.site.dir == str(tmp_path / "ein Ort" / "site")


@pytest.mark.parametrize("key", ["passages", "chat_template"])
def test_a_file_of_this_machine_is_looked_for_there(tmp_path: Path, key: str) -> None:
    """Protects a site over SSH from training without it."""
    file = tmp_path / "a file"
    file.write_text('{"text": "a", "repetitions": 3}')
    config = compose_config([*BY_SSH, f"data.{key}={file}"])
    assert getattr(_composed_there(config, tmp_path).data, key) == str(file)


def test_a_folder_of_this_machine_is_looked_for_there_or_named(tmp_path: Path) -> None:
    """Protects a site whose model lies elsewhere."""
    model = f"model.path={tmp_path}"
    config = compose_config([*BY_SSH, model])
    assert f'model.path="{tmp_path}"' in join_words(config, "lumi", "/f")
    config = compose_config([*BY_SSH, model, 'facilities.lumi.join=["model.path=/scratch/m"]'])
    assert [w for w in join_words(config, "lumi", "/f") if w.startswith("model.path")] == [
        "model.path=/scratch/m"
    ]


def test_nothing_secret_is_in_the_words() -> None:
    """Protects from other users of the host, who see what is typed."""
    words = " ".join(join_words(compose_config(BY_SSH), "lumi", "/f"))
    assert "token" not in words
    assert "key" not in words
