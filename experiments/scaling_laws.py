"""Scaling laws (Figure 4, Tables 8 and 9) and language modelling on the Pile at 350M (Table 6).

What the tables leave open: the warm-up is Table 5's share of the steps for the Pile (572 of 13,351), the schedule a
cosine to 1e-5. Table 9 names no steps: they are Table 2's tokens over its batch, whose tokens are read as multiples of
2^18. The short budget is a ladder of our own below the paper's sizes, at a fixed number of tokens a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from rodimus_lab.data import padded_vocab_size
from rodimus_lab.errors import UserError
from rodimus_lab.experiment import BudgetName, choose_budget, experiment, shrink
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.nn.zoo import MODELS, SIZES, Size, model_config, slug
from rodimus_lab.recipe import BudgetConfig, DataConfig, OptimizerConfig, Recipe, ScheduleConfig
from rodimus_lab.registry import load_plugins
from rodimus_lab.settings import SETTINGS

NAME = "scaling-laws"
FOUR = ("rodimus", "rodimus+", "mamba2", "transformer++")
TABLE_6_MODELS = ("transformer++", "transformer++-swa", "hgrn2", "mamba", "mamba2", "rodimus", "rodimus+")
TABLE_6_SIZE = "350m"
TABLE_6_SHORT_STEPS = 1_350
PILE = SETTINGS["pile-7b"]
WARMUP_SHARE = PILE.warmup_steps / PILE.steps
MIN_LR = 1e-5
SEQ_LEN = PILE.seq_len


class Setting(NamedTuple):
    """How a size is trained: `corpus` with as many tokens as the run reads, once."""

    size: Size
    steps: int
    batch: int
    lr: float
    corpus: str = PILE.corpus
    tokenizer: str = PILE.tokenizer


def _of_size(name: str, corpus: str) -> Setting:
    paper = SETTINGS[name]
    return Setting(SIZES[name], paper.steps, paper.batch_size, paper.peak_lr, corpus, paper.tokenizer)


TABLE_8 = {
    name: _of_size(name, corpus)
    for name, corpus in (
        ("125m", "pile:2.6b"),
        ("350m", "pile:7.1b"),
        ("760m", "pile:15.3b"),
        ("1.3b", "pile:26.3b"),
    )
}
# Batches of 1.5 x 2^20, 0.75 x 2^20 and 6 x 2^20 tokens, which print as 1.5M, 0.8M and 6.3M. The corpus of the larger
# ones is not public; the Pile stands in for it.
TABLE_9: dict[str, tuple[tuple[str, ...], Setting]] = {
    "130m": (("rodimus", "rodimus+"), Setting(SIZES["125m"], 63_579, 768, 3e-3, "pile:100.1b")),
    "460m": (("rodimus", "rodimus+"), Setting(SIZES["460m"], 190_735, 384, 1.5e-3, "pile:150.1b", "rodimus")),
    "1.4b": (("rodimus",), Setting(SIZES["1.6b"], 79_473, 3_072, 1e-3, "pile", "rodimus")),
    "1.6b": (("rodimus+",), Setting(SIZES["1.6b"], 158_946, 3_072, 1e-3, "pile", "rodimus")),
}


class Rung(NamedTuple):
    """A size of a ladder; steps follow from the model's own parameters."""

    size: Size
    batch: int
    lr: float


# Named by Rodimus's parameters without the embedding. Half an hour of one H200 a model, see docs/scale.md.
LADDER = {
    name: Rung(Size(name, layers, width, width // 64, 50277, SEQ_LEN), batch, lr)
    for name, layers, width, batch, lr in (
        ("1m", 4, 128, 16, 3e-3),
        ("4m", 4, 256, 16, 2e-3),
        ("13m", 6, 384, 32, 1.5e-3),
        ("30m", 8, 512, 32, 1e-3),
        ("57m", 10, 640, 64, 8e-4),
    )
}
RATIO = 8.0
MOST_RATIO = 1e6
SMOKE_LADDER = {
    name: Rung(Size("smoke", layers, width, 1, 4096, 256), 8, lr)
    for name, layers, width, lr in (("s1", 1, 32, 1e-2), ("s2", 2, 64, 6e-3), ("s3", 3, 96, 4e-3))
}
SMOKE_RATIO = 2.0


@experiment(NAME, reports=("figure04", "figure04-fit", "table8", "table9"))
def scaling_laws(
    model: str | None = None,
    size: str | None = None,
    table: Literal["8", "9"] = "8",
    ratio: Annotated[float | None, Field(gt=0, le=MOST_RATIO, allow_inf_nan=False)] = None,
    budget: BudgetName | None = None,
    corpus: str | None = None,
    packed: bool = False,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> Sequence[Recipe]:
    """Train models of several sizes and fit how their loss falls with compute: Figure 4, at Table 8's settings.

    The paper budget is Table 8's sizes (or Table 9's, --table 9); the short one a ladder of five sizes from 1M to 60M
    parameters beside the embedding, trained for a fixed number of tokens a parameter; the smoke one three tiny sizes.
    """
    recipes = _scaling_laws(model, size, table, ratio, choose_budget(budget)[0], corpus, seed)
    return [recipe.replace(data=recipe.data.replace(packed=packed)) for recipe in recipes]


def _scaling_laws(
    model: str | None,
    size: str | None,
    table: str,
    ratio: float | None,
    name: BudgetName,
    corpus: str | None,
    seed: int,
) -> list[Recipe]:
    load_plugins()
    if name == "paper":
        if ratio is not None:
            raise UserError("--ratio belongs to the short and smoke budgets; leave it out, or add --budget short")
        return _of_table_8(model, size, corpus, seed) if table == "8" else _of_table_9(model, size, corpus, seed)
    if table == "9":
        raise UserError("--table 9 has no shorter form; add --budget paper, or leave it out")
    ladder = LADDER if name == "short" else SMOKE_LADDER
    if name == "short":
        data = DataConfig(corpus=corpus or "pile:1b", tokenizer="gpt-neox", seq_len=SEQ_LEN)
    else:
        data = _smoke_data(corpus)
    ratio = ratio or (RATIO if name == "short" else SMOKE_RATIO)
    return [
        climb(one, rung, ladder[rung], ratio, name, data, seed)
        for one in _models(model, FOUR)
        for rung in _chosen(size, ladder)
    ]


@experiment("pile", reports=("table6",))
def pile(
    model: str | None = None,
    budget: BudgetName | None = None,
    corpus: str | None = None,
    steps: Annotated[int | None, Field(ge=1)] = None,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> Sequence[Recipe]:
    """Train Table 6's models, 350M on 7B tokens of the Pile, and measure their perplexity.

    Runs of the paper budget are those of scaling-laws at that size. The smoke budget trains a small model on the
    documentation that Python carries.
    """
    load_plugins()
    name, _ = choose_budget(budget)
    return [_table_6(one, name, corpus, steps, seed) for one in _models(model, TABLE_6_MODELS)]


def _table_6(model: str, name: BudgetName, corpus: str | None, steps: int | None, seed: int) -> Recipe:
    if name == "smoke":
        rung = Rung(SIZES["smoke"], 8, 3e-3)
        recipe = climb(model, "smoke", rung, 1, "smoke", _smoke_data(corpus), seed)
        budget, schedule = _smaller(recipe, steps or 100)
        return recipe.replace(experiment="pile", budget=budget.replace(name="smoke"), schedule=schedule)
    whole = recipe_of(model, TABLE_6_SIZE, TABLE_8[TABLE_6_SIZE], corpus, seed)
    if steps is None:
        steps = TABLE_6_SHORT_STEPS if name == "short" else whole.budget.steps
    if steps > whole.budget.steps:
        raise UserError(f"--steps: {steps:,} is more than the paper's {whole.budget.steps:,}; give at most these")
    if steps == whole.budget.steps:
        return whole
    budget, schedule = _smaller(whole, steps)
    return whole.replace(experiment="pile", budget=budget, schedule=schedule)


def _smoke_data(corpus: str | None) -> DataConfig:
    return DataConfig(corpus=corpus or "pydoc", tokenizer="pydoc-4096", seq_len=256)


def _smaller(recipe: Recipe, steps: int) -> tuple[BudgetConfig, ScheduleConfig]:
    return shrink(recipe.budget, recipe.schedule, steps)


def _of_table_8(model: str | None, size: str | None, corpus: str | None, seed: int) -> list[Recipe]:
    return [
        recipe_of(one, name, TABLE_8[name], corpus, seed)
        for one in _models(model, FOUR)
        for name in _chosen(size, TABLE_8)
    ]


def _of_table_9(model: str | None, size: str | None, corpus: str | None, seed: int) -> list[Recipe]:
    wanted = _models(model, ("rodimus", "rodimus+"))
    pairs = [(one, name) for name in _chosen(size, TABLE_9) for one in wanted if one in TABLE_9[name][0]]
    if not pairs:
        known = ", ".join(f"{one} at {name}" for name, (models, _) in TABLE_9.items() for one in models)
        raise UserError(f"Table 9 has no {wanted[0]}{f' at {size}' if size else ''}; it has {known}")
    return [recipe_of(one, name, TABLE_9[name][1], corpus, seed) for one, name in pairs]


def recipe_of(model: str, name: str, setting: Setting, corpus: str | None = None, seed: int = 0) -> Recipe:
    """A model at a size of Table 8 or 9."""
    return Recipe(
        experiment=NAME,
        label=f"{slug(model)}-{name}",
        model=model_config(model, size=setting.size, vocab_size=padded_vocab_size(setting.tokenizer)),
        data=DataConfig(corpus=corpus or setting.corpus, tokenizer=setting.tokenizer, seq_len=SEQ_LEN),
        optimizer=OptimizerConfig(lr=setting.lr),
        schedule=ScheduleConfig(warmup_steps=round(setting.steps * WARMUP_SHARE), min_lr=MIN_LR),
        budget=BudgetConfig(steps=setting.steps, batch_size=setting.batch, paper_steps=setting.steps),
        seed=seed,
    )


def climb(model: str, name: str, rung: Rung, ratio: float, budget: BudgetName, data: DataConfig, seed: int) -> Recipe:
    """A model at a rung of a ladder: `ratio` tokens for each of its own parameters beside the embedding."""
    config = model_config(model, size=rung.size, vocab_size=padded_vocab_size(data.tokenizer))
    steps = max(10, round(ratio * parameters(config) / (rung.batch * data.seq_len)))
    evaluations = 1 if budget == "smoke" else 4
    return Recipe(
        experiment=NAME,
        label=f"{slug(model)}-{name}",
        model=config,
        data=data,
        optimizer=OptimizerConfig(lr=rung.lr),
        schedule=ScheduleConfig(warmup_steps=max(1, steps // 10), min_lr=rung.lr / 10),
        budget=BudgetConfig(name=budget, steps=steps, batch_size=rung.batch, eval_every=-(-steps // evaluations)),
        precision="fp32" if budget == "smoke" else "bf16",
        seed=seed,
    )


def parameters(config: LanguageModelConfig) -> int:
    """Learnable scalars beside the embedding, which is the head as well."""
    return config.num_params() - config.vocab_size * config.d_model


def _models(asked: str | None, default: Sequence[str]) -> Sequence[str]:
    return default if asked is None else (MODELS.canonical(asked),)


def _chosen(size: str | None, known: Mapping[str, object]) -> Sequence[str]:
    if size is None:
        return list(known)
    if size not in known:
        raise UserError(f"--size: {size!r} is not trained at this budget; give one of {', '.join(known)}")
    return [size]
