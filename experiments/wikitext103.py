"""Language modelling on WikiText-103: Table 1, at the settings of Table 5.

What the paper leaves open is an option here: the schedule between warm-up and the minimum rate is a cosine, and dropout
is 0 (the published model code has none; its training lineage used 0.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from rodimus_lab.data import padded_vocab_size
from rodimus_lab.experiment import BudgetName, choose_budget, experiment, report
from rodimus_lab.nn.zoo import model_config, slug
from rodimus_lab.recipe import Recipe
from rodimus_lab.records import Record
from rodimus_lab.report import Metric, PaperResults, Table, paper_vs_measured, with_order
from rodimus_lab.settings import SETTINGS

SETTING = SETTINGS["wikitext-103"]


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
    training = SETTING.at(name, corpus=corpus, steps=steps)
    size = "smoke" if name == "smoke" else "wikitext103"
    vocab_size = padded_vocab_size(training.data.tokenizer)
    architecture = model_config(model, size=size, vocab_size=vocab_size, dropout=dropout)
    return [training.recipe("wikitext103", slug(model), architecture, seed)]


@report("table1", experiments=("wikitext103",))
def table1(records: Sequence[Record], paper: PaperResults) -> Table:
    """Table 1: test perplexity and parameters, the paper's beside ours."""
    table = paper_vs_measured(
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
    return with_order(table, "Test PPL", ("Model",))
