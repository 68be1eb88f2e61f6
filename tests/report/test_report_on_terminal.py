"""Tables in a terminal: whole rows in its width, several tables where one does not hold all columns."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from rodimus_lab.experiment import REPORTS
from rodimus_lab.records import PROJECT_ROOT, load_records
from rodimus_lab.registry import load_plugins
from rodimus_lab.report import Cell, Column, PaperResults, Table, terminal_tables
from rodimus_lab.terminal import console, print_table


def drawn(table: Table, width: int, *, styled: bool = False) -> list[str]:
    """What a terminal of that width shows, a text for each part."""
    parts = []
    for part in terminal_tables(table, width):
        to = Console(
            file=io.StringIO(), width=width, force_terminal=styled, color_system="standard" if styled else None
        )
        print_table(part, to)
        parts.append(to.file.getvalue())
    return parts


def of_columns(count: int) -> Table:
    rows = [[Cell(name), *(Cell(float(at), digits=1) for at in range(1, count))] for name in ("rodimus", "gla")]
    return Table("Many", [Column("Model"), *(Column(f"Column {at}") for at in range(1, count))], rows)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_every_column_stands_beside_the_first_in_the_terminals_width(width: int) -> None:
    parts = drawn(of_columns(20), width)
    assert all(len(line.rstrip()) <= width for part in parts for line in part.splitlines())
    assert all(part.count("rodimus") == part.count("Model") == 1 for part in parts)
    shown = " ".join(parts)
    assert all(f"Column {at}" in shown for at in range(1, 20))
    assert len(drawn(of_columns(4), 80)) == 1


def test_a_table_of_the_paper_fits() -> None:
    load_plugins()
    records = load_records(PROJECT_ROOT / "results" / "runs", "wikitext103")
    table = REPORTS["table1"].make(records, PaperResults())
    parts = drawn(table, 100)
    assert len(parts) > 1
    assert all(len(line.rstrip()) <= 100 for part in parts for line in part.splitlines())
    assert "59.48 [a]" in "".join(parts)


def test_best_is_bold_second_best_underlined_and_markup_is_text() -> None:
    rows = [[Cell("[red]one"), Cell(1.0)], [Cell("two"), Cell(2.0)], [Cell("three"), Cell(None)]]
    table = Table("T", [Column("Model"), Column("PPL", better="lower")], rows)
    (part,) = drawn(table, 80, styled=True)
    assert "\x1b[1m" in next(line for line in part.splitlines() if "[red]one" in line)
    assert "\x1b[4m" in next(line for line in part.splitlines() if "two" in line)


def test_report_shows_a_table_to_a_terminal_and_markdown_to_a_pipe(cli, smoke_run, monkeypatch) -> None:
    piped = cli("report", "table1").out
    assert piped.startswith("# Table 1. ")
    assert "| Model |" in piped
    monkeypatch.setattr(type(console), "is_terminal", property(lambda self: True))
    monkeypatch.setattr(console, "width", 100)
    seen = cli("report", "table1").out
    assert "| Model |" not in seen
    assert seen.startswith("Table 1. ")
    assert "Columns marked (paper) are quoted from the paper." in seen
    assert f"run {smoke_run.id}" in seen
