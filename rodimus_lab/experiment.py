"""Experiments (options -> recipes) and reports (records -> tables), registered by name.

A file of `experiments/` holds one paper artefact. A function decorated with `@experiment` takes typed options, each
with a default, and gives the recipes to run; it becomes a command of the CLI with those options. One decorated with
`@report` is a pure function from records and the paper's numbers to a table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from rodimus_lab.recipe import BudgetConfig, Recipe, ScheduleConfig
from rodimus_lab.records import Record
from rodimus_lab.registry import Registry
from rodimus_lab.report import PaperResults, Table

BudgetName = Literal["paper", "short", "smoke"]
MakeRecipes = Callable[..., Sequence[Recipe]]
MakeTable = Callable[[Sequence[Record], PaperResults], Table]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Experiment:
    """`recipes(**options)` gives the runs; `reports` are the names of the tables that their records feed."""

    name: str
    recipes: MakeRecipes
    reports: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """`make(records, paper)` builds the table from the records of `experiments`."""

    name: str
    make: MakeTable
    experiments: tuple[str, ...]


EXPERIMENTS: Registry[Experiment] = Registry("experiment")
REPORTS: Registry[Report] = Registry("report")


def experiment(name: str, *, reports: Sequence[str] = ()) -> Callable[[F], F]:
    """Register a function from options to recipes."""

    def enter(function: F) -> F:
        EXPERIMENTS.register(name)(Experiment(name, function, tuple(reports)))
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
    return "smoke", "this machine has no GPU, and the paper's budget would take weeks; --budget chooses another"


def shrink(budget: BudgetConfig, schedule: ScheduleConfig, steps: int) -> tuple[BudgetConfig, ScheduleConfig]:
    """A budget of fewer steps, told as a fraction of the paper's; warm-up and evaluations shrink in proportion."""
    share = steps / budget.steps
    warmup = max(1, round(schedule.warmup_steps * share)) if schedule.warmup_steps else 0
    eval_every = max(1, min(steps, round(budget.eval_every * share * 5)))
    return budget.replace(name="short", steps=steps, eval_every=eval_every), schedule.replace(warmup_steps=warmup)
