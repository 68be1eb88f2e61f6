"""Running the recipes that a command gives: one by one, or several through the sweep's engine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from rodimus_lab.recipe import Recipe
from rodimus_lab.records import describe_budget
from rodimus_lab.sweep.engine import SweepOptions, sweep
from rodimus_lab.sweep.outcome import failures
from rodimus_lab.train import TrainOptions, train


def run_all(recipes: Sequence[Recipe], training: TrainOptions, spread: SweepOptions, console: Console) -> str | None:
    """Run the recipes (finished ones are skipped) and print what came of each. Gives a sweep's failures in words."""
    if not recipes:
        return None
    asked = (spread.jobs, spread.runs_per_gpu, spread.cpus_per_run, spread.ray_address)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if any(asked) or (len(recipes) > 1 and ranks == 1):
        outcomes = sweep(recipes, spread, training, console=console)
        for outcome in outcomes:
            if outcome.record:
                console.print(_result(outcome.recipe, outcome.record))
        return failures(outcomes)
    for recipe in recipes:
        console.print(_result(recipe, train(recipe, training)))
    return None


def _result(recipe: Recipe, record: Mapping[str, Any]) -> str:
    metrics = record["metrics"]
    shown = [f"{name.replace('_', ' ')} {metrics[name]:.2f}" for name in ("test_ppl", "valid_ppl") if metrics.get(name)]
    if metrics.get("test_accuracy") is not None:
        shown.append(f"test accuracy {metrics['test_accuracy']:.2%}")
    if metrics.get("tokens_per_second"):
        shown.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    budget = describe_budget(recipe.budget.to_dict())
    return f"{recipe.id}: {', '.join(shown)} (corpus {recipe.data.corpus}, {budget}, {record['device']})"
