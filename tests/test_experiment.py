"""Options to recipes, records to tables, and the choice of a budget."""

from __future__ import annotations

import json
from typing import Annotated

import pytest
import torch
from pydantic import Field

from rodimus_lab.bench.recording import EXPERIMENT as BENCH
from rodimus_lab.command import COMMANDS
from rodimus_lab.errors import UserError
from rodimus_lab.experiment import EXPERIMENTS, REPORTS, Experiment, choose_budget, shrink
from rodimus_lab.recipe import BudgetConfig, ScheduleConfig
from rodimus_lab.registry import load_plugins

load_plugins()


def demonstrate(size: Annotated[int, Field(ge=2)] = 4, rate: float | None = None) -> list:
    return [(size, rate)]


@pytest.fixture
def demonstration():
    return Experiment("demonstration", demonstrate, ())


def test_options_are_those_of_the_function(demonstration):
    assert {name: option.default for name, option in demonstration.options.items()} == {"size": 4, "rate": None}
    assert demonstration.options["rate"].annotation == float | None
    assert demonstration.recipes() == [(4, None)]
    assert demonstration.recipes(size=2, rate=0.5) == [(2, 0.5)]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"size": 1}, r"--size: input should be greater than or equal to 2 \(got 1\)"),
        ({"size": "big"}, r"--size: .*integer.*\(got 'big'\)"),
        ({"rate": []}, r"--rate: .*number"),
        ({"colour": 1}, r"--colour: unexpected"),
    ],
)
def test_an_option_that_is_wrong_is_named(demonstration, options, named):
    with pytest.raises(UserError, match=named):
        demonstration.recipes(**options)


# What a command must be told, since without it there is nothing to do.
NAMED = {"ablate": {"table": ["15"]}, "pretrain": dict.fromkeys(("language", "code", "synthetic"), "pydoc")}


def test_every_experiment_can_be_listed(cli, places):
    for name in EXPERIMENTS:
        asked = [
            f"--{option}={value if isinstance(value, str) else value[0]}"
            for option, value in NAMED.get(name, {}).items()
        ]
        planned = json.loads(cli(name, *asked, "--budget", "paper", "--dry-run", "--json").out)
        assert planned
        assert all(one["state"] == "new" and one["tokens"] > 0 for one in planned)


def test_every_experiment_has_defaults_and_known_reports():
    assert list(EXPERIMENTS)
    for name in EXPERIMENTS:
        experiment = EXPERIMENTS[name]
        assert all(option.default is not option.empty for option in experiment.options.values())
        runs = {recipe.experiment for recipe in experiment.recipes(**NAMED.get(name, {}))}
        assert name in runs <= set(EXPERIMENTS)
        for report in experiment.reports:
            assert runs & set(REPORTS[report].experiments)
    recorded = {*EXPERIMENTS, BENCH, *COMMANDS}  # `bench record` and commands write records of their own.
    for name in REPORTS:
        assert recorded.issuperset(REPORTS[name].experiments)


@pytest.mark.parametrize("asked", ["paper", "short", "smoke"])
def test_a_budget_that_is_asked_for_is_taken(asked):
    assert choose_budget(asked) == (asked, "as asked")


def test_the_budget_follows_the_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_budget(None)[0] == "smoke"
    assert "this machine has no GPU" in choose_budget(None)[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU of the test")
    assert choose_budget(None)[0] == "paper"
    assert "this machine has a GPU (a GPU of the test)" in choose_budget(None)[1]


@pytest.mark.parametrize(
    ("steps", "warmup", "eval_every"), [(1, 0, 1), (2, 1, 1), (100, 10, 50), (500, 50, 250), (1000, 100, 500)]
)
def test_shrinking_keeps_proportions(steps, warmup, eval_every):
    whole = BudgetConfig(steps=1000, batch_size=8, paper_steps=1000, eval_every=100)
    budget, schedule = shrink(whole, ScheduleConfig(warmup_steps=100), steps)
    assert (budget.name, budget.steps, budget.fraction) == ("short", steps, steps / 1000)
    assert (schedule.warmup_steps, budget.eval_every) == (warmup, eval_every)
    assert (budget.batch_size, schedule.min_lr) == (8, 1e-5)
    assert shrink(whole, ScheduleConfig(warmup_steps=0), steps)[1].warmup_steps == 0
