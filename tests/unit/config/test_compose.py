"""From the command line to a configuration, and the messages in between."""

from __future__ import annotations

import sys
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import pytest

from flwr_hpc import run
from flwr_hpc.config import batch_size
from flwr_hpc.config.compose import compose_config, resume_config, shown
from flwr_hpc.config.facility import AUTO, walltime_s
from flwr_hpc.config.folder import conf_dir
from flwr_hpc.errors import UserError
from flwr_hpc.server.strategy_factory import build_strategy
from flwr_hpc.simulate.__main__ import compose as parse_simulation

GROUPS = ("facility", "strategy", "model", "data", "allocation", "tracking", "scenario")
CHOICES = [
    (group, path.stem) for group in GROUPS for path in sorted((conf_dir() / group).glob("*.yaml"))
]
AWKWARD = ["my conf", "it's", 'a "b"', "[x](y){z}", "jürgen, müller", "a=b:c\\", "x,y"]


def test_no_facility_means_two_local_ones() -> None:
    """Protects the embedded default that `make demo` runs."""
    config = compose_config([])
    assert list(config.facilities) == ["local_a", "local_b"]
    assert all(f.scheduler == "local" for f in config.facilities.values())


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_shipped_file_composes(group: str, name: str) -> None:
    """Protects every YAML in conf/ from going stale."""
    plus = "+" if group == "facility" else ""
    pbs = name in ("aurora", "pbs", "polaris")  # which knows no QOS
    qos = [] if pbs else [f"facilities.{name}.qos=normal"]
    extra = {
        "facility": [f"facilities.{name}.account=project1", *qos],
        "data": [f"data.paths.{f}=[x]" for f in ("local_a", "local_b")] if name != "stdlib" else [],
        "model": ["data.objective=span_corruption"] if "t5" in name else [],
    }
    if group == "scenario":
        assert parse_simulation([f"scenario={name}"]).scenario.sites
        return
    config = compose_config([f"{plus}{group}={name}", *extra.get(group, [])])
    build_strategy(config.strategy)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rouns=3"], "Did you mean 'rounds'?"),
        (["train.stepps=3"], "Did you mean 'steps'?"),
        (["+facility=leonrdo"], "there is no facility 'leonrdo'"),
        (["facility=slurm"], "+facility=NAME"),
        (["rounds=abc"], "could not be converted to Integer"),
        (["rounds=0"], "rounds=0 must be greater than zero"),
        (["strategy=dilocco"], "Did you mean 'diloco'?"),
        (["+facility=[slurm"], "quote lists"),
        (["data=text"], "data.paths.local_a="),
        (["data.paths.local_x=[a]"], "Did you mean 'local_"),
        (["train.precision=fp16"], "auto, fp32, bf16"),
        (["foo"], "'foo' is not a setting. Settings are KEY=VALUE"),
        (["rounds=[1"], "'rounds=[1': the value cannot be read. Close every bracket"),
        (["rounds=1,2"], "To run each of them: python -m flwr_hpc.run -m 'rounds=1,2'"),
        (["seed=-1"], "seed=-1 must be zero or greater"),
        (["seed=18446744073709551616"], "seed="),
        (["train.lr=inf"], "train.lr=inf must be greater than zero"),
        (["train.lr=nan"], "train.lr=nan must be greater than zero"),
        (["train.clip=-1"], "train.clip=-1.0 must be zero or greater"),
        (["train.replicate=3"], "train.replicate=3 replicas cannot share the"),
        (["train.tensor=0"], "train.tensor=0 must be greater than zero"),
        (["train.tensor=3"], "train.tensor=3: groups of 3 ranks cannot share the 2 ranks of local"),
        (
            ["train.tensor=2", "train.replicate=2"],
            "cannot share the 2 ranks of local_a (nodes x ranks_per_node) in groups of train.ten",
        ),
        (["train.tensor=2", "model=tiny_gpt2"], "cannot split the layers of model_type=gpt2"),
        (
            ["train.tensor=2", "model.config.num_attention_heads=3"],
            "num_attention_heads=3",
        ),
        (["train.tensor=2", "model.lora.r=2", "model.lora.dora=true"], "leave out one of model.l"),
        (["train.warmup_steps=-1"], "train.warmup_steps=-1 must be zero or greater"),
        (["train.weight_decay=-1"], "train.weight_decay=-1.0 must be zero or greater"),
        (["train.min_lr_ratio=1.5"], "train.min_lr_ratio=1.5 must lie between 0 and 1"),
        (["train.betas=[0.9,1]"], "train.betas[1]=1.0 must lie between 0 and 1 (exclusive)"),
        (["train.betas=[0.9]"], "takes two numbers"),
        (["train.schedule_steps=0"], "train.schedule_steps=0 must be greater than zero"),
        (["federation.wait_s=0"], "federation.wait_s=0.0 must be greater than zero"),
        (["federation.clip_update_norm=0"], "federation.clip_update_norm=0.0 must be greater"),
        (["federation.clip_update_quantile=1"], "federation.clip_update_quantile=1.0 must lie"),
        (
            ["federation.clip_update_quantile=0.5", "federation.clip_update_norm=1"],
            "give one of them",
        ),
        (["federation.retries=-1"], "federation.retries=-1 must be zero or greater"),
        (["allocation.retries=-1"], "allocation.retries=-1 must be zero or greater"),
        (["allocation.max_successors=-1"], "max_successors=-1 must be zero or greater"),
        (["federation.order_deadline_s=0"], "federation.order_deadline_s=0.0 must be greater"),
        (["federation.acquire_deadline_s=-3"], "federation.acquire_deadline_s=-3.0 must be"),
        (["allocation.idle_timeout_s=0"], "allocation.idle_timeout_s=0.0 must be greater"),
        (["data.held_out_sequences=0"], "data.held_out_sequences=0 must be greater than zero"),
        (["model.lora.dora=true"], "give its rank, e.g. model.lora.r=8"),
        (["model.lora.quantize=nf4"], "weights below an adapter. Add to the command: model.lora.r"),
        (
            ["model.path=/m", "model.lora.r=8", "model.lora.quantize=nf4"],
            "local_a has gpus_per_node=0. Give its GPUs, facilities.local_a.gpus_per_node=N",
        ),
        (["model.lora.quantize=int8"], "Valid: none, nf4"),
        (
            ["model.lora.r=4", "model.lora.dora=true", "model.lora.freeze_a=true"],
            "leave out one of model.lora.freeze_a and model.lora.dora",
        ),
        (["data.held_out_fraction=1"], "must lie between 0 (exclusive) and 1 (exclusive)"),
        (["tracking.mode=onlin"], "Did you mean 'online'? Valid: auto, online, offline, disabled"),
        (["exchange.memory_gb=0.01"], "exchange.memory_gb=0.01 is too little"),
        (["exchange.inline_below_mb=-1"], "exchange.inline_below_mb=-1.0 must be zero or"),
        (["facilities.local_a.gpus_per_node=-1", "+facility=local_a"], "must be zero or greater"),
        (["model.config.hidden_size=65"], "model.config.hidden_size=68"),
        (["model=tiny_gpt2", "model.config.n_embd=65"], "model.config.n_embd=68"),
        (["model=tiny_gpt2", "data.seq_len=2048"], "model.config.n_positions=2048"),
        (["model.config.hidden_size=0"], "model.config.hidden_size=0 must be greater"),
        (["model.config.hidden_size=big"], "model.config.hidden_size=big must be a whole number"),
        (["model.config.num_key_value_heads=3"], "must be a multiple of num_key_value_heads=3"),
        (["data.seq_len=2048"], "model.config.max_position_embeddings=2048"),
        (["model.lora.freeze_a=true"], "needs an adapter. Add to the command: model.lora.r=8"),
    ],
)
def test_wrong_settings_are_explained(overrides: list[str], said: str) -> None:
    """Protects users from tracebacks: the message names the fix."""
    with pytest.raises(UserError) as caught:
        compose_config(overrides)
    assert said in str(caught.value)


@pytest.mark.parametrize("url", ["sftp://me:a@b:c@host/x", "simplecache::sftp://:a@b:c@host:22/x"])
def test_a_password_in_a_url_is_refused_and_not_repeated(url: str) -> None:
    """Protects it from the run's folder, invitations and logs."""
    with pytest.raises(UserError, match="has a password in it") as caught:
        compose_config([f"exchange.store={url}"])
    assert "a@b:c" not in str(caught.value)
    assert compose_config(["exchange.store=sftp://me@host:22/x"]).exchange.store


def test_own_facility_from_a_config_dir(tmp_path: Path) -> None:
    """Protects users of an installed wheel who add a cluster of their own."""
    (tmp_path / "my conf" / "facility").mkdir(parents=True)
    (tmp_path / "my conf" / "facility" / "mycluster.yaml").write_text(
        "# @package facilities.mycluster\nscheduler: slurm\naccount: p1\nnodes: 3\n"
    )
    config = compose_config(["+facility=mycluster"], str(tmp_path / "my conf"))
    assert config.facilities["mycluster"].nodes == 3


@pytest.mark.parametrize("folder", [*AWKWARD, "a${b}"])
def test_a_config_dir_may_have_any_name(tmp_path: Path, folder: str) -> None:
    """Protects folders whose names mean something in Hydra's grammar."""
    (tmp_path / folder / "facility").mkdir(parents=True)
    body = "# @package facilities.mine\nscheduler: local\ncpus_per_rank: 3\n"
    (tmp_path / folder / "facility" / "mine.yaml").write_text(body)
    config = compose_config(["+facility=mine"], str(tmp_path / folder))
    assert config.facilities["mine"].cpus_per_rank == 3


@pytest.mark.parametrize("name", AWKWARD)
def test_paths_are_taken_as_they_are(name: str) -> None:
    """Protects users from having to quote paths for Hydra's grammar."""
    path = f"/tmp/{name}"
    singles = ["run_dir", "model.path", "data.tokenizer", "exchange.store"]
    singles.append("facilities.local_a.workdir")
    settings = [*(f"{key}={path}" for key in singles), f"data.paths.local_a={path}"]
    config = compose_config([*settings, "+facility=local_a"])
    assert [attrgetter(key)(config) for key in singles[:-1]] == [path] * 4
    assert config.facilities["local_a"].workdir == path
    assert config.data.paths["local_a"] == [path]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("run_dir=null", None),
        ("run_dir=1e3", "1e3"),
        ("run_dir='/tmp/a b'", "/tmp/a b"),
        ('run_dir="/tmp/a\'b"', "/tmp/a'b"),
        ("run_dir=~/x", str(Path("~/x").expanduser())),
    ],
)
def test_quoted_paths_and_null_keep_their_meaning(given: str, found: str | None) -> None:
    """Protects commands that were written with Hydra's quotes."""
    assert compose_config([given]).run_dir == found


def test_lists_of_paths_may_hold_patterns() -> None:
    """Protects globs with character classes, which Hydra takes for lists."""
    config = compose_config(["data=text", "data.paths.local_a=[/x/p[0-9].txt, /y/a b.txt]",
                             "data.paths.local_b=[/z, '/v,w']"])  # fmt: skip
    assert config.data.paths["local_a"] == ["/x/p[0-9].txt", "/y/a b.txt"]
    assert config.data.paths["local_b"] == ["/z", "/v,w"]


@pytest.mark.parametrize("body", ["nodes: [1\n", "a: b: c\n", "nodes: 1\nnodes: 1\n"])
def test_malformed_yaml_is_named_by_file_and_line(tmp_path: Path, body: str) -> None:
    """Protects whoever writes a facility file from a traceback."""
    (tmp_path / "facility").mkdir()
    file = tmp_path / "facility" / "x.yaml"
    file.write_text(f"# @package facilities.x\n{body}")
    with pytest.raises(UserError, match=rf"{file}, line \d: not valid YAML"):
        compose_config(["+facility=x"], str(tmp_path))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        compose_config(["+facility=x"], str(tmp_path))


def test_a_local_facility_needs_no_account() -> None:
    """Protects this machine's own facilities, and "none" from "not given" elsewhere."""
    config = compose_config(["+facility=slurm", "facilities.slurm.scheduler=local",
                             "facilities.slurm.gpus_per_node=0"])  # fmt: skip
    assert config.facilities["slurm"].account is None
    assert compose_config(["+facility=slurm"]).facilities["slurm"].account == AUTO
    config = compose_config(["+facility=slurm", "facilities.slurm.account=null"])
    assert config.facilities["slurm"].account is None


@pytest.mark.parametrize(
    "extra", [["+facility=local_a", "strategy.min_available_nodes=1"], ["strategy.eta=0.1"], []]
)
def test_any_strategy_by_its_class_alone(extra: list[str]) -> None:
    """Protects `strategy._target_=X` from the arguments of the default strategy."""
    name = "flwr.serverapp.strategy.FedAdam"
    config = compose_config([f"strategy._target_={name}", *extra])
    assert type(build_strategy(config.strategy)).__name__ == "FedAdam"
    kept = compose_config(["strategy=diloco", "strategy._target_=strategies.diloco.DiLoCo"])
    assert kept.strategy["outer_lr"] == 0.7


def test_resumed_configuration_takes_plain_values_only(tmp_path: Path) -> None:
    """Protects a resumed run from a change that its checkpoint cannot follow."""
    saved = tmp_path / "config.yaml"
    saved.write_text(shown(compose_config(["train.steps=7"])))
    config = resume_config(saved, ["rounds=20", "data.paths.local_a=[asyncio]"])
    assert (config.rounds, config.train.steps) == (20, 7)
    assert config.data.paths["local_a"] == ["asyncio"]
    more = ["strategy.outer_lr=0.5", "facilities.local_a.walltime=02:00:00", "seed=0"]
    config = resume_config(saved, [*more, "data.held_out_paths.local_a=/a b.txt"])
    assert config.strategy["outer_lr"] == 0.5
    assert config.data.held_out_paths["local_a"] == ["/a b.txt"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("strategy=fedbuff", "only single values can"),
        ("+facility=slurm", "a resumed run keeps its facilities (local_a, local_b)"),
        ("facilities.new.scheduler=local", "it began with local_a, local_b"),
        ("model.config.hidden_size=128", "holds the weights of this model"),
        ("model.path=/x", "holds the weights of this model"),
        ("model.lora.r=4", "holds the weights of this model"),
        ("data.tokenizer=a: b: c", "its vocabulary"),
        ("seed=3", "the order of the data"),
        ("strategy._target_=strategies.fedbuff.FedBuff", "the state of this strategy"),
        ("run_dir=/x", "stays in its folder"),
        ("~rounds", "only single values can"),
        ("rouns=3", "Did you mean 'rounds'?"),
        ("rounds", "Settings are KEY=VALUE"),
        ("rounds=[1", "the value cannot be read"),
        ("rounds.x=1", "rounds"),
    ],
)
def test_a_resumed_run_refuses_what_it_cannot_follow(
    tmp_path: Path, override: str, said: str
) -> None:
    """Protects a run from going on with weights, data or state that do not fit."""
    saved = tmp_path / "config.yaml"
    saved.write_text(shown(compose_config([])))
    with pytest.raises(UserError) as caught:
        resume_config(saved, [override])
    assert said in str(caught.value)


@pytest.mark.parametrize("body", [b"rounds: [1\n", b"", b"- 1\n", b"word\n", b"\xff\xfe\x00"])
def test_a_damaged_run_is_told_as_such(tmp_path: Path, body: bytes) -> None:
    """Protects from a traceback where a run's configuration was cut or overwritten."""
    saved = tmp_path / "config.yaml"
    saved.write_bytes(body)
    with pytest.raises(UserError, match=str(saved)):
        resume_config(saved, [])


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("30:15", 1815), ("02:30:00", 9000), ("1-12", 129600), ("2-00:30:00", 174600)],
)
def test_walltimes(text: str, seconds: int) -> None:
    """Protects the reading of Slurm's walltime formats."""
    assert walltime_s(text) == seconds


def test_wrong_walltime_is_explained() -> None:
    """Protects against a walltime that no scheduler takes."""
    with pytest.raises(UserError, match="HH:MM:SS"):
        walltime_s("2h")


def test_a_strategy_that_is_none_is_refused() -> None:
    """Protects against `_target_`s that would fail minutes later in the ServerApp."""
    with pytest.raises(UserError, match=r"modules async_diloco, .* Did you mean 'fedbuff'"):
        build_strategy({"_target_": "strategies.FedBuff"})
    for spec in ({"_target_": "strategies.Nope"}, {"_target_": "builtins.dict"}):
        with pytest.raises(UserError, match="strategy"):
            build_strategy(spec)
    with pytest.raises(UserError, match="unexpected keyword"):
        build_strategy({"_target_": "strategies.diloco.DiLoCo", "no_such": 1})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (None, r"No module named 'own_strategy'\. Python looks in the current folder .*PYTHONPATH"),
        ("import no_such_module\n", "No module named 'no_such_module'"),
        ("def broken(:\n", r"SyntaxError: .*own_strategy\.py, line 1"),
        ("raise RuntimeError('boom')\n", "RuntimeError: boom"),
        ("class Other: pass\n", "has no attribute 'Mine'"),
    ],
)
def test_the_cause_of_a_failed_import_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str | None, said: str
) -> None:
    """Protects whoever writes a strategy from 'Error loading' and nothing more."""
    monkeypatch.delitem(sys.modules, "own_strategy", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    if body:
        (tmp_path / "own_strategy.py").write_text(body)
    with pytest.raises(UserError, match=said):
        build_strategy({"_target_": "own_strategy.Mine"})


def test_options_may_stand_among_settings(capsys: pytest.CaptureFixture[str]) -> None:
    """Protects a user who adds a setting at the end of the line."""
    assert run.main(["rounds=3", "--cfg", "job", "seed=5"]) == 0
    shown = capsys.readouterr().out
    assert "rounds: 3\n" in shown
    assert "seed: 5\n" in shown


def test_a_batch_size_is_shared_by_the_ranks() -> None:
    """Protects the batch that was asked for: micro batches divide it, however many ranks."""
    train = compose_config(["train.batch_size=24", "train.micro_batch=5"]).train
    for ranks, micro, accumulation in ((1, 4, 6), (2, 4, 3), (3, 4, 2), (24, 1, 1)):
        made = batch_size.shared(train, ranks, "x")
        assert (made.micro_batch, made.accumulation) == (micro, accumulation)
    with pytest.raises(UserError, match=r"by the 2 ranks of facility local_a.*batch_size=8"):
        compose_config(["train.batch_size=7"])
    made = batch_size.shared(replace(train, tensor=2), 4, "x")
    assert (made.micro_batch, made.accumulation) == (4, 3), "two groups of ranks, not four ranks"
    with pytest.raises(UserError, match=r"leave train\.accumulation out"):
        compose_config(["train.batch_size=8", "train.accumulation=2"])


def test_offloading_goes_with_shards_alone() -> None:
    """Protects from ranks that would have weights of a layer in two places."""
    assert compose_config(["train.cpu_offload=true"]).train.cpu_offload
    for other in ("train.tensor=2", "model.lora.quantize=nf4 model.lora.r=8 model.path=x"):
        key = other.partition("=")[0]
        given = ["+facility=local_a", "facilities.local_a.ranks_per_node=2", *other.split()]
        given.append("facilities.local_a.gpus_per_node=2")
        with pytest.raises(UserError, match=f"leave out one of train.cpu_offload and {key}"):
            compose_config(["train.cpu_offload=true", *given])


def test_an_objective_suits_the_model() -> None:
    """Protects from a job that could only be refused: the command to type is in the message."""
    spans = "data.objective=span_corruption"
    assert compose_config(["model=tiny_mt5", spans]).data.objective == "span_corruption"
    with pytest.raises(UserError, match=f"next_token is not for an encoder-decoder.*{spans}.*seq2"):
        compose_config(["model=tiny_mt5"])
    pairs = ["data.objective=seq2seq", "data=jsonl"]
    pairs += [f"data.paths.{name}=[x.jsonl]" for name in ("local_a", "local_b")]
    assert compose_config(["model=tiny_mt5", *pairs, "data.target_len=8"]).data.target_len == 8
    with pytest.raises(UserError, match=r"seq2seq is not for a causal model.*next_token, which"):
        compose_config(pairs)
    with pytest.raises(UserError, match=r"data=stdlib holds texts alone.*data=jsonl"):
        compose_config(["model=tiny_mt5", pairs[0]])
    with pytest.raises(UserError, match=r"data.passages are put among texts"):
        compose_config(["model=tiny_mt5", *pairs, "data.passages=x.jsonl"])
    with pytest.raises(UserError, match=r"data.target_len=8 is of .*data.objective=seq2seq"):
        compose_config(["data.target_len=8"])
    with pytest.raises(UserError, match=r"span_corruption is not for a causal model"):
        compose_config([spans])
    with pytest.raises(UserError, match=r"goldfish goes with data.objective=next_token"):
        compose_config(["model=tiny_mt5", spans, "train.loss=goldfish"])
