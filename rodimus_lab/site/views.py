"""What the templates show, made of tables, figures, records and models; plain values only, escaped when rendered."""

from __future__ import annotations

import csv
import inspect
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rodimus_lab import results
from rodimus_lab.errors import UserError
from rodimus_lab.experiment import EXPERIMENTS, REPORTS
from rodimus_lab.nn import zoo
from rodimus_lab.nn.zoo import MODELS, SIZES, model_config, slug
from rodimus_lab.records import NAME, SAMPLES, Record, RunDir
from rodimus_lab.report import Cell, Table, overlaps
from rodimus_lab.report.artefacts import Artefact
from rodimus_lab.report.diagram import Diagram, diagrams_of
from rodimus_lab.site.charts import Chart, charts_of
from rodimus_lab.site.values import setting, told

CONTEXTS = (2048, 16384)
NUMBERS = 400  # rows of a figure's numbers that its page shows


class CellView(NamedTuple):
    """`sort` is what the table is sorted by: the number with all its digits, else the text."""

    text: str
    sort: str
    mark: str
    source: str
    letter: str
    is_number: bool


class Head(NamedTuple):
    """A column's name, and in parentheses where its numbers are from or their unit."""

    name: str
    of: str

    @classmethod
    def parse(cls, text: str) -> Head:
        found = re.fullmatch(r"(.*\S)\s+(\([^()]*\))", text)
        return cls(found[1], found[2]) if found else cls(text, "")


class Footnote(NamedTuple):
    letter: str
    text: str
    runs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class TableView:
    """A table with the runs behind its numbers; `files` are its other forms, by name."""

    name: str
    title: str
    caption: str
    heads: Sequence[Head]
    numeric: Sequence[bool]
    rows: Sequence[Sequence[CellView]]
    notes: Sequence[str]
    footnotes: Sequence[Footnote]
    run_ids: frozenset[str]
    measured: int
    absent: int
    computed: int
    files: Sequence[str]

    @property
    def plain(self) -> str:
        """All of it but the numbers, for the search."""
        heads = [f"{head.name} {head.of}" for head in self.heads]
        words = [cell.text for row in self.rows for cell in row if cell.text and not cell.is_number]
        notes = [note.text for note in self.footnotes]
        return " ".join([self.title, self.caption, *self.notes, *notes, *heads, *dict.fromkeys(words)])

    @classmethod
    def of(cls, name: str, table: Table, places: Mapping[str, str]) -> TableView:
        """`places` are the addresses of runs by their id."""
        cells = [cell for row in table.rows for cell in row]
        ours = [cell for cell in cells if cell.source == "measured"]
        rows = [
            [
                _cell(cell, mark, table.footnotes.get(table.footnote(cell), ""))
                for cell, mark in zip(row, marks, strict=True)
            ]
            for row, marks in zip(table.rows, table.marks, strict=True)
        ]
        by_text = {table.footnote(cell): _ids(cell) for cell in cells}
        notes = [
            Footnote(letter, text, [(run, places[run]) for run in by_text.get(text, ()) if run in places])
            for text, letter in table.footnotes.items()
        ]
        return cls(
            name,
            table.title,
            table.caption,
            [Head.parse(text) for text in table.headers],
            [_is_numeric([row[index] for row in table.rows]) for index in range(len(table.columns))],
            rows,
            table.closing_notes,
            notes,
            frozenset(run for cell in cells for run in _ids(cell)),
            sum(cell.value is not None for cell in ours),
            sum(cell.value is None for cell in ours),
            sum(cell.value is not None and cell.source == "computed" for cell in cells),
            [f"{name}.{suffix}" for suffix in ("md", "tex", "csv")],
        )


def _cell(cell: Cell, mark: str, letter: str) -> CellView:
    value = "" if cell.value is None else repr(float(cell.value)) if cell.is_number else str(cell.value)
    source = "absent" if cell.value is None and cell.source == "measured" else cell.source
    return CellView(cell.text, value, mark, source, letter, cell.is_number)


def _is_numeric(cells: Sequence[Cell]) -> bool:
    """A column of numbers, or one in which each is still missing."""
    return any(cell.is_number for cell in cells) or all(cell.value is None for cell in cells)


def _ids(cell: Cell) -> list[str]:
    return [run.strip() for run in (cell.run_id or "").split(";") if run.strip()]


@dataclass(frozen=True)
class FigureView:
    """A drawn figure, its files by suffix, its numbers and the runs that they or its note name."""

    name: str
    title: str
    note: str
    header: Sequence[str]
    numbers: Sequence[Sequence[str]]
    left_out: int
    suffixes: Sequence[str]
    run_ids: frozenset[str]

    @classmethod
    def of(cls, name: str, drawing: Any, paths: Iterable[Path], numbers: str, places: Mapping[str, str]) -> FigureView:
        """`places` are the addresses of runs by their id."""
        header, *rows = list(csv.reader(io.StringIO(numbers)))
        suffixes = [path.suffix.removeprefix(".") for path in paths]
        note = str(getattr(drawing, "note", ""))
        named = places.keys() & set(NAME.findall(f"{note} {numbers}"))
        left_out = max(0, len(rows) - NUMBERS)
        return cls(name, drawing.title, note, header, rows[:NUMBERS], left_out, suffixes, frozenset(named))

    @property
    def alternative(self) -> str:
        """What a reader who does not see it is told."""
        return f"{self.title}. {self.note + '. ' if self.note else ''}Its numbers are in the table below."


@dataclass(frozen=True)
class ArtefactView:
    """A table or figure of the paper, or of our own beyond it."""

    name: str
    label: str
    title: str
    sort: str
    tables: Sequence[TableView] = ()
    figures: Sequence[FigureView] = ()

    @property
    def address(self) -> str:
        return f"artefacts/{self.name}.html"

    @property
    def kind(self) -> str:
        return "beyond the paper" if self.sort == "ours" else self.label.partition(" ")[0].lower()

    @property
    def plain(self) -> str:
        """Its tables and figures as the search finds them."""
        figures = [f"{figure.title} {figure.note}" for figure in self.figures]
        return " ".join([self.status, *figures, *(table.plain for table in self.tables), *sorted(self.run_ids)])

    @property
    def status(self) -> str:
        """In a word or two, whether ours stands beside the paper's."""
        if self.sort in ("settings", "drawing"):
            return {"settings": "settings", "drawing": "a drawing"}[self.sort]
        measured = sum(table.measured for table in self.tables)
        absent = sum(table.absent for table in self.tables)
        points = any("not run" in row for figure in self.figures for row in figure.numbers)
        if not self.tables and not self.figures:
            return "not run"
        if not measured:
            if any(figure.run_ids for figure in self.figures):
                return "measured"
            drawn = any("computed" in row for figure in self.figures for row in figure.numbers)
            computed = drawn or any(table.computed for table in self.tables)
            return "not run" if absent or points or not computed else "computed"
        return f"{measured:,} numbers measured" + (f", {absent:,} not run" if absent else "")

    @property
    def run_ids(self) -> frozenset[str]:
        return frozenset().union(*(table.run_ids for table in self.tables), *(one.run_ids for one in self.figures))


def plain(artefact: Artefact, tables: Sequence[TableView], figures: Sequence[FigureView]) -> ArtefactView:
    return ArtefactView(artefact.name, artefact.label, artefact.title, artefact.sort, tables, figures)


@dataclass(frozen=True)
class RunView:
    """A finished run. `base` says what the differences are from."""

    record: Record
    metrics: Sequence[tuple[str, str]]
    settings: Sequence[tuple[str, str]]
    environment: Sequence[tuple[str, str]]
    base: str
    differences: Sequence[tuple[str, str, str]]
    charts: Sequence[Chart]
    samples: Sequence[Mapping[str, str]]
    warnings: Sequence[str] = ()
    seeds: Sequence[str] = field(default_factory=list)

    @classmethod
    def of(cls, record: Record, same: Sequence[Record]) -> RunView:
        lines = RunDir(record.path.parents[1], record.experiment, record.id).read_metrics()
        base, differences = base_of(record)
        return cls(
            record,
            [(name, told(name, value)) for name, value in record.metrics.items()],
            [(path, setting(path, value)) for path, value in results.flat(record.recipe)],
            [(path, told(path, value)) for path, value in results.flat(record.env)],
            base,
            [(path, setting(path, there), setting(path, here)) for path, there, here in differences],
            charts_of(lines),
            samples_of(record.path),
            overlaps([record]),
            [other.id for other in same if other.id != record.id],
        )

    @property
    def model(self) -> str:
        return results.spelled(self.record.label)

    @property
    def plain(self) -> str:
        """What it is, what it reached and how it departs from its base, for the search."""
        record = self.record
        facts = [self.model, record.label, record.experiment, record.corpus, record.budget_text, record.device]
        pairs = [f"{name} {value}" for name, value in self.metrics]
        changes = [f"{path} {here}" for path, _, here in self.differences]
        texts = [f"{sample['prompt']} {sample['text']}" for sample in self.samples]
        return " ".join([*facts, record.finished[:10], *pairs, *changes, *self.warnings, *texts])

    @property
    def address(self) -> str:
        return run_address(self.record)


def run_address(record: Record) -> str:
    return f"runs/{record.experiment}/{record.id}.html"


def base_of(record: Record) -> tuple[str, list[tuple[str, Any, Any]]]:
    """What a run's recipe is set beside, in words, and where it differs from that: the base that the record names, or
    what its experiment makes of the same model at the paper's budget."""
    try:
        departure = json.loads((record.path / "record.json").read_bytes()).get("departure")
        changes = [(path, there, here) for path, (there, here) in departure["changes"].items()]
        return f"the recipe {departure['base']} that it was made from", changes
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    try:
        experiment = EXPERIMENTS[record.experiment]
        if not {"model", "budget"} <= experiment.options.keys():
            return "", []
        recipes = experiment.recipes(model=results.spelled(record.label), budget="paper")
    except UserError:
        return "", []
    if len(recipes) != 1 or recipes[0].label != record.label:
        return "", []  # Of the many runs of a grid none is what this one departs from.
    return f"the recipe of {record.label} at the paper's budget", results.differences(
        recipes[0].to_dict(), record.recipe
    )


def samples_of(folder: Path) -> list[Mapping[str, str]]:
    """Prompts and what the run made of them, from `samples.jsonl`; lines that are no samples are passed over."""
    path = folder / SAMPLES
    found: list[Mapping[str, str]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            sample = json.loads(line)
        except ValueError:
            continue
        if isinstance(sample, dict) and {"prompt", "text"} <= sample.keys():
            found.append({name: str(sample[name]) for name in ("prompt", "text")})
    return found


class Cost(NamedTuple):
    """At one size: learnable scalars, forward FLOPs of a token at the training context, and bytes of bfloat16 state
    after each of `CONTEXTS` tokens."""

    size: str
    d_model: int
    blocks: int
    params: int
    context: int
    flops: int
    state: Sequence[int]


@dataclass(frozen=True)
class ModelView:
    name: str
    slug: str
    aliases: Sequence[str]
    summary: str
    diagrams: Sequence[Diagram]
    table4: Sequence[tuple[str, str]]
    costs: Sequence[Cost]
    parts: Sequence[tuple[str, str]]
    runs: Sequence[Record]

    @property
    def address(self) -> str:
        return f"models/{self.slug}.html"

    @property
    def plain(self) -> str:
        """What it is called, is made of and was run as, for the search."""
        table4 = [f"{head} {text}" for head, text in self.table4]
        parts = [part for part, _ in self.parts]
        told = [diagram.told for diagram in self.diagrams]
        return " ".join([self.summary, *self.aliases, *told, *table4, *parts, *(record.id for record in self.runs)])


def model_view(name: str, table4: Table | None, records: Sequence[Record]) -> ModelView:
    """A registered model: its picture at Table 1's size, and what it costs at every size of the paper."""
    config = model_config(name, size="wikitext103")
    parts = {"embedding": config.vocab_size * config.d_model}
    for block in config.blocks:
        for sublayer in block.sublayers:
            kind = sublayer.kind.replace("_", " ")
            parts[kind] = parts.get(kind, 0) + sublayer.num_params(config.d_model)
    parts["norms and the rest"] = config.num_params() - sum(parts.values())
    row = next((row for row in table4.rows if row[0].text == name), None) if table4 else None
    told = [(header, cell.text) for header, cell in zip(table4.headers, row, strict=True)][1:] if table4 and row else []
    return ModelView(
        name,
        slug(name),
        MODELS.aliases(name),
        _summary(name),
        diagrams_of(config),
        told,
        [_cost(name, size) for size in SIZES if size not in ("smoke", "mqar")],
        [(part, f"{count:,}") for part, count in parts.items()],
        [record for record in records if results.spelled(record.label) == name],
    )


def _cost(name: str, size: str) -> Cost:
    config, context = model_config(name, size=size), SIZES[size].context
    state = [config.state_bytes(1, length, torch.bfloat16) for length in CONTEXTS]
    blocks = len(config.blocks)
    return Cost(size, config.d_model, blocks, config.num_params(), context, config.flops_per_token(context), state)


def _summary(name: str) -> str:
    """The first sentence on the family, from the file that holds it, and on the model itself."""
    module = inspect.getmodule(MODELS[name])
    family = "" if module is zoo else inspect.getdoc(module) or ""
    return " ".join(filter(None, map(_first_sentence, (family, inspect.getdoc(MODELS[name]) or ""))))


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=\.)\s+(?=[A-Z])|\n\n", text, maxsplit=1)[0].replace("\n", " ")


def report_tables(records: Mapping[str, Sequence[Record]], paper: Any) -> dict[str, Table]:
    """Every registered table, of the records of its experiments."""
    made = {}
    for name in REPORTS:
        report = REPORTS[name]
        made[name] = report.make([one for group in report.experiments for one in records.get(group, ())], paper)
    return made
