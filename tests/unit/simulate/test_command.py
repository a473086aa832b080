"""`python -m flwr_hpc.simulate` as a user meets it."""

from __future__ import annotations

import json
import logging
import re
import shlex
from pathlib import Path

import pytest

from flwr_hpc.config.command_line import add_settings, command_parser
from flwr_hpc.simulate import compare
from flwr_hpc.simulate.__main__ import compose, main
from flwr_hpc.simulate.config import LEARNING
from flwr_hpc.simulate.learning.tasks import TASKS

ROOT = Path(__file__).parents[3]
SCENARIOS = sorted(p.stem for p in (ROOT / "conf" / "scenario").glob("*.yaml"))
STRATEGIES = sorted(p.stem for p in (ROOT / "conf" / "strategy").glob("*.yaml"))
QUICK = ["learning=surrogate", "seeds=2", "steps=50", "scenario.target=2.2"]


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    """One process, and no more of Flower's log than before."""
    monkeypatch.setattr(compare.os, "cpu_count", lambda: 1)
    level = logging.getLogger("flwr").level
    yield
    logging.getLogger("flwr").setLevel(level)


def finite(value):
    raise AssertionError(f"not JSON: {value}")


def test_every_learning_task_can_be_chosen():
    """What the configuration offers is what there is."""
    assert tuple(TASKS) == LEARNING


def test_a_comparison(tmp_path, capsys):
    """A table, and everything else in the folder."""
    out = tmp_path / "out"
    assert main(["strategy=[fedavg,fedbackfill]", *QUICK, f"out={out}"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = shown.out.splitlines()
    assert "Time to a held-out loss of 2.2" in shown.out
    assert sum(line.split()[:3] == ["fedavg", "warm", "2/2"] for line in lines) == 1
    assert sum(line.split()[:3] == ["fedbackfill", "warm", "2/2"] for line in lines) == 1
    assert str(out / "results.json") in shown.out
    record = json.loads((out / "results.json").read_text(), parse_constant=finite)
    assert [r["strategy"] for r in record["rows"]] == ["fedavg", "fedbackfill"]
    assert [(r["strategy"], r["seed"]) for r in record["runs"]] == [
        ("fedavg", 0), ("fedavg", 1), ("fedbackfill", 0), ("fedbackfill", 1),
    ]  # fmt: skip
    assert record["config"]["scenario"]["target"] == 2.2
    assert all(run["curve"] for run in record["runs"])


def test_plots(tmp_path):
    """Loss and timelines, where matplotlib is installed."""
    pytest.importorskip("matplotlib")
    assert main(["strategy=diloco", *QUICK, f"out={tmp_path}"]) == 0
    for name in ("loss.png", "timelines.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_runs_that_do_not_get_there(tmp_path, capsys):
    """They are told from those that do; the file is JSON all the same."""
    short = ["scenario.horizon_h=0.5", "scenario.target=0.1"]
    assert (
        main(["strategy=diloco", "learning=surrogate", "seeds=1", *short, f"out={tmp_path}"]) == 0
    )
    assert "> 0.5" in capsys.readouterr().out
    record = json.loads((tmp_path / "results.json").read_text(), parse_constant=finite)
    assert record["rows"][0]["hours"] is None


def test_several_processes(tmp_path, monkeypatch):
    """Give what one gives."""
    found = []
    for workers in (1, 2):
        monkeypatch.setattr(compare.os, "cpu_count", lambda workers=workers: workers)
        assert main(["strategy=[diloco,fedbuff]", *QUICK, f"out={tmp_path / str(workers)}"]) == 0
        record = json.loads((tmp_path / str(workers) / "results.json").read_text())
        found.append(record["runs"])
    assert found[0] == found[1]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_shipped_strategy_composes_and_runs(strategy, tmp_path):
    """Of conf/strategy, as it is."""
    assert main([f"strategy={strategy}", *QUICK, "seeds=1", f"out={tmp_path}"]) == 0


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_shipped_scenario_runs(scenario, tmp_path):
    """Of conf/scenario, with four sites each."""
    config = compose([f"scenario={scenario}"])
    assert len(config.scenario.sites) == 4
    assert main([f"scenario={scenario}", "strategy=diloco", *QUICK, f"out={tmp_path}"]) == 0


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ([], ["fedavg", "diloco", "fedbackfill"]),
        (["strategy=fedbuff"], ["fedbuff"]),
        (["strategy=[fedbuff, diloco]"], ["fedbuff", "diloco"]),
        (["strategy=[fedbuff,fedbuff]"], ["fedbuff"]),
    ],
)
def test_strategies_by_name(given, names):
    """One, several, none."""
    assert list(compose(given).strategies) == names


def test_arguments_of_a_strategy_and_of_a_site():
    """Every setting has a key."""
    config = compose(
        [
            "strategy=diloco",
            "strategies.diloco.outer_lr=0.5",
            "+strategies.diloco.weighted_by=num-examples",
            "scenario.sites.a.queue.median_s=7200",
            "scenario.sites.a.outages=[[0,60],[100,200.5]]",
            "policy=per_round",
        ]
    )
    assert config.strategies["diloco"]["outer_lr"] == 0.5
    assert config.strategies["diloco"]["weighted_by"] == "num-examples"
    assert config.scenario.sites["a"].queue.median_s == 7200.0
    assert config.scenario.sites["a"].outages == [[0, 60], [100, 200.5]]


def test_policy_and_renewal_of_one_strategy():
    """Its file, or the command, may say how its allocations are held."""
    config = compose(
        [
            "strategy=[fedavg,fedbuff]",
            "seeds=1",
            "+strategies.fedavg.policy=per_round",
            "+strategies.fedbuff.max_successors=0",
        ]
    )
    jobs = {job.name: job for job in compare._jobs(config)}
    assert (jobs["fedavg"].policy, jobs["fedavg"].max_successors) == ("per_round", 3)
    assert (jobs["fedbuff"].policy, jobs["fedbuff"].max_successors) == ("warm", 0)
    assert "policy" not in jobs["fedavg"].strategy
    assert "max_successors" not in jobs["fedbuff"].strategy


def test_the_configuration_can_be_shown(capsys):
    """All of it, and nothing is run."""
    assert main(["--cfg", "job", "strategy=diloco", "seeds=7"]) == 0
    shown = capsys.readouterr().out
    assert "seeds: 7" in shown
    assert "_target_: strategies.diloco.DiLoCo" in shown
    assert "median_s: 3600.0" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["scenario=calmm"], ["no scenario 'calmm'", "Did you mean 'calm'", "congested"]),
        (["strategy=fedavgg"], ["no strategy 'fedavgg'", "Did you mean 'fedavg'"]),
        (["strategy="], ["strategy= takes names", "'strategy=[fedavg,fedbackfill]'"]),
        (["+facility=[nope]"], ["no facility 'nope'", "leonardo"]),
        (["stepz=3"], ["no key 'stepz'", "Did you mean 'steps'"]),
        (["scenario.sites.a.stepp=3"], ["no key 'stepp'", "Did you mean 'step_s'"]),
        (["strategy=diloco", "strategies.diloco.x=3"], ["To add one: +strategies.diloco.x=VALUE"]),
        (["steps=0"], ["steps=0 must be greater than zero"]),
        (["seeds=many"], ["seeds=many", "Integer"]),
        (["policy=hot"], ["policy=hot is not known", "own, warm, per_round"]),
        (["learning=deep"], ["learning=deep is not known", "network, text, surrogate"]),
        (["evaluate_every_s=-1"], ["evaluate_every_s=-1.0 must be zero or greater"]),
        (["scenario.target=0"], ["scenario.target=0.0 must be greater than zero"]),
        (["scenario.sites.a.step_s=-1"], ["scenario.sites.a.step_s=-1.0 must be greater"]),
        (["scenario.sites.a.walltime=00:01:00"], ["leaves no time to train"]),
        (["scenario.sites.a.walltime=soon"], ["'soon' is not HH:MM:SS"]),
        (["scenario.sites.a.outages=[[5,1]]"], ["outages takes pairs [from_s, to_s]", "[5, 1]"]),
        (["scenario.sites.a.outages=[[a,b]]"], ["outages takes pairs"]),
        (["scenario.sites.a.queue.regimes=[[1]]"], ["regimes takes pairs [from_s, median_s]"]),
        (["scenario.sites.a.queue.kind=magic"], ["kind=magic is not known", "lognormal"]),
        (["scenario.sites.a.queue.kind=trace"], ["queue.trace must name a file"]),
        (["scenario.sites.a.queue.mean_nodes=0.5"], ["mean_nodes=0.5 must be at least 1"]),
        (
            ["scenario.sites.a.queue.kind=cluster", "scenario.sites.a.nodes=99"],
            ["cluster_nodes=16 is too small for a job of 99 nodes"],
        ),
    ],
    ids=lambda x: " ".join(x) if len(x) == 1 and "=" in x[0] else None,
)
def test_mistakes(arguments, words, capsys):
    """One message, exit code 2: what was wrong, what was found, what would be right."""
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert len(shown.err.strip().splitlines()) == 1
    for word in words:
        assert word in shown.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["strategy=diloco", "+strategies.diloco.outer=1"], ["DiLoCo", "'outer'"]),
        (["scenario.sites.a.queue.kind=replay"], ["scenario.sites.a.queue.waits_s=[60,900]"]),
        (["scenario.sites.a.queue.kind=history"], ["no run has kept waits of facility 'a'"]),
        (
            ["scenario.sites.a.queue.kind=trace", "scenario.sites.a.queue.trace=no.swf"],
            ["cannot read the trace no.swf"],
        ),
    ],
)
def test_mistakes_that_show_when_a_run_begins(arguments, words, capsys, tmp_path):
    """As well."""
    assert main([*arguments, *QUICK, f"out={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    for word in words:
        assert word in err


# ---- the page -----------------------------------------------------------------------------------

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def documented() -> list[object]:
    """Return the arguments of every documented `python -m flwr_hpc.simulate`."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "flwr_hpc.simulate" in words:
                    arguments = words[words.index("flwr_hpc.simulate") + 1 :]
                    found.append(pytest.param(arguments, id=f"{page.name}: {' '.join(arguments)}"))
    return found


@pytest.mark.parametrize("arguments", documented())
def test_documented_command(arguments):
    """Protects readers from commands that are refused."""
    args = add_settings(command_parser("simulate", "")).parse_args(arguments)
    compare.scenario_of(compose(args.overrides, args.config_dir))


def test_documented_scenario(tmp_path):
    """The page's own scenario runs from a folder of the user's."""
    page = (ROOT / "docs" / "simulate.md").read_text()
    text = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[0]
    (tmp_path / "scenario").mkdir()
    (tmp_path / "scenario" / "mine.yaml").write_text(text)
    chosen = ["--config-dir", str(tmp_path), "scenario=mine", "strategy=diloco"]
    assert main([*chosen, *QUICK, "seeds=1", f"out={tmp_path / 'out'}"]) == 0


def test_the_page_lists_every_strategy_and_scenario():
    """Nobody looks for what is not told of."""
    docs = ROOT / "docs"
    table = (docs / "strategies.md").read_text()
    assert [name for name in STRATEGIES if f"`{name}`" not in table] == []
    assert [n for n in SCENARIOS if f"| `{n}` |" not in (docs / "simulate.md").read_text()] == []
