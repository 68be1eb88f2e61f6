"""A recipe: everything that decides the outcome of one run, and an id made of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PrivateAttr, Tag, model_validator

from rodimus_lab.config import Config, ConfigError
from rodimus_lab.data.mixture import MixtureConfig
from rodimus_lab.data.mqar import MqarConfig
from rodimus_lab.data.needle import NeedleConfig
from rodimus_lab.errors import UserError
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.scoring import Precision

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class DataConfig(Config):
    """What is read: a corpus and a tokenizer by name, cut into contiguous blocks of `seq_len` tokens (plus the next
    one as the last target).

    With `packed` a token sees its own document only: state, attention and convolutions begin afresh after each
    end-of-document token, which still predicts the next document's first token, so that as many tokens count.
    """

    corpus: str
    tokenizer: str
    seq_len: Positive
    packed: bool = False

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        if not self.packed:  # As the recipes of before were written, whose ids must stay.
            del values["packed"]
        return values


def _sort_of_data(value: Any) -> str:
    """Text, unless a `task` is named."""
    named = value.get("task") if isinstance(value, Mapping) else getattr(value, "task", None)
    return "text" if named is None else str(named)


AnyData = Annotated[
    Annotated[DataConfig, Tag("text")]
    | Annotated[MixtureConfig, Tag("mixture")]
    | Annotated[MqarConfig, Tag("mqar")]
    | Annotated[NeedleConfig, Tag("needle")],
    Discriminator(_sort_of_data),
]


class OptimizerConfig(Config):
    """AdamW. Weight decay spares biases, norms and whatever a module declares (see `train/optimizer.py`)."""

    lr: Annotated[float, Field(gt=0)] = 5e-4
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0


class ScheduleConfig(Config):
    """Learning rate over the steps: linear warm-up to the peak, then `kind` down to `min_lr` at the last step.

    cosine_by_epoch is a cosine that moves only after an evaluation: with one an epoch, PyTorch's CosineAnnealingLR.
    """

    kind: Literal["cosine", "cosine_by_epoch", "linear", "constant", "inverse_sqrt"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 2000
    min_lr: Annotated[float, Field(ge=0)] = 1e-5


class BudgetConfig(Config):
    """How much is trained: `steps` by this run, `paper_steps` by the paper for the same table cell."""

    name: Literal["paper", "short", "smoke"] = "paper"
    steps: Positive
    batch_size: Positive
    paper_steps: Positive | None = None
    eval_every: Positive = 1000
    patience: Positive | None = None

    @property
    def fraction(self) -> float | None:
        """Share of the paper's steps, or None where the paper has no such run."""
        return None if self.paper_steps is None else self.steps / self.paper_steps


class Recipe(Config):
    """One run, wholly described. What does not change the outcome (micro-batches, devices, compilation) is not here.

    `experiment` is the folder of its record; `label` the row or point that the run stands for, such as a model's name.
    A recipe may know the one that it was made from, which is no part of what it is, and stands in the run's record.
    """

    _base: Recipe | None = PrivateAttr(default=None)

    experiment: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    label: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    model: LanguageModelConfig
    data: AnyData
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    budget: BudgetConfig
    precision: Precision = "bf16"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    evaluators: tuple[str, ...] = ("perplexity",)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.schedule.warmup_steps >= self.budget.steps:
            raise ValueError(
                f"the warm-up takes {self.schedule.warmup_steps} steps, but the budget is {self.budget.steps}; "
                "shorten the warm-up"
            )
        if self.schedule.min_lr > self.optimizer.lr:
            raise ValueError(
                f"the least learning rate, {self.schedule.min_lr}, is above the peak, {self.optimizer.lr}; swap them"
            )
        return self

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """The recipe in a JSON file. Raises `UserError` naming the file and what is wrong with it."""
        try:
            values = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"it is not JSON: {error}"
            raise UserError(f"cannot read {path} ({reason}); give a run's recipe.json") from None
        if not isinstance(values, dict):
            raise UserError(f"{path} holds no JSON object; give a run's recipe.json")
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise UserError(f"{path} is not a recipe ({error}); correct it") from None

    @property
    def id(self) -> str:
        """`<label>-<8 hex digits of the canonical JSON's hash>`; the same recipe has the same id everywhere."""
        return f"{self.label}-{self.digest()}"

    def departing_from(self, base: Recipe) -> Recipe:
        """The same recipe, knowing its base."""
        copy = self.model_copy()
        copy._base = base
        return copy

    @property
    def reads_text(self) -> bool:
        """Whether its model reads tokens of a tokenizer, and not those of a task."""
        return not isinstance(self.data, MqarConfig)

    @property
    def base(self) -> Recipe | None:
        return self._base

    @property
    def departure(self) -> dict[str, Any] | None:
        """`base`, the base's id, and `changes`, dotted path -> [there, here], of all but the names; None without a
        base."""
        if self._base is None:
            return None
        there, here = ({**recipe.to_dict(), "experiment": "", "label": ""} for recipe in (self._base, self))
        return {"base": self._base.id, "changes": dict(_differences(there, here))}


def _differences(there: Any, here: Any, path: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Where two plain values differ, as deep down as both have the same keys or lengths."""
    if isinstance(there, dict) and isinstance(here, dict) and there.keys() == here.keys():
        pairs = [(name, there[name], here[name]) for name in there]
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = [(str(index), *both) for index, both in enumerate(zip(there, here, strict=True))]
    else:
        if there != here:
            yield path, [there, here]
        return
    for name, before, after in pairs:
        yield from _differences(before, after, f"{path}.{name}" if path else name)
