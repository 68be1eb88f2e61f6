"""What `rodimus-lab eval` leaves: downstream tasks (Tables 2 and 10) and recall tasks (Table 11), zero-shot.

A model's records on different tasks, asked in the same way, are one row. Averages are those of the paper: the mean of
the seven accuracies, perplexity left out, and of the six recall tasks; they stand where every task was run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from evals.joining import joined
from evals.open_models import OPEN_MODELS
from rodimus_lab.experiment import report
from rodimus_lab.records import Record
from rodimus_lab.report import Cell, Metric, PaperResults, PaperRow, Table, overlaps, paper_vs_measured

PAPER_CORPUS = "pile"
NOT_RUN = "not run"
AVERAGE = "average"
# Heading, metric in the records, and column of the paper.
DOWNSTREAM = (
    ("ARC-c acc_norm", "arc_challenge.acc_norm", "arc_c_acc_norm"),
    ("ARC-e acc", "arc_easy.acc", "arc_e_acc"),
    ("HellaSwag acc_norm", "hellaswag.acc_norm", "hellaswag_acc_norm"),
    ("LAMBADA ppl", "lambada_openai.perplexity", "lambada_ppl"),
    ("LAMBADA acc", "lambada_openai.acc", "lambada_acc"),
    ("OBQA acc_norm", "openbookqa.acc_norm", "obqa_acc_norm"),
    ("PIQA acc", "piqa.acc", "piqa_acc"),
    ("WinoGrande acc", "winogrande.acc", "winogrande_acc"),
)
RECALL = (
    ("SWDE", "recall_swde.contains", "swde"),
    ("FDA", "recall_fda.contains", "fda"),
    ("SQuAD", "recall_squad.contains", "squad"),
    ("DROP", "recall_drop.contains", "drop"),
    ("NQ", "recall_nq.contains", "nq"),
    ("TriviaQA", "recall_triviaqa.contains", "triviaqa"),
)
PERPLEXITY = "lambada_openai.perplexity"
# Appendix D.9: the checkpoints of NeedleBench, which D.8 names.
RECALL_MODELS = {
    "EleutherAI/pythia-1.4b": "Pythia",
    "state-spaces/mamba-1.4b-hf": "mamba",
    "AntonV/mamba2-1.3b-hf": "mamba2",
}
HUB_ROWS = {model.hub: (model.model, model.params_b, model.tokens_b) for model in OPEN_MODELS}
ERRORS = "Our numbers stand with their standard errors over the test items, as lm-eval estimates them."
FORMAT_NOTE = (
    "The paper names no harness. Ours follows Based and prefix-linear-attention: prompts end with a cue or a cloze "
    "question, and an answer counts where the generated text contains it."
)


@report("table2", experiments=("eval",))
def table2(records: Sequence[Record], paper: PaperResults) -> Table:
    """Table 2: downstream tasks, zero-shot; every model that was evaluated."""
    return _downstream(
        paper.table(2),
        records,
        title="Table 2. Downstream tasks, zero-shot",
        part=("group", "Experiment"),
        notes=("Best and second best are marked within each experiment of the paper.",),
    )


@report("table10", experiments=("eval",))
def table10(records: Sequence[Record], paper: PaperResults) -> Table:
    """Table 10: downstream tasks, of models that were trained under one configuration; runs of this project only."""
    return _downstream(
        paper.table(10),
        [record for record in records if record.recipe["model"]["source"] == "run"],
        title="Table 10. Downstream tasks, zero-shot, models trained under one configuration",
        part=("params_b", "Size (B)"),
        notes=("Best and second best are marked within each size.",),
    )


@report("table11", experiments=("eval",))
def table11(records: Sequence[Record], paper: PaperResults) -> Table:
    """Table 11: recall tasks, 1,024 tokens in and 512 out."""
    rows = _rows(records, RECALL, average=[name for _, name, _ in RECALL])
    return paper_vs_measured(
        paper.table(11),
        rows,
        title="Table 11. Recall tasks, accuracy in %",
        metrics=_metrics(RECALL, "avg"),
        record_key=lambda record: (RECALL_MODELS.get(record.recipe["model"]["name"], record.label),),
        paper_corpus=PAPER_CORPUS,
        missing=NOT_RUN,
        notes=(FORMAT_NOTE, ERRORS, *overlaps(rows)),
    )


def _downstream(
    printed: Sequence[PaperRow], records: Iterable[Record], *, title: str, part: tuple[str, str], notes: Sequence[str]
) -> Table:
    column, heading = part
    key = ("model", "params_b", "tokens_b")
    facts = {tuple(Cell(row[name]).text for name in key): row for row in printed}
    tokenizers = {names: row["tokenizer"] for names, row in facts.items()}
    parts = {names: row[column] for names, row in facts.items()}
    given = {"Tokenizer": lambda names: Cell(tokenizers.get(names))}
    if column not in key:
        given = {heading: lambda names: Cell(parts.get(names))} | given
    accuracies = [name for _, name, _ in DOWNSTREAM if name != PERPLEXITY]
    return paper_vs_measured(
        printed,
        _rows(records, DOWNSTREAM, average=accuracies),
        title=title,
        metrics=_metrics(DOWNSTREAM, "avg_acc"),
        key=key,
        headings=("Model", "Params (B)", "Tokens (B)"),
        record_key=_downstream_row,
        given=given,
        section=column,
        paper_corpus=PAPER_CORPUS,
        missing=NOT_RUN,
        caption="Accuracies in %; the average is that of the seven accuracies.",
        notes=(*notes, ERRORS),
    )


def _metrics(columns: Sequence[tuple[str, str, str]], average: str) -> list[Metric]:
    named = [*columns, ("AVG", AVERAGE, average)]
    return [
        Metric(heading, name, column, "lower", stderr=f"{name}_stderr")
        if name == PERPLEXITY
        else Metric(heading, name, column, "higher", scale=100, stderr=f"{name}_stderr")
        for heading, name, column in named
    ]


def _downstream_row(record: Record) -> tuple[str, str, str]:
    """What names a model's row: as the paper prints it for an open model, else the model's size and its tokens."""
    source = record.recipe["model"]
    if source["name"] in HUB_ROWS:
        return HUB_ROWS[source["name"]]
    return record.label, _billions(record.metrics.get("params")), _billions(record.metrics.get("trained_tokens"))


def _billions(count: float | None) -> str:
    """0.13 or 1.4 as the paper writes sizes, 100 as it writes tokens, and two digits of what is smaller."""
    if count is None:
        return ""
    value = count / 1e9
    if value >= 10:
        return f"{value:.0f}"
    if value >= 1:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.095 else f"{value:.2g}"


def _rows(
    records: Iterable[Record], columns: Sequence[tuple[str, str, str]], *, average: Sequence[str]
) -> list[Record]:
    """The records with any of these metrics, those of one model that was asked in one way joined, with the average."""
    rows = joined(records, [name for _, name, _ in columns])
    return [replace(row, metrics=row.metrics | _average(row.metrics, average)) for row in rows]


def _average(metrics: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """The mean and its standard error, the tasks being independent; nothing where one is missing."""
    if any(name not in metrics for name in names):
        return {}
    average = {AVERAGE: math.fsum(metrics[name] for name in names) / len(names)}
    errors = [metrics.get(f"{name}_stderr") for name in names]
    known = [error for error in errors if error is not None]
    if len(known) == len(names):
        average[f"{AVERAGE}_stderr"] = math.hypot(*known) / len(names)
    return average
