"""Tables 21 and 22: the benchmarks of Rodimus+-Coder, base and chat, and what `rodimus-lab eval` left on them.

Benchmarks are rows, as the paper prints them, and models columns. An average is the mean of the benchmarks above it,
and stands where every one of them was run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from evals.coder import BENCHMARKS, Benchmark
from evals.joining import joined
from rodimus_lab.experiment import report
from rodimus_lab.records import Record
from rodimus_lab.report import Cell, Column, PaperResults, Table

NOT_RUN = Cell(None, source="measured", missing="not run")
AVERAGES = {"Coding Avg.": "coding", "General Avg.": "general", "Mathematics Avg.": "mathematics", "Overall": ""}
Scores = dict[str, tuple[float, float | None]]
HARNESS = (
    "The paper scores with CodeFuse-Evaluation; ours are lm-eval's prompts and rules, so that a difference of a few "
    "points is no finding. It states the shots of the general and mathematical benchmarks only."
)
EXECUTED = (
    "pass@1 is the unbiased estimator over the samples that were drawn, one greedy sample where nothing else is said. "
    "Ours stand with their standard errors over the test items."
)


@report("table21", experiments=("eval",))
def table21(records: Sequence[Record], paper: PaperResults) -> Table:
    """Table 21: base models."""
    return _table(21, records, paper, "Table 21. Coding, general and mathematical benchmarks, base models, %")


@report("table22", experiments=("eval",))
def table22(records: Sequence[Record], paper: PaperResults) -> Table:
    """Table 22: chat models, asked in the chat format."""
    return _table(22, records, paper, "Table 22. Coding, general and mathematical benchmarks, chat models, %")


def _table(number: Literal[21, 22], records: Sequence[Record], paper: PaperResults, title: str) -> Table:
    benchmarks = {benchmark.name: benchmark for benchmark in BENCHMARKS if benchmark.table == number}
    printed = paper.table(number)
    names = list(dict.fromkeys(str(row["benchmark"]) for row in printed))
    categories = {str(row["benchmark"]): str(row["category"]) for row in printed}
    models = dict.fromkeys(str(row["model"]) for row in printed)
    scores = {(str(row["model"]), str(row["benchmark"])): row["score"] for row in printed}
    columns = [
        (Column("Benchmark"), [Cell(name) for name in names]),
        (Column("Shots"), [Cell(_shots(benchmarks.get(name))) for name in names]),
        (Column("Metric"), [Cell(benchmarks[name].metric if name in benchmarks else None) for name in names]),
        (Column("Through"), [Cell(_through(benchmarks.get(name))) for name in names]),
    ]
    columns += [(Column(model), [Cell(scores[model, name], source="paper") for name in names]) for model in models]
    asked = [record for record in records if bool(record.recipe.get("chat")) == (number == 22)]
    measured = [path for benchmark in benchmarks.values() for path in benchmark.measured]
    runs = joined([_as_stated(record, benchmarks.values()) for record in asked], measured)
    for run in runs:
        found = _scores(run, benchmarks.values())
        columns.append((Column(run.label), [_cell(run, found.get(name)) for name in names]))
    if not runs:
        columns.append((Column("Ours"), [NOT_RUN] * len(names)))
    sections = [categories[name] for name in names]
    return Table.of(title, columns, (HARNESS, EXECUTED, *_notes(benchmarks.values())), sections=sections)


def _shots(benchmark: Benchmark | None) -> str | None:
    if benchmark is None:
        return None
    return "not stated" if benchmark.shots is None else str(benchmark.shots)


def _through(benchmark: Benchmark | None) -> str | None:
    if benchmark is None:
        return None
    return "nobody packages it" if benchmark.through == "nobody" else benchmark.through


def _as_stated(record: Record, benchmarks: Iterable[Benchmark]) -> Record:
    """The record without what was asked with other shots than the paper's."""
    given = record.recipe.get("shots") or {}
    stated = {task: benchmark.shots for benchmark in benchmarks for task in benchmark.tasks}
    other = {task for task in stated if given.get(task) != stated[task]}
    kept = {name: value for name, value in record.metrics.items() if name.partition(".")[0] not in other}
    return replace(record, metrics=kept)


def _scores(run: Record, benchmarks: Iterable[Benchmark]) -> Scores:
    """Score and standard error, in %, of each benchmark and average of which all parts were run."""
    found: Scores = {}
    groups: dict[str, list[str]] = {"": []}
    for benchmark in benchmarks:
        groups.setdefault(benchmark.category, []).append(benchmark.name)
        groups[""].append(benchmark.name)
        if benchmark.measured and all(path in run.metrics for path in benchmark.measured):
            parts = [(100 * run.metrics[path], _error(run.metrics, path)) for path in benchmark.measured]
            found[benchmark.name] = _mean(parts)
    for average, category in AVERAGES.items():
        members = groups.get(category, [])
        if members and all(name in found for name in members):
            found[average] = _mean([found[name] for name in members])
    return found


def _error(metrics: Mapping[str, float], path: str) -> float | None:
    error = metrics.get(f"{path}_stderr")
    return None if error is None else 100 * error


def _mean(parts: Sequence[tuple[float, float | None]]) -> tuple[float, float | None]:
    """The mean and its standard error, the parts being independent."""
    errors = [error for _, error in parts if error is not None]
    total = math.fsum(value for value, _ in parts) / len(parts)
    return total, math.hypot(*errors) / len(parts) if len(errors) == len(parts) else None


def _cell(run: Record, score: tuple[float, float | None] | None) -> Cell:
    if score is None:
        return NOT_RUN
    return Cell(
        score[0],
        digits=1,
        source="measured",
        run_id=run.id,
        corpus=run.corpus,
        tokenizer=run.tokenizer,
        budget=run.budget_text,
        device=run.device,
        stderr=score[1],
    )


def _notes(benchmarks: Iterable[Benchmark]) -> list[str]:
    notes = []
    for benchmark in benchmarks:
        if benchmark.through == "lm-eval":
            where = f"{' and '.join(benchmark.tasks)} of lm-eval"
        elif benchmark.through == "OpenCompass":
            where = f"OpenCompass's {benchmark.config}"
        else:
            where = "neither lm-eval nor OpenCompass has it"
        notes.append(f"{benchmark.name}: {where}" + (f"; {benchmark.note}." if benchmark.note else "."))
    return notes
