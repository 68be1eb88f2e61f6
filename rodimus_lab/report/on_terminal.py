"""A table for a terminal: as many tables below one another as its columns need, each with the first column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from rodimus_lab.report.table import Cell, Mark, Table

STYLES: dict[Mark, str] = {"best": "bold", "second": "underline", "": ""}
NUMBER, PROSE = 18, 44  # characters of a column, at most; longer texts are broken between words
SPACES = 3  # that a column takes beside its text


def terminal_tables(table: Table, width: int) -> Iterator[RichTable]:
    """The rows, best in bold and second best underlined, footnotes as `[a]`, in tables of at most `width` characters
    where a column fits beside the first."""
    texts = [
        [_text(table, *pair) for pair in zip(*row, strict=True)] for row in zip(table.rows, table.marks, strict=True)
    ]
    columns = range(len(table.columns))
    numeric = [any(row[at].is_number for row in table.rows) for at in columns]
    most = [NUMBER if numeric[at] else PROSE for at in columns]
    lengths = [[len(table.headers[at]), *(len(row[at]) for row in texts)] for at in columns]
    needs = [SPACES + min(max(lengths[at]), most[at]) for at in columns]
    for part in _parts(needs, width - 1):
        drawn = RichTable(box=box.SIMPLE)
        for at in part:
            drawn.add_column(table.headers[at], justify="right" if numeric[at] else "left", max_width=most[at])
        for row in texts:
            drawn.add_row(*(row[at] for at in part))
        yield drawn


def _text(table: Table, cell: Cell, mark: Mark) -> Text:
    letter = table.footnotes.get(table.footnote(cell))
    missing = "dim" if cell.value is None else ""
    return Text(cell.text + (f" [{letter}]" if letter else ""), style=missing or STYLES[mark])


def _parts(needs: Sequence[int], width: int) -> Iterator[list[int]]:
    """Columns by their numbers, each part beginning with the first and as broad as `width` allows."""
    part = [0]
    for at in range(1, len(needs)):
        if len(part) > 1 and sum(needs[one] for one in [*part, at]) > width:
            yield part
            part = [0]
        part.append(at)
    yield part
