"""The paper's numbers and ours side by side: a column for the paper, then one for every corpus and budget run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from rodimus_lab.records import Record, canonical_json
from rodimus_lab.registry import file_spelling
from rodimus_lab.report.paper import PaperRow, PaperValue
from rodimus_lab.report.table import MISSING, Cell, Column, Table, stands_in

Key: TypeAlias = tuple[str, ...]
NOT_RUN = Cell(None, source="measured", missing="not run")


@dataclass(frozen=True)
class Metric:
    """One quantity: its heading, its name in the metrics of a record (shown times `scale`, with `digits`), and its
    column in the paper's CSV (None where the paper does not give it). `stderr` is the name of its standard error."""

    name: str
    metric: str
    paper_column: str | None
    better: Literal["lower", "higher"] | None = "lower"
    digits: int = 2
    scale: float = 1.0
    stderr: str | None = None


class Group(NamedTuple):
    """What the runs of one column share; the order of groups is that of their columns."""

    stand_in: bool
    corpus: str
    tokenizer: str
    minus_steps: int
    budget: str
    device: str


def paper_vs_measured(
    paper_rows: Sequence[PaperRow],
    records: Iterable[Record],
    *,
    title: str,
    metrics: Sequence[Metric],
    key: Sequence[str] = ("model",),
    headings: Sequence[str] = ("Model",),
    record_key: Callable[[Record], Sequence[Any]] = lambda record: (record.label,),
    given: Mapping[str, Callable[[Key], Cell]] | None = None,
    paper_corpus: str | tuple[str, ...] | None = None,
    per_device: bool = False,
    caption: str = "",
    notes: Sequence[str] = (),
    section: str | None = None,
    missing: str = MISSING,
    computed: str = "",
) -> Table:
    """One row for each of `paper_rows`, in order, then one for each model that only we ran.

    `key` are the paper's columns that name a row, `headings` their headings, and `record_key` the same values for a
    record; `rodimus_plus` and `rodimus+` count as one. `given` holds further columns: heading -> cell for a row's
    names. Runs that differ in the seed only become mean and standard deviation. Other runs that meet in one cell get
    a row each, with the settings that tell them apart. `per_device` keeps devices apart, as speeds need. `section` is
    the paper's column that parts the table; models that only we ran are a part of their own. Where nothing was run
    a cell says so; a number that a run or the paper does not give is `missing`; `computed` says what the computed
    numbers of `given` come from. Raises `ValueError` where
    `key` does not tell the paper's rows apart.
    """
    papers: dict[Key, PaperRow] = {}
    names: dict[Key, list[PaperValue]] = {}
    for row in paper_rows:
        values = [row[name] for name in key]
        if _key(values) in papers:
            raise ValueError(f"the columns {', '.join(key)} do not tell the paper's rows apart: {values}")
        papers[_key(values)], names[_key(values)] = row, values

    groups: dict[Group, dict[Key, list[Record]]] = {}
    for record in records:
        values = list(record_key(record))
        names.setdefault(_key(values), values)
        group = Group(
            stand_in=stands_in(record.corpus, paper_corpus),
            corpus=record.corpus,
            tokenizer=record.tokenizer,
            minus_steps=-record.budget["steps"],
            budget=record.budget_text,
            device=record.device if per_device else "",
        )
        groups.setdefault(group, {}).setdefault(_key(values), []).append(record)
    runs = {
        group: {(row, text): same for row, found in groups[group].items() for text, same in _variants(found).items()}
        for group in sorted(groups)
    }

    rows: list[tuple[Key, str]] = []
    for name in names:
        texts = {text for cells in runs.values() for row, text in cells if row == name}
        rows += [(name, text) for text in sorted(texts | ({""} if name in papers else set()))]

    split = {(row, "") for row, text in rows if text}  # The paper's rows whose runs stand in rows of their own.

    columns = [
        (Column(heading), [Cell(names[row][index]) for row, _ in rows]) for index, heading in enumerate(headings)
    ]
    for heading, cell in (given or {}).items():
        columns.append((Column(heading), [cell(tuple(Cell(value).text for value in names[row])) for row, _ in rows]))
    for metric in metrics:
        column = Column(metric.name, metric.better, per_device)
        if metric.paper_column is not None:
            quoted = [{} if text else papers.get(row, {}) for row, text in rows]
            columns.append((column, [Cell(row.get(metric.paper_column), source="paper") for row in quoted]))
        ours = [
            [
                _measured(found, metric, missing)
                if (found := cells.get(row))
                else Cell(None)
                if row in split
                else NOT_RUN
                for row in rows
            ]
            for cells in runs.values()
        ]
        ours = [measured for measured in ours if any(cell.value is not None for cell in measured)]
        if not ours and metric.paper_column is not None and metric.better is not None:
            ours = [[NOT_RUN] * len(rows)]
        columns += [(column, measured) for measured in ours]
    if any(text for _, text in rows):
        columns.insert(len(headings), (Column("Settings"), [Cell(text or None) for _, text in rows]))
    sections = [str(papers.get(row, {}).get(section) or "") for row, _ in rows] if section else ()
    said = [*notes, *([] if rows else ["Not run yet."])]
    return Table.of(
        title, columns, said, caption=caption, paper_corpus=paper_corpus, sections=sections, computed=computed
    )


def _measured(runs: Sequence[Record], metric: Metric, missing: str) -> Cell:
    """The mean over runs that differ in the seed only; missing where none of them has the metric."""
    given = [run for run in runs if run.metrics.get(metric.metric) is not None]
    if not given:
        return Cell(None, source="measured", missing=missing)
    values = [run.metrics[metric.metric] * metric.scale for run in given]
    first = given[0]
    error = first.metrics.get(metric.stderr) if metric.stderr and len(values) == 1 else None
    stops = sorted({run.metrics.get("steps", run.budget["steps"]) for run in given} - {first.budget["steps"]})
    return Cell(
        statistics.fmean(values),
        digits=metric.digits,
        source="measured",
        run_id="; ".join(run.id for run in given),
        corpus=first.corpus,
        tokenizer=first.tokenizer,
        budget=first.budget_text,
        device="; ".join(dict.fromkeys(run.device for run in given)),
        note=f"stopped after {', '.join(f'{steps:,}' for steps in stops)} steps" if stops else "",
        std=statistics.stdev(values) if len(values) > 1 else None,
        count=len(values),
        stderr=None if error is None else error * metric.scale,
    )


def _variants(runs: Sequence[Record]) -> dict[str, list[Record]]:
    """Runs by what tells their recipes apart, in words; the seed does not. One kind of recipe needs no words."""
    same: dict[str, list[Record]] = {}
    for run in sorted(runs, key=lambda run: (run.experiment, run.id)):
        same.setdefault(canonical_json(_without_seed(run)), []).append(run)
    if len(same) == 1:
        return {"": [*runs]}
    settings = [dict(_flat(_without_seed(found[0]))) for found in same.values()]
    paths = sorted({path for flat in settings for path in flat})
    said = [{path: f"{path}={flat[path]}" if path in flat else f"no {path}" for path in paths} for flat in settings]
    differing = [path for path in paths if len({words[path] for words in said}) > 1]
    return {
        ", ".join(words[path] for path in differing): found for words, found in zip(said, same.values(), strict=True)
    }


def _without_seed(run: Record) -> dict[str, Any]:
    return {name: value for name, value in run.recipe.items() if name != "seed"}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A nested recipe as pairs of dotted path and plain value, which a list of plain values is, too."""
    nested = (
        any(isinstance(item, dict | list) for item in value) if isinstance(value, list) else isinstance(value, dict)
    )
    if not value or not nested:
        yield path, value
        return
    for name, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _flat(item, f"{path}.{name}" if path else str(name))


def _key(values: Iterable[Any]) -> Key:
    """The names of a row in one spelling, that of file names: `rodimus+` and `rodimus_plus` are the same."""
    texts = (str(getattr(value, "text", value)) for value in values)
    return tuple(file_spelling(text.lower()) for text in texts)
