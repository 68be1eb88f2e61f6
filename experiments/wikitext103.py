"""Language modelling on WikiText-103: Table 1, at the settings of Table 5.

What the paper leaves open is an option here: the schedule between warm-up and the minimum rate is a cosine, and dropout
is 0 (the published model code has none; its training lineage used 0.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from rodimus_lab.data import padded_vocab_size
from rodimus_lab.errors import UserError
from rodimus_lab.experiment import BudgetName, choose_budget, experiment, report, shrink
from rodimus_lab.nn.zoo import model_config, slug
from rodimus_lab.recipe import BudgetConfig, DataConfig, OptimizerConfig, Recipe, ScheduleConfig
from rodimus_lab.records import Record
from rodimus_lab.report import Metric, PaperResults, Table, paper_vs_measured

PAPER_STEPS = 25_000
SHORT_STEPS = 1_500
SMOKE = BudgetConfig(name="smoke", steps=300, batch_size=8, eval_every=100)
SMOKE_SCHEDULE = ScheduleConfig(warmup_steps=30, min_lr=1e-4)
SMOKE_LR = 3e-3


@experiment("wikitext103", reports=("table1",))
def wikitext103(
    model: str = "rodimus",
    budget: BudgetName | None = None,
    corpus: str | None = None,
    steps: Annotated[int | None, Field(ge=1)] = None,
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> Sequence[Recipe]:
    """Train one model at Table 1's configuration and measure its perplexity.

    The smoke budget trains a small model on the documentation that Python carries (corpus pydoc). A corpus other than
    wikitext-103 is a stand-in and labelled so.
    """
    name, _ = choose_budget(budget)
    label = slug(model)
    if name == "smoke":
        data = DataConfig(corpus=corpus or "pydoc", tokenizer="pydoc-4096", seq_len=256)
        size, rates, schedule, spent = "smoke", OptimizerConfig(lr=SMOKE_LR), SMOKE_SCHEDULE, SMOKE
        if steps is not None and steps != SMOKE.steps:
            spent, schedule = shrink(SMOKE, SMOKE_SCHEDULE, steps)
            spent = spent.replace(name="smoke")
    else:
        data = DataConfig(corpus=corpus or "wikitext-103", tokenizer="gpt2", seq_len=512)
        size, rates, schedule = "wikitext103", OptimizerConfig(), ScheduleConfig()
        spent = BudgetConfig(name="paper", steps=PAPER_STEPS, batch_size=256, paper_steps=PAPER_STEPS)
        if steps is None:
            steps = SHORT_STEPS if name == "short" else PAPER_STEPS
        if steps > PAPER_STEPS:
            raise UserError(f"--steps: {steps:,} is more than the paper's {PAPER_STEPS:,}; give at most these")
        if steps < PAPER_STEPS:
            spent, schedule = shrink(spent, schedule, steps)
    architecture = model_config(model, size=size, vocab_size=padded_vocab_size(data.tokenizer), dropout=dropout)
    return [
        Recipe(
            experiment="wikitext103",
            label=label,
            model=architecture,
            data=data,
            optimizer=rates,
            schedule=schedule,
            budget=spent,
            precision="fp32" if name == "smoke" else "bf16",
            seed=seed,
        )
    ]


@report("table1", experiments=("wikitext103",))
def table1(records: Sequence[Record], paper: PaperResults) -> Table:
    """Table 1: test perplexity and parameters, the paper's beside ours."""
    return paper_vs_measured(
        paper.table(1),
        records,
        title="Table 1. Perplexity on WikiText-103",
        metrics=(
            Metric("Params (M)", "params", "params_m", better=None, scale=1e-6),
            Metric("Test PPL", "test_ppl", "test_ppl"),
            Metric("Best test PPL", "best_test_ppl", None),
            Metric("Test PPL per word", "test_word_ppl", None),
        ),
        record_key=lambda record: (record.label,),
        paper_corpus="wikitext-103",
        caption="Perplexity is per token of the stated tokenizer, over every token of the split but the first.",
    )
