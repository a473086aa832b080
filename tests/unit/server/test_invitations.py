"""Who may join a server: what is written for whom, and what is worth nothing any more."""

from __future__ import annotations

import json
import socket
import zipfile
from pathlib import Path

import pytest
from worlds.hosts.stranger import open_to_others

from flwr_hpc import __version__, serve
from flwr_hpc import run as run_command
from flwr_hpc.config.compose import compose_config
from flwr_hpc.config.invitation import read_invitation, wheel_name
from flwr_hpc.config.schema import Config
from flwr_hpc.files import private_files
from flwr_hpc.gate.credentials import Guests, read_credentials
from flwr_hpc.join.configure import site_config
from flwr_hpc.server import invitations
from flwr_hpc.server.run_dir import RunDir
from flwr_hpc.server.server_app import may_speak_for, revoked

ADDRESS = "serve.address=127.0.0.1:8443"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    sites = ["serve.sites=[lumi,vega]", f"run_dir={tmp_path / 'run'}"]
    return compose_config([ADDRESS, *sites], serve=True)


@pytest.fixture
def run(config: Config) -> RunDir:
    with private_files():  # as the commands have it
        run = RunDir.create(config)
        invitations.prepare(run, config)
    return run


class Flower:
    """Gives every node that is registered the next number."""

    def __init__(self) -> None:
        self.last = 100
        self.asked: list[str] = []

    def __call__(self, command: object) -> str:
        assert isinstance(command, list)
        self.asked.append(next(w for w in command if w.startswith("--name=")))
        self.last += 1
        return f'noise {{"success": true, "node-id": {self.last}}}\n'


def test_each_site_gets_an_invitation_of_its_own_and_nobody_else_can_read_it(
    run: RunDir, config: Config
) -> None:
    """Protects credentials on the server's disk, and sites from each other."""
    lumi, vega = (read_invitation(run.invitations / f"{s}.json") for s in ("lumi", "vega"))
    assert (lumi.site, vega.site) == ("lumi", "vega")
    assert lumi.token != vega.token
    assert lumi.private_key != vega.private_key
    assert open_to_others(run.path) == {}
    assert lumi.token not in run.credentials.read_text()
    assert lumi.strategy == config.strategy


def test_the_servers_wheel_is_put_beside_the_invitations(run: RunDir) -> None:
    """Protects the command that a site of another version is given: it names this file."""
    path = invitations.put_wheel(run)
    assert path == run.invitations / wheel_name(__version__)
    assert "flwr_hpc/protocol.py" in zipfile.ZipFile(path).namelist()


def test_a_resumed_server_keeps_its_invitations(run: RunDir, config: Config) -> None:
    """Protects people from having to be invited again after a reboot."""
    before = (run.invitations / "lumi.json").read_text(), run.certificate.read_text()
    assert invitations.prepare(run, config) == []
    assert before == ((run.invitations / "lumi.json").read_text(), run.certificate.read_text())


def test_settings_that_a_resume_changes_come_with_new_invitations(run: RunDir) -> None:
    """Protects a run from sites that go on with its former settings: what they were sent is worth
    nothing, what they are sent has the new ones. What the server alone uses changes nothing."""
    before = read_invitation(run.invitations / "lumi.json")
    invitations.revoke(run, "vega")
    mine = run.resumed_config(
        ["exchange.memory_gb=2", "strategy.outer_lr=0.3", "tracking.wandb=true"]
    )
    assert invitations.prepare(run, mine) == []
    config = run.resumed_config(["rounds=99", "train.steps=7", "exchange.codec=bf16"])
    assert [path.stem for path in invitations.prepare(run, config)] == ["lumi"]
    after = read_invitation(run.invitations / "lumi.json")
    assert (after.run["rounds"], after.run["train"]["steps"]) == (99, 7)
    assert site_config(after, ["+facility=local_a", "data.paths=[json]"]).exchange.codec == "bf16"
    guests = Guests(run.credentials)
    assert [guests.site_of_token(i.token) for i in (before, after)] == [None, "lumi"]
    assert invitations.prepare(run, config) == []


def test_nodes_are_registered_and_a_site_speaks_for_itself_alone(
    run: RunDir, config: Config
) -> None:
    """Protects a site's name: a node with another's key cannot answer in it."""
    invitations.register(run, Flower(), anew=True)
    ids = {site: c.node_id for site, c in read_credentials(run.credentials).items()}
    assert sorted(ids.values()) == [101, 102]
    assert may_speak_for(run, config, ids["lumi"], "lumi")
    assert not may_speak_for(run, config, ids["vega"], "lumi")
    assert not may_speak_for(run, config, 999, "lumi")
    assert not may_speak_for(run, config, ids["lumi"], "unheard_of")


def test_a_rebooted_server_keeps_what_a_site_has_sent(run: RunDir) -> None:
    """Protects hours of an upload: Flower calls the site's node by another number then."""
    flower = Flower()
    invitations.register(run, flower, anew=True)
    before = read_credentials(run.credentials)["lumi"].node_id
    part = run.exchange / f"node-{before}" / f".{'0' * 64}.900.partial"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"weights")
    invitations.register(run, flower, anew=True)
    now = read_credentials(run.credentials)["lumi"].node_id
    assert now != before
    assert (run.exchange / f"node-{now}" / part.name).read_bytes() == b"weights"


def test_a_revoked_site_is_out_and_others_stay(run: RunDir, config: Config) -> None:
    """Protects a run after an invitation was lost."""
    flower = Flower()
    invitations.register(run, flower, anew=True)
    token = read_invitation(run.invitations / "lumi.json").token
    guests, out = Guests(run.credentials), revoked(run)
    assert guests.folder_of_token(token)
    assert out() == {}
    gone = invitations.revoke(run, "lumi")
    assert f"serve invite lumi {run.path}" in out()["lumi"]
    assert guests.site_of_token(token) is None
    assert not may_speak_for(run, config, gone.node_id, "lumi")
    assert run.sites(config) == ["vega"]
    flower.asked.clear()
    invitations.register(run, flower, anew=True)
    assert flower.asked == ["--name=vega"]
    invitations.invite(run, config, "lumi")
    assert out() == {}


def test_a_new_invitation_makes_the_old_one_worthless(run: RunDir, config: Config) -> None:
    """Protects against the one that was lost, also where the site stays."""
    old = read_invitation(run.invitations / "lumi.json").token
    invitations.register(run, Flower(), anew=True)
    new = read_invitation(invitations.invite(run, config, "lumi")).token
    guests = Guests(run.credentials)
    assert (guests.site_of_token(old), guests.site_of_token(new)) == (None, "lumi")
    flower = Flower()
    invitations.register(run, flower, anew=False)
    assert flower.asked == ["--name=lumi"]


def test_a_damaged_list_lets_nobody_in(run: RunDir) -> None:
    """Protects against a half-written file: out is the safe side."""
    token = read_invitation(run.invitations / "lumi.json").token
    guests = Guests(run.credentials)
    assert guests.site_of_token(token) == "lumi"
    run.credentials.write_text(json.dumps({"lumi": {"token": 1}}))
    assert guests.site_of_token(token) is None


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "serve.address=train.example.org:8443"),
        (["serve.address=vm"], "HOST:PORT"),
        ([ADDRESS], "serve.sites"),
        ([ADDRESS, "serve.sites=[../x]"], "cannot be the name"),
        ([ADDRESS, "serve.sites=[a]", "+facility=local_a"], "belong to the sites"),
        (["invite", "lumi"], "usage: "),
        (["revoke", "lumi", "nowhere"], "not a run directory"),
    ],
)
def test_mistakes_teach(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Protects people at the server: what was wrong, and what to type."""
    assert serve.main(argv) == 2
    assert words in capsys.readouterr().err


def test_run_points_to_serve(capsys: pytest.CaptureFixture[str]) -> None:
    """Protects from a server that starts facilities of its own, whose nodes it would refuse."""
    assert run_command.main([ADDRESS]) == 2
    assert f"python -m flwr_hpc.serve {ADDRESS}" in capsys.readouterr().err


def test_a_run_by_ssh_keeps_its_port_and_lets_in_all_its_sites(tmp_path: Path) -> None:
    """Protects the sites of a run that is resumed; the port is of this host alone, and another one
    where somebody has it by then."""
    overrides = [
        "+facility=[local_a,local_b]",
        "facilities.local_b.ssh=far",
        f"run_dir={tmp_path}/r",
    ]
    config = compose_config([*overrides, "ssh_config=conf"])
    invitations.serve_by_ssh(config)
    first = config.serve.listen
    assert first == config.serve.address
    assert str(first).startswith("127.0.0.1:")
    assert config.ssh_config == str(Path.cwd() / "conf")
    run = RunDir.create(config)
    invitations.prepare(run, config)
    assert run.sites(config) == ["local_a", "local_b"]
    assert invitations.private_key(run, "local_a").stat().st_mode & 0o777 == 0o600
    resumed = run.resumed_config([])
    invitations.serve_by_ssh(resumed)
    assert resumed.serve.listen == first
    with socket.create_server(("127.0.0.1", int(str(first).rpartition(":")[2]))):
        invitations.serve_by_ssh(resumed)
        assert resumed.serve.listen != first
    assert invitations.prepare(run, resumed) == []
