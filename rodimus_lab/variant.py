"""Runs declared as one change to a base: what ablations and sweeps over a model's sizes are made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from rodimus_lab.data import padded_vocab_size
from rodimus_lab.errors import UserError
from rodimus_lab.experiment import BudgetName
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.nn.zoo import SIZES, model_config
from rodimus_lab.recipe import Recipe
from rodimus_lab.records import Record
from rodimus_lab.settings import SETTINGS

Change: TypeAlias = Callable[[LanguageModelConfig], LanguageModelConfig]
Row: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """A run in words: a model of the zoo at a size and at `layers`, with `change` made to it, trained as `setting` of
    `SETTINGS` says. `label` names it in its run's id; `base` is what it is one change away from."""

    label: str
    model: str
    size: str
    setting: str
    layers: int
    experiment: str
    change: Change = lambda config: config
    base: Variant | None = None

    def varied(self, experiment: str, label: str, *changes: Change, layers: int | None = None) -> Variant:
        """A departure from this one by further changes, in an experiment; `label` is added to its label."""

        def change(config: LanguageModelConfig) -> LanguageModelConfig:
            for make in (self.change, *changes):
                config = make(config)
            return config

        return replace(
            self,
            label=f"{self.label}-{label}",
            layers=layers or self.layers,
            change=change,
            base=self.base or self,
            experiment=experiment,
        )

    def config(self, *, smoke: bool, **overrides: Any) -> LanguageModelConfig:
        """The model; in a smoke run of the smoke width and a third of the layers."""
        size = SIZES["smoke" if smoke else self.size]
        size = size._replace(num_layers=self.layers // 3 if smoke else self.layers)
        return self.change(model_config(self.model, size=size, **overrides))

    def recipe(
        self, budget: BudgetName, *, corpus: str | None = None, steps: int | None = None, dropout: float, seed: int
    ) -> Recipe:
        """At a budget, knowing its base at the same."""
        training = SETTINGS[self.setting].at(budget, corpus=corpus, steps=steps)
        vocab_size = padded_vocab_size(training.data.tokenizer)
        config = self.config(smoke=budget == "smoke", vocab_size=vocab_size, dropout=dropout)
        recipe = training.recipe(self.experiment, self.label, config, seed)
        if self.base is None:
            return recipe
        return recipe.departing_from(self.base.recipe(budget, corpus=corpus, steps=steps, dropout=dropout, seed=seed))


def listed(option: str, asked: Iterable[str] | None, known: Iterable[object]) -> list[str]:
    """The values of an option, given one by one or joined by commas. Raises `UserError` listing the good ones."""
    values = [value.strip() for text in asked or () for value in text.split(",")]
    texts = [str(value) for value in known]
    for value in values:
        if value not in texts:
            raise UserError(f"--{option.replace('_', '-')} has no value {value!r}; known here: {', '.join(texts)}")
    return values


def distinct(recipes: Iterable[Recipe]) -> list[Recipe]:
    """Each recipe once, by its id."""
    return list({recipe.id: recipe for recipe in recipes}.values())


def rows_of(rows: Mapping[Row, Variant], records: Iterable[Record]) -> list[tuple[Record, Row]]:
    """The records that are runs of a table's variants, each with its row: those whose model is the row's, or its smoke
    run's, whatever the vocabulary and the dropout."""
    known = {
        _signature(variant.config(smoke=smoke).to_dict()): row
        for row, variant in rows.items()
        for smoke in (False, True)
    }
    found = ((record, known.get(_signature(record.recipe["model"]))) for record in records)
    return [(record, row) for record, row in found if row is not None]


def _signature(model: Mapping[str, Any]) -> str:
    told = {name: value for name, value in model.items() if name not in ("vocab_size", "dropout")}
    return json.dumps(told, sort_keys=True)
