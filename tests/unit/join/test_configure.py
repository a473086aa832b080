"""What a site runs with: the run's settings from the invitation, its centre's own, never mixed."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from flwr_hpc import __version__
from flwr_hpc.config.compose import compose_config
from flwr_hpc.config.invitation import (
    FORMAT,
    Invitation,
    check_versions,
    read_invitation,
    run_settings,
    versions,
)
from flwr_hpc.errors import UserError
from flwr_hpc.join import __main__ as command
from flwr_hpc.join.configure import run_part, site_config

HERE = ["+facility=local_a", "data.paths=[json]"]


def invitation(*overrides: str) -> Invitation:
    config = compose_config(
        ["serve.address=vm.example.org:8443", "serve.sites=[lumi,vega]", *overrides], serve=True
    )
    run, missing = run_settings(config)
    return Invitation(
        format=FORMAT, site="lumi", address="vm.example.org:8443", certificate="PEM",
        token="secret", private_key="KEY", run_key="r1", sites=["lumi", "vega"],
        versions=versions(), run=run, missing=missing,
    )  # fmt: skip


def test_the_runs_settings_come_with_it_and_the_centres_stay() -> None:
    """Protects the training from a site's defaults, and the site from the server's."""
    sent = invitation("train.steps=77", "seed=5", "model.config.hidden_size=96", "data.seq_len=32")
    config = site_config(sent, [*HERE, "facilities.local_a.walltime=00:20:00"])
    assert (config.train.steps, config.seed, config.data.seq_len) == (77, 5, 32)
    assert config.model.config["hidden_size"] == 96
    assert list(config.facilities) == ["lumi"]
    assert config.facilities["lumi"].walltime == "00:20:00"
    assert config.data.paths == {"lumi": ["json"]}
    sent = invitation(
        "model=tiny_mt5", "data.objective=span_corruption", "data.document_mask=false"
    )
    data = site_config(sent, HERE).data
    assert (data.objective, data.document_mask) == ("span_corruption", False)


def test_what_depends_on_a_centres_files_and_hardware_is_its_own() -> None:
    """Protects centres whose files and GPUs differ from the others'."""
    config = site_config(
        invitation("data.kind=stdlib", "train.micro_batch=4"),
        ["+facility=local_a", "data=jsonl", "data.paths=/x/*.jsonl", "train.micro_batch=2"],
    )
    assert (config.data.kind, config.train.micro_batch) == ("jsonl", 2)
    assert config.data.paths == {"lumi": ["/x/*.jsonl"]}


@pytest.mark.parametrize(
    "override", ["rounds=9", "train.steps=3", "data.seq_len=8", "seed=1", "strategy=fedbuff",
                 "model=tiny_gpt2", "exchange.codec=full", "serve.address=x:1", "run_dir=x"],
)  # fmt: skip
def test_a_site_cannot_change_what_is_the_runs(override: str) -> None:
    """Protects all sites from one that trains something else."""
    with pytest.raises(UserError, match="belongs to the run"):
        site_config(invitation(), [*HERE, override])


@pytest.mark.parametrize("facilities", [[], ["+facility=[local_a,local_b]"]])
def test_a_site_is_one_facility(facilities: list[str]) -> None:
    """Protects against a site of two facilities, of which one would never work."""
    with pytest.raises(UserError, match="one facility"):
        site_config(invitation(), [*facilities, "data.paths=[json]"])


def test_no_path_and_no_account_of_the_server_travels(tmp_path: Path) -> None:
    """Protects what is the server's own: its folders mean nothing elsewhere, and are not told."""
    sent = invitation(f"model.path={tmp_path}", f"data.tokenizer={tmp_path}", f"run_dir={tmp_path}")
    assert str(tmp_path) not in json.dumps(asdict(sent))
    with pytest.raises(UserError, match="lies on the server's machine"):
        site_config(sent, HERE)
    config = site_config(sent, [*HERE, "model.path=/here/model", "data.tokenizer=/here/tok"])
    assert (config.model.path, config.data.tokenizer) == ("/here/model", "/here/tok")


@pytest.mark.parametrize("key", ["passages", "chat_template"])
def test_a_site_names_its_own_copy_of_a_file(tmp_path: Path, key: str) -> None:
    """Protects a study of memorization, and a format, from a site that trains without."""
    file = tmp_path / "file"
    file.write_text('{"text": "a", "repetitions": 3}')
    sent = invitation(f"data.{key}={file}")
    with pytest.raises(UserError, match=rf"Add: data\.{key}="):
        site_config(sent, HERE)
    data = site_config(sent, [*HERE, f"data.{key}=/here/file"]).data
    assert getattr(data, key) == "/here/file"


def test_limits_are_held_against_the_sites_own_jobs() -> None:
    """Protects a centre from a facility file that asks for more than its people agreed to."""
    with pytest.raises(UserError, match=r"nodes=4 is above site\.limits\.nodes=2"):
        site_config(invitation(), [*HERE, "facilities.local_a.nodes=4", "site.limits.nodes=2"])
    with pytest.raises(UserError, match=r"above\s+site\.limits\.walltime=00:30:00"):
        site_config(invitation(), [*HERE, "site.limits.walltime=00:30:00"])


def test_an_invitation_is_read_back_and_only_if_it_is_private(tmp_path: Path) -> None:
    """Protects the credential: it is refused where others can read it."""
    path = tmp_path / "lumi.json"
    sent = invitation()
    sent.write(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_invitation(path) == sent
    path.chmod(0o640)
    with pytest.raises(UserError, match=f"chmod 600 {path}"):
        read_invitation(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 9}', "\xff"])
def test_a_damaged_invitation_is_no_traceback(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects whoever got half a file by mail."""
    path = tmp_path / "lumi.json"
    path.write_text(text, encoding="latin-1")
    path.chmod(0o600)
    assert command.main([str(path), *HERE]) == 2
    assert str(path) in capsys.readouterr().err


WHEEL = f"flwr_hpc-{__version__}-py3-none-any.whl"
SERVER = {"flwr_hpc": __version__, "flwr": "1.41.0", "protocol": "1", "python": "3.11.7"}


@pytest.mark.parametrize(
    ("here", "install"),
    [
        ({"flwr_hpc": "9.9.9"}, [WHEEL]),
        ({"protocol": "2"}, ["--force-reinstall", "--no-deps", WHEEL]),  # of the same number
        ({"flwr": "1.30.0"}, ["flwr==1.41.0"]),
        ({"flwr": ""}, ["flwr==1.41.0"]),
    ],
)
def test_versions_that_do_not_fit_are_refused_with_the_command(
    here: dict[str, str], install: list[str]
) -> None:
    """Protects a run from sites that speak another protocol, and their people from guessing."""
    with pytest.raises(UserError) as error:
        check_versions(SERVER, SERVER | here)
    words, _, command = str(error.value).partition("Fix it with: ")
    assert shlex.split(command) == [sys.executable, "-m", "pip", "install", *install]
    assert (f"{WHEEL} lies beside the invitation at the server" in words) == (WHEEL in install)


def test_both_are_installed_where_both_differ() -> None:
    """Protects from a second refusal after the first was mended."""
    with pytest.raises(UserError, match=rf"install {WHEEL} && .*install 'flwr==1\.41\.0'$"):
        check_versions(SERVER, SERVER | {"flwr": "1.30.0", "flwr_hpc": "9"})


def test_python_and_torch_may_differ() -> None:
    """Protects centres whose modules are older or newer."""
    server = {**SERVER, "torch": "2.6"}
    check_versions(server, {**server, "python": "3.13.0", "torch": "2.9", "flwr": "1.41.2"})


def test_what_is_done_with_its_updates_is_shown_and_is_no_setting_of_the_site() -> None:
    """Protects a centre's person from joining what they do not know, and the site from a strategy
    that only the server has."""
    own = {"_target_": "theirs.Strategy", "mu": 0.5}
    sent = replace(invitation("train.steps=77"), strategy=own)
    shown = run_part(sent)
    assert (shown["strategy"], shown["rounds"]) == (own, sent.run["rounds"])
    assert shown["train"]["steps"] == 77  # type: ignore[index]
    assert site_config(sent, HERE).strategy["_target_"] != own["_target_"]
