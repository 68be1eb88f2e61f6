"""`rodimus-lab report` and `figures`: tables and figures from the run records, and the pages that show them."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from rodimus_lab.config import did_you_mean
from rodimus_lab.errors import UserError
from rodimus_lab.experiment import REPORTS
from rodimus_lab.records import PROJECT_ROOT, load_records, tables_root
from rodimus_lab.report import PaperResults, Table, quoted_tables, terminal_tables, to_markdown, write, write_figures
from rodimus_lab.site import build_site, site_root
from rodimus_lab.terminal import console, print_table, shown


def report(
    names: Annotated[list[str] | None, typer.Argument(help="Such as table1. Default: all.")] = None,
    site: Annotated[bool, typer.Option("--site/--no-site", help="Build the pages too, where all are rebuilt.")] = True,
) -> None:
    """Rebuild tables from the run records, the paper's numbers beside ours; without names all of them, and the pages in
    results/site."""
    quoted = quoted_tables(list(REPORTS), PaperResults())
    for name in names or ():
        if name not in REPORTS and name not in quoted:
            raise UserError(f"there is no report named {name!r}{did_you_mean(name, [*REPORTS, *quoted])}")
    for name in names or (*REPORTS, *quoted):
        if name in quoted:
            _write(name, quoted[name], show=bool(names))
        else:
            write_report(REPORTS.canonical(name), show=bool(names))
    if names:
        return
    if site and not console.quiet:
        console.print(f"open: {shown(build_site(site_root()), PROJECT_ROOT)}")


def figures(
    names: Annotated[list[str] | None, typer.Argument(help="Such as figure06-128. Default: all.")] = None,
) -> None:
    """Draw figures from the run records, as SVG, PDF and PNG with their numbers beside them."""
    for _, paths in groupby(write_figures(names=names or None), lambda path: path.stem):
        _say(list(paths))


def write_report(name: str, *, show: bool) -> None:
    """Build a report from all records, write it beside the runs and say where; print it as well if asked to."""
    report = REPORTS[name]
    if console.quiet:  # Another rank writes it.
        return
    records = [record for experiment in report.experiments for record in load_records(experiment=experiment)]
    _write(name, report.make(records, PaperResults()), show=show)


def _write(name: str, table: Table, *, show: bool) -> None:
    paths = write(table, tables_root(), name)
    if show:
        _show(table)
    _say(paths)


def _show(table: Table) -> None:
    """For a terminal in its width; for a file or a pipe as Markdown."""
    if not console.is_terminal:
        console.print(to_markdown(table))
        return
    console.print(table.title, style="bold")
    if table.caption:
        console.print(table.caption)
    for part in terminal_tables(table, console.width):
        print_table(part)
    for note in (*table.closing_notes, *(f"[{letter}] {text}" for text, letter in table.footnotes.items())):
        console.print(note)


def _say(paths: list[Path]) -> None:
    console.print(f"written: {', '.join(shown(path, PROJECT_ROOT) for path in paths)}")
