"""Tables whose numbers carry where they are from."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from rodimus_lab.records import FROM_FOLDER, PUBLISHED, UNTRAINED
from rodimus_lab.report.paper import Printed

Source: TypeAlias = Literal["paper", "measured", "computed", ""]
Mark: TypeAlias = Literal["best", "second", ""]

MISSING = "—"


@dataclass(frozen=True)
class Cell:
    """One value and its provenance.

    `value` None is missing. `digits` are those after the point; left out, a paper's number keeps its printed digits and
    any other number all it has. A measured number must name its run (several joined by "; "), corpus, budget and
    device; `std` is the sample standard deviation over `count` runs with different seeds, of which `value` is the mean;
    `stderr` the standard error of one run over its test items. `missing` is what stands where there is no value. What
    runs that are still missing may change is not `settled`: no sentence tells of its order.
    """

    value: float | str | None
    digits: int | None = None
    source: Source = ""
    run_id: str | None = None
    corpus: str | None = None
    budget: str | None = None
    device: str | None = None
    note: str = ""
    tokenizer: str | None = None
    std: float | None = None
    count: int = 1
    missing: str = MISSING
    stderr: float | None = None
    settled: bool = True

    def __post_init__(self) -> None:
        origin = (self.run_id, self.corpus, self.budget, self.device)
        if self.source == "measured" and self.value is not None and not all(origin):
            raise ValueError(f"a measured value needs its run, corpus, budget and device: {self}")
        if isinstance(self.value, int | float) and not math.isfinite(self.value):
            raise ValueError(f"{self.value} is not a result; a missing value is None")

    @property
    def is_number(self) -> bool:
        return isinstance(self.value, int | float)

    @property
    def shown(self) -> str:
        """The value without its spread, as every writer prints it."""
        if self.value is None:
            return self.missing
        if isinstance(self.value, str):
            return self.value
        if isinstance(self.value, Printed) and self.digits is None:
            return self.value.text
        return _fixed(self.value, self.digits)

    @property
    def text(self) -> str:
        """What a reader sees: the value, with its spread where it is a mean over seeds, or else its standard error."""
        if self.std is not None:
            return f"{self.shown} ± {_fixed(self.std, self.digits)} ({self.count} seeds)"
        if self.stderr is not None and self.value is not None:
            return f"{self.shown} ± {_fixed(self.stderr, self.digits)}"
        return self.shown


@dataclass(frozen=True)
class Column:
    """`better` says which numbers are marked as best and second best. With `per_device` its measured numbers also
    depend on the device, which they then must share and the header names."""

    name: str
    better: Literal["lower", "higher"] | None = None
    per_device: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns. `paper_corpus` is what the paper trained on, one or several: any other corpus is a
    stand-in, but for the unknown one of published weights. `sections` names the part of the table that each row is in:
    best and second best are found within a part. `computed` says what computed numbers are computed from.

    Raises `ValueError` where a column mixes sources, corpora, tokenizers or budgets, as such numbers cannot be compared
    and belong in separate columns, and where there are computed numbers and `computed` is empty.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    notes: Sequence[str] = ()
    paper_corpus: str | tuple[str, ...] | None = None
    sections: Sequence[str] = ()
    computed: str = ""

    @classmethod
    def of(
        cls,
        title: str,
        columns: Sequence[tuple[Column, Sequence[Cell]]],
        notes: Sequence[str] = (),
        *,
        caption: str = "",
        paper_corpus: str | tuple[str, ...] | None = None,
        sections: Sequence[str] = (),
        computed: str = "",
    ) -> Table:
        """A table by its columns, each with its cells from the first row down."""
        rows = list(zip(*(cells for _, cells in columns), strict=True))
        return cls(title, [column for column, _ in columns], rows, caption, notes, paper_corpus, sections, computed)

    def __post_init__(self) -> None:
        if self._has("computed") and not self.computed:
            raise ValueError(
                f"the table {self.title!r} has computed numbers and does not say what they are computed from"
            )
        if self.sections and len(self.sections) != len(self.rows):
            raise ValueError(f"{len(self.sections)} sections are named for {len(self.rows)} rows")
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row of {len(row)} cells in a table of {len(self.columns)} columns: {row}")
        for index, column in enumerate(self.columns):
            kinds = {self._kind(column, cell) for cell in self._given(index)}
            if len(kinds) > 1:
                raise ValueError(f"the column {column.name!r} mixes what cannot be compared: {sorted(kinds, key=str)}")

    @cached_property
    def headers(self) -> tuple[str, ...]:
        """Column names, with the source of the numbers below them: the paper, or a corpus and budget with the number of
        the setting that `settings` spells out."""
        headers = []
        for index, column in enumerate(self.columns):
            first = next(iter(self._given(index)), None)
            if first is None or not first.source:
                headers.append(column.name)
            elif first.source == "measured":
                conditions = self._conditions(first, device=column.per_device)
                corpus = f"{first.corpus}{' stand-in' if self._stands_in(first) else ''}"
                budget = (first.budget or "").partition(" ")[0]  # "paper" alone would read as the paper's number.
                short = ", ".join(filter(None, [corpus, "paper budget" if budget == "paper" else budget]))
                headers.append(f"{column.name} ({short} #{self.settings[', '.join(conditions)]})")
            else:
                headers.append(f"{column.name} ({first.source})")
        return tuple(headers)

    @cached_property
    def settings(self) -> dict[str, int]:
        """What the numbers of a measured column share -> its number, in reading order."""
        texts: dict[str, int] = {}
        for index, column in enumerate(self.columns):
            first = next(iter(self._given(index)), None)
            if first is not None and first.source == "measured":
                texts.setdefault(", ".join(self._conditions(first, device=column.per_device)), len(texts) + 1)
        return texts

    @cached_property
    def marks(self) -> tuple[tuple[Mark, ...], ...]:
        """For every cell whether it is the best or second best of its column and section by the digits shown; ties
        share it."""
        marks: list[list[Mark]] = [["" for _ in row] for row in self.rows]
        sections = self.sections or [""] * len(self.rows)
        for index, column in enumerate(self.columns):
            for section in dict.fromkeys(sections):
                shown = {
                    number: float(row[index].shown.replace(",", ""))
                    for number, row in enumerate(self.rows)
                    if row[index].is_number and sections[number] == section
                }
                ranks = sorted(set(shown.values()), reverse=column.better == "higher")
                if column.better and len(ranks) > 1:
                    for number, value in shown.items():
                        if value in ranks[:2]:
                            marks[number][index] = "best" if value == ranks[0] else "second"
        return tuple(map(tuple, marks))

    @cached_property
    def footnotes(self) -> dict[str, str]:
        """Footnote text -> its letter, in reading order: one for every provenance that a single cell has."""
        texts = dict.fromkeys(self.footnote(cell) for row in self.rows for cell in row)
        texts.pop("", None)
        return {text: _letter(number) for number, text in enumerate(texts)}

    def footnote(self, cell: Cell) -> str:
        """Where this very number is from; empty where the header says it all."""
        parts = []
        if cell.source == "measured" and cell.value is not None:
            parts = [cell.device or "", f"run{'s' if cell.count > 1 else ''} {cell.run_id}"]
        return "; ".join(filter(None, [", ".join(filter(None, parts)), cell.note]))

    @property
    def closing_notes(self) -> tuple[str, ...]:
        """The table's own notes, a word on the paper's numbers and the computed ones where there are any, and every
        setting in full."""
        quoted = ["Columns marked (paper) are quoted from the paper."] if self._has("paper") else []
        computed = [f"Columns marked (computed): {self.computed}."] if self._has("computed") else []
        settings = [f"#{number}: {text}." for text, number in self.settings.items()]
        return (*self.notes, *quoted, *computed, *settings)

    def _has(self, source: Source) -> bool:
        return any(cell.source == source and cell.value is not None for row in self.rows for cell in row)

    def _given(self, index: int) -> list[Cell]:
        return [row[index] for row in self.rows if row[index].value is not None]

    def _kind(self, column: Column, cell: Cell) -> tuple[str | None, ...]:
        if cell.source != "measured":
            return (cell.source,)
        return (cell.source, cell.corpus, cell.tokenizer, cell.budget, cell.device if column.per_device else None)

    def _stands_in(self, cell: Cell) -> bool:
        return stands_in(cell.corpus, self.paper_corpus)

    def _conditions(self, cell: Cell, *, device: bool) -> list[str]:
        parts = [
            f"{cell.corpus} standing in for {' or '.join(corpora(self.paper_corpus))}"
            if self._stands_in(cell)
            else cell.corpus,
            cell.tokenizer and f"{cell.tokenizer} tokens",
            cell.budget,
            cell.device if device else None,
        ]
        return [part for part in parts if part]


def corpora(paper_corpus: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The corpora that a table's `paper_corpus` names."""
    return (paper_corpus,) if isinstance(paper_corpus, str) else paper_corpus or ()


def stands_in(corpus: str | None, paper_corpus: str | tuple[str, ...] | None) -> bool:
    """Whether a corpus is none of the paper's, where these are known."""
    return paper_corpus is not None and corpus not in (*corpora(paper_corpus), PUBLISHED, FROM_FOLDER, UNTRAINED)


def check_name(name: str) -> None:
    """Raise `ValueError` for a file name that is not plain letters, digits, `_`, `-` or a point inside."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"{name!r} is not a plain file name")


def _fixed(value: float, digits: int | None) -> str:
    return f"{value:,}" if digits is None else f"{value:,.{digits}f}"


def _letter(number: int) -> str:
    """0 -> a, 25 -> z, 26 -> aa."""
    letters = ""
    number += 1
    while number:
        number, rest = divmod(number - 1, 26)
        letters = chr(ord("a") + rest) + letters
    return letters
