"""Hydra's values of several settings become points, each once, and mistakes are explained."""

from __future__ import annotations

import pytest

from flwr_hpc.errors import UserError
from flwr_hpc.sweep.options import split_options
from flwr_hpc.sweep.points import expand, short, varied


def test_the_product_of_all_values_in_hydras_order() -> None:
    """Protects the grid: the last setting varies fastest, what has one value is in every point."""
    points = expand(["train.lr=1e-4,3e-4", "rounds=2", "train.precision=bf16,fp32"])
    assert points == [
        ["rounds=2", "train.lr=0.0001", "train.precision=bf16"],
        ["rounds=2", "train.lr=0.0001", "train.precision=fp32"],
        ["rounds=2", "train.lr=0.0003", "train.precision=bf16"],
        ["rounds=2", "train.lr=0.0003", "train.precision=fp32"],
    ]


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("train.steps=range(10,40,10)", ["10", "20", "30"]),
        ("train.steps=choice(5,7)", ["5", "7"]),
        ("strategy=glob(fedback*)", ["fedbackfill", "fedbackfill_rounds"]),
        ("model.path=/a,/b/c", ["/a", "/b/c"]),
        ("train.betas=[0.9,0.95],[0.9,0.99]", ["[0.9,0.95]", "[0.9,0.99]"]),
        ("+facility=local_a,[local_a,local_b]", ["local_a", "[local_a,local_b]"]),
        ("seed=1,1,2", ["1", "2"]),
    ],
)
def test_every_kind_of_values(override: str, values: list[str]) -> None:
    """Protects Hydra's own semantics of multirun."""
    key = override.partition("=")[0]
    assert expand([override]) == [[f"{key}={value}"] for value in values]


def test_paths_that_hydra_cannot_read_stay_as_they_are() -> None:
    """Protects folders with spaces, which need no quotes for a run either."""
    points = expand(["data.paths.local_a=/my data/*.txt", "seed=1,2"])
    assert [p[0] for p in points] == ["data.paths.local_a=/my data/*.txt"] * 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.lr=1e-4"], "no setting has several. Give some, e.g. .* or leave -m out"),
        (["run_dir=a,b"], "'run_dir=a,b' cannot be swept: .*sweep.dir=FOLDER"),
        (["run_dir=a", "seed=1,2"], "run_dir is not for a sweep: .*sweep.dir=FOLDER"),
        (["seed=1,2", "seed=3"], "seed is given twice; give all its values at once"),
        (["train.lr=interval(0,1)"], "does not support sweep type"),
        (["seed=1,2", "rounds=[1"], "the value cannot be read"),
    ],
)
def test_mistakes_are_explained(overrides: list[str], message: str) -> None:
    """Protects the user from a sweep of something else than was meant."""
    with pytest.raises(UserError, match=message):
        expand(overrides)


def test_only_what_differs_is_told() -> None:
    """Protects the table: a column per setting that is not the same in all points."""
    assert varied([["rounds=2", "seed=1"], ["rounds=2", "seed=2", "+facility=local_a"]]) == [
        {"seed": "1", "facility": ""},
        {"seed": "2", "facility": "local_a"},
    ]


def test_headings_are_as_short_as_they_can_be() -> None:
    """Protects the table's width, and two settings from sharing a heading."""
    keys = ["train.lr", "facilities.a.nodes", "facilities.b.nodes", "seed"]
    assert short(keys) == ["lr", "facilities.a.nodes", "facilities.b.nodes", "seed"]


def test_options_of_the_sweep() -> None:
    """Protects ``sweep.*``, which no point is given."""
    options, rest = split_options(["seed=1,2", "sweep.parallel=3", "sweep.dir=/a b"])
    assert (options.parallel, options.dir, rest) == (3, "/a b", ["seed=1,2"])
    with pytest.raises(UserError, match=r"Did you mean 'parallel'\?.*max_points"):
        split_options(["sweep.paralel=3"])
    with pytest.raises(UserError, match=r"sweep.parallel=0 must be greater than zero"):
        split_options(["sweep.parallel=0"])
