"""Experiments (options -> recipes) and reports (records -> tables), registered by name.

A file of `experiments/` holds one paper artefact. A function decorated with `@experiment` takes typed options, each
with a default, and gives the recipes to run; it becomes a command of the CLI with those options. One decorated with
`@report` is a pure function from records and the paper's numbers to a table.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from pydantic import ValidationError, validate_call

from rodimus_lab.errors import UserError
from rodimus_lab.recipe import BudgetConfig, Recipe, ScheduleConfig
from rodimus_lab.records import Record
from rodimus_lab.registry import Registry
from rodimus_lab.report import PaperResults, Table

BudgetName = Literal["paper", "short", "smoke"]
MakeRecipes = Callable[..., Sequence[Recipe]]
TrainAll = Callable[[Sequence[Recipe]], None]
RunAll = Callable[[Sequence[Recipe], TrainAll], None]
Estimate = Callable[[Recipe], float | None]


def at_once(recipes: Sequence[Recipe], train_all: TrainAll) -> None:
    """Train all the recipes: what an experiment does that does not choose by its first results what comes next."""
    train_all(recipes)


def no_estimate(recipe: Recipe) -> float | None:
    """An experiment's hours where only the records of its runs can tell them."""
    return None


MakeTable = Callable[[Sequence[Record], PaperResults], Table]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Experiment:
    """`function` takes the options and gives the recipes; `reports` are the names of the tables that they feed.

    `run(recipes, train_all)` runs them where there is more to it than `train_all(recipes)`, such as runs that depend on
    what came of others. `hours(recipe)` are those of a run on an NVIDIA H200, by steps that were timed, or None; a dry
    run reckons with them where no record of the model has a speed.
    """

    name: str
    function: MakeRecipes
    reports: tuple[str, ...]
    run: RunAll = at_once
    hours: Estimate = no_estimate

    @property
    def options(self) -> Mapping[str, inspect.Parameter]:
        """The options with their types and defaults."""
        return inspect.signature(self.function, eval_str=True).parameters

    def recipes(self, **options: Any) -> Sequence[Recipe]:
        """The runs. Raises `UserError` for an option that is unknown, of the wrong type or out of range."""
        try:
            return validate_call(self.function)(**options)
        except ValidationError as error:
            first = error.errors()[0]
            option = "--" + "-".join(map(str, first["loc"])).replace("_", "-")
            message = first["msg"][0].lower() + first["msg"][1:]
            raise UserError(f"{option}: {message} (got {first['input']!r})") from None


@dataclass(frozen=True)
class Report:
    """`make(records, paper)` builds the table from the records of `experiments`."""

    name: str
    make: MakeTable
    experiments: tuple[str, ...]


EXPERIMENTS: Registry[Experiment] = Registry("experiment")
REPORTS: Registry[Report] = Registry("report")


def experiment(
    name: str, *, reports: Sequence[str] = (), run: RunAll = at_once, hours: Estimate = no_estimate
) -> Callable[[F], F]:
    """Register a function from options to recipes."""

    def enter(function: F) -> F:
        EXPERIMENTS.register(name)(Experiment(name, function, tuple(reports), run, hours))
        return function

    return enter


def report(name: str, *, experiments: Sequence[str]) -> Callable[[F], F]:
    """Register a function from records and the paper's numbers to a table."""

    def enter(function: F) -> F:
        REPORTS.register(name)(Report(name, function, tuple(experiments)))
        return function

    return enter


def choose_budget(asked: BudgetName | None) -> tuple[BudgetName, str]:
    """The budget to train at and, in words, why: paper with a GPU and smoke without, unless one is asked for."""
    if asked is not None:
        return asked, "as asked"
    if torch.cuda.is_available():
        return "paper", f"this machine has a GPU ({torch.cuda.get_device_name()}); --budget short takes a fraction"
    return "smoke", "this machine has no GPU, and the paper's budget is meant for one; --budget chooses another"


def shrink(budget: BudgetConfig, schedule: ScheduleConfig, steps: int) -> tuple[BudgetConfig, ScheduleConfig]:
    """A budget of fewer steps, told as a fraction of the paper's. The warm-up shrinks in
    proportion; evaluations come a fifth as often as in proportion."""
    share = steps / budget.steps
    warmup = min(max(1, round(schedule.warmup_steps * share)), steps - 1) if schedule.warmup_steps else 0
    eval_every = max(1, min(steps, round(budget.eval_every * share * 5)))
    return budget.replace(name="short", steps=steps, eval_every=eval_every), schedule.replace(warmup_steps=warmup)
