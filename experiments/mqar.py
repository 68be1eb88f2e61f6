"""The runs of multi-query associative recall: Figure 6 (by width) and Figure 1b (by state expansion), D.7.

Every run is one model, one shape of the task and one learning rate, trained as Zoology's code trains (docs/choices.md).
Where models come closer than `CLOSE`, the best rates are run with three seeds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from rodimus_lab.data.mqar import PAPER_PAIRS, MqarConfig, MqarSegment, single
from rodimus_lab.errors import UserError
from rodimus_lab.experiment import BudgetName, TrainAll, choose_budget, experiment
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.nn.zoo import MODELS, Size, model_config, slug
from rodimus_lab.recipe import BudgetConfig, OptimizerConfig, Recipe, ScheduleConfig
from rodimus_lab.records import Record, load_records
from rodimus_lab.registry import plain_spelling
from rodimus_lab.report.recall import CLOSE, EXPANSION_FIELDS, FIGURE_1B, FIGURE_6, METRIC, best_points, too_close
from rodimus_lab.scoring import Precision

LAYERS = 2
SEED = 123  # Zoology's
GRIDS = {"6": FIGURE_6, "1b": FIGURE_1B}
BATCHES = {64: 512, 128: 512, 256: 256, 512: 128, 1024: 64}
EPOCHS = {"6": 64, "1b": 32}
PRECISION: Precision = "bf16"
# Milliseconds of a step of 512 x 128 tokens on an H200, in bf16 and captured, at the least and the greatest width
# (docs/benchmarks.md).
STEP_MS = {
    "rodimus": (1.68, 6.66),
    "rodimus+": (2.45, 12.06),
    "mamba": (3.62, 21.46),
    "mamba2": (3.31, 13.94),
    "rwkv4": (1.76, 9.57),
    "rwkv6": (2.80, 15.87),
    "transformer++": (1.28, 9.28),
}
TIMED_LENGTH = 128
ENOUGH: float = MqarConfig.model_fields["enough"].default
SEEDS = 3
SHORT = 8  # The short budget has one epoch for so many of the paper's.
SMOKE = {"seq_len": 64, "num_pairs": 4, "vocab_size": 256, "width": 32, "expansion": 16, "lr": 1.4e-2}
SMOKE_EXAMPLES, SMOKE_EPOCHS, SMOKE_BATCH = 8_000, 3, 16


def run_all(recipes: Sequence[Recipe], train_all: TrainAll) -> None:
    """Train the recipes, and then, with two seeds more, those whose points came too close to call."""
    train_all(recipes)
    asked = {recipe.id for recipe in recipes}
    found = [record for record in load_records(experiment="mqar") if record.id in asked]
    best_points(found)  # Refuses runs that are not whole.
    there = {record.id for record in found}
    lacking = {_but_rate(recipe.to_dict()) for recipe in recipes if recipe.id not in there}
    settled = (
        record
        for record in found
        if record.metrics.get(METRIC, 0.0) > ENOUGH or _but_rate(record.recipe) not in lacking
    )
    train_all(contested(list(settled)))


def contested(records: Sequence[Record]) -> list[Recipe]:
    """The best runs of the points where models differ by less than `CLOSE`, with the next seeds."""
    more = []
    for points in best_points(records).values():
        for point in too_close(points, CLOSE, ENOUGH):
            recipe = Recipe.from_dict(point.runs[0].recipe)
            more += [recipe.replace(seed=recipe.seed + number) for number in range(1, SEEDS)]
    return more


def gpu_hours(recipe: Recipe) -> float | None:
    """At most so long does the run take on an H200, by the steps that were timed there; evaluations and compilation are
    not in it. None for models and widths that were not timed.

    Between the two widths the time goes by a power of the width. A longer example or a larger state takes as much more
    as its FLOPs are more, with the logits of the questions alone.
    """
    model, data, budget = plain_spelling(recipe.label), recipe.data, recipe.budget
    width = recipe.model.d_model
    if not isinstance(data, MqarConfig) or len(data.train) != 1 or model not in STEP_MS:
        return None
    (low, high), (first, last) = STEP_MS[model], (FIGURE_6.widths[0], FIGURE_6.widths[-1])
    if not first <= width <= last or len(recipe.model.blocks) != LAYERS:
        return None
    timed = single(TIMED_LENGTH, PAPER_PAIRS[TIMED_LENGTH])
    more = _work(recipe.model, data) / _work(architecture(model, timed, width), timed)
    part = budget.batch_size * data.seq_len / (BATCHES[TIMED_LENGTH] * TIMED_LENGTH)
    step = low * (high / low) ** (math.log(width / first) / math.log(last / first)) * more * part
    return budget.steps * step / 3.6e6


def _work(config: LanguageModelConfig, data: MqarConfig) -> float:
    """Training FLOPs a token, where only the questions have logits."""
    (shape,) = data.train
    unasked = 1 - shape.num_pairs / shape.seq_len
    return config.training_flops_per_token(shape.seq_len) - 6 * config.vocab_size * config.d_model * unasked


@experiment("mqar", reports=("figure06", "figure01b"), run=run_all, hours=gpu_hours)
def mqar(
    figure: Literal["6", "1b"] = "6",
    model: str | None = None,
    length: int | None = None,
    width: Annotated[int | None, Field(ge=1)] = None,
    expansion: Annotated[int | None, Field(ge=1)] = None,
    lr: Annotated[float | None, Field(gt=0)] = None,
    budget: BudgetName | None = None,
    precision: Precision | None = None,
    seed: Annotated[int, Field(ge=0)] = SEED,
) -> Sequence[Recipe]:
    """Train on multi-query associative recall: a figure's runs, or those of one model, length, width or rate.

    The smoke budget trains one small model on a short task; the short one has an eighth of the epochs. The precision is
    bf16 unless it is given, of the smoke budget fp32.
    """
    name, _ = choose_budget(budget)
    if name == "smoke":
        asked = {"--figure": figure if figure != "6" else None, "--length": length, "--width": width}
        for option, value in (asked | {"--expansion": expansion}).items():
            if value is not None:
                raise UserError(
                    f"the smoke budget trains one small model of its own, so {option} {value} would change nothing; "
                    "leave it out, or add --budget short or paper"
                )
        return [_smoke(model or "rodimus", lr=lr, seed=seed, precision=precision or "fp32")]
    grid = GRIDS[figure]
    models = grid.models if model is None else (MODELS.canonical(model),)
    if figure == "6" and expansion is not None:
        raise UserError("--expansion belongs to Figure 1b; add --figure 1b, or leave it out")
    if figure == "1b" and (fixed := [one for one in models if one not in EXPANSION_FIELDS]):
        raise UserError(f"{fixed[0]} has no state expansion to vary; give one of {', '.join(EXPANSION_FIELDS)}")
    lengths, widths = _chosen("length", length, grid.lengths), _chosen("width", width, grid.widths)
    expansions: Sequence[int | None] = _chosen("expansion", expansion, grid.expansions) or (None,)
    rates = grid.rates if lr is None else (lr,)
    epochs = EPOCHS[figure]
    trained = epochs if name == "paper" else epochs // SHORT
    return [
        recipe_of(
            one, single(t, PAPER_PAIRS[t]), d, rate, epochs=trained, paper_epochs=epochs, batch_size=BATCHES[t],
            name=name, expansion=n, seed=seed, precision=precision or PRECISION,
        )
        for t in lengths
        for d in widths
        for n in expansions
        for one in models
        for rate in rates
    ]  # fmt: skip


def recipe_of(
    model: str,
    data: MqarConfig,
    width: int,
    lr: float,
    *,
    epochs: int,
    batch_size: int,
    name: BudgetName,
    paper_epochs: int | None = None,
    expansion: int | None = None,
    layers: int = LAYERS,
    seed: int = SEED,
    precision: Precision = PRECISION,
) -> Recipe:
    """One run: a model of `layers` blocks, evaluated after every epoch."""
    per_epoch = sum(-(-segment.num_examples // batch_size) for segment in data.train)
    return Recipe(
        experiment="mqar",
        label=slug(model),
        model=architecture(model, data, width, layers=layers, expansion=expansion),
        data=data,
        optimizer=OptimizerConfig(lr=lr, beta1=0.9, beta2=0.999, weight_decay=0.1, clip_norm=None),
        schedule=ScheduleConfig(kind="cosine_by_epoch", warmup_steps=0, min_lr=0),
        budget=BudgetConfig(
            name=name,
            steps=epochs * per_epoch,
            batch_size=batch_size,
            paper_steps=None if paper_epochs is None else paper_epochs * per_epoch,
            eval_every=per_epoch,
        ),
        precision=precision,
        seed=seed,
        evaluators=("accuracy",),
    )


def architecture(
    model: str, data: MqarConfig, width: int, *, layers: int = LAYERS, expansion: int | None = None
) -> LanguageModelConfig:
    """The first `layers` blocks of the model at a width, with one head of attention."""
    size = Size("mqar", layers, width, 1, data.vocab_size, data.seq_len)
    changes: dict[str, Any] = {}
    if expansion is not None:
        kind, field = EXPANSION_FIELDS[MODELS.canonical(model)]
        changes[kind] = {field: expansion}
    config = model_config(model, size=size, **changes)
    return config.replace(pattern=config.blocks[:layers], repeats=1)


def _smoke(model: str, *, lr: float | None, seed: int, precision: Precision) -> Recipe:
    def segment(count: int) -> MqarSegment:
        return MqarSegment(num_examples=count, seq_len=int(SMOKE["seq_len"]), num_pairs=int(SMOKE["num_pairs"]))

    data = MqarConfig(train=(segment(SMOKE_EXAMPLES),), test=segment(1_000), vocab_size=int(SMOKE["vocab_size"]))
    expansion = int(SMOKE["expansion"]) if MODELS.canonical(model) in EXPANSION_FIELDS else None
    return recipe_of(
        model, data, int(SMOKE["width"]), lr or SMOKE["lr"], epochs=SMOKE_EPOCHS, batch_size=SMOKE_BATCH, name="smoke",
        expansion=expansion, seed=seed, precision=precision,
    )  # fmt: skip


def _but_rate(recipe: Mapping[str, Any]) -> str:
    """What the runs of one point have in common, in one spelling."""
    optimizer = {name: value for name, value in recipe["optimizer"].items() if name != "lr"}
    return json.dumps({**recipe, "optimizer": optimizer}, sort_keys=True)


def _chosen(option: str, value: int | None, known: Sequence[int]) -> Sequence[int]:
    if value is None:
        return known
    if value not in known:
        raise UserError(f"--{option}: {value} is not in the figure; give one of {', '.join(map(str, known))}")
    return (value,)
