"""Finished runs of MQAR as they are read back, without training any."""

from __future__ import annotations

import json
from collections.abc import Sequence

from experiments.mqar import mqar
from rodimus_lab.recipe import Recipe
from rodimus_lab.records import Record


def record(recipe: Recipe, accuracy: float) -> Record:
    """A finished run of a recipe, as it is read back."""
    return Record(
        experiment="mqar",
        id=recipe.id,
        label=recipe.label,
        recipe=json.loads(recipe.canonical_json()),
        env={},
        metrics={"test_accuracy": accuracy, "steps": recipe.budget.steps},
        corpus=recipe.data.corpus,
        tokenizer="none",
        budget=recipe.budget.to_dict(),
        device="a device",
        commit="0",
        finished="2026-01-01",
        path=None,  # type: ignore[arg-type]
    )


def runs(accuracies: Sequence[float], **options) -> list[Record]:
    return [record(r, a) for r, a in zip(mqar(budget="paper", **options), accuracies, strict=True)]
