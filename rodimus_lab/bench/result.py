"""What a benchmark gives back and how it is shown. `app` holds the commands; a benchmark is one more of them."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import typer
from rich.table import Table

from rodimus_lab.records import environment
from rodimus_lab.terminal import console, print_table
from rodimus_lab.train.distributed import World
from rodimus_lab.train.journal import device_facts

app = typer.Typer(no_args_is_help=True, help="Measure speed and memory: data, loss, operators, training, decoding.")
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="Default: cuda where there is one.")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed calls; the median counts.")]
Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """`scale` turns the JSON value (seconds, bytes, fractions) into what the table shows."""

    key: str
    header: str
    scale: float = 1.0
    digits: int = 0


@dataclass(frozen=True)
class Result:
    """The rows of a benchmark. A value that was not measured is missing, and `note` in the row says why."""

    name: str
    settings: Mapping[str, Any]
    rows: Sequence[Row]
    facts: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"bench": self.name, "settings": dict(self.settings), "environment": dict(self.facts), "rows": self.rows}

    def to_table(self, columns: Sequence[Column]) -> Table:
        """The rows that hold a measurement."""
        table = Table(box=None, pad_edge=False)
        rows = [row for row in self.rows if any(_is_number(row.get(column.key)) for column in columns)]
        for column in columns:
            number = any(_is_number(row.get(column.key)) for row in rows)
            table.add_column(column.header, justify="right" if number else "left")
        for row in rows:
            table.add_row(*(_shown(row.get(column.key), column) for column in columns))
        return table

    def notes(self) -> list[str]:
        """What rows have to say, each thing once."""
        named = ("operator", "backend", "model", "corpus", "workers")
        told = (
            f"{' '.join(str(row[key]) for key in named if key in row)}: {row['note']}"
            for row in self.rows
            if "note" in row
        )
        return list(dict.fromkeys(told))


@contextmanager
def until_interrupted() -> Iterator[None]:
    """Ctrl-C or SIGTERM ends the block and not the benchmark: what was measured until then is shown."""
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if in_main else None
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted: only what was measured until now is shown", file=sys.stderr)
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)


def surroundings(world: World) -> dict[str, Any]:
    """Commit, versions, device, threads, and how busy the machine was when this was asked."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return environment() | device_facts(world) | {"threads": torch.get_num_threads(), "load_average": load}


def show(result: Result, columns: Sequence[Column], as_json: bool, *more: Sequence[Column]) -> None:
    """A table for each set of columns that any row has."""
    if as_json:
        print(json.dumps(result.to_dict(), indent=1, allow_nan=False))
        return
    facts = result.facts
    packages = facts["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "triton", "tokenizers") if name in packages)
    load = "" if facts["load_average"] is None else f", load {facts['load_average']:.2f}"
    device = facts["cpu"] if facts["device"] == "cpu" else facts["device"]
    dirty = " with uncommitted changes" if facts["dirty"] else ""
    console.print(
        f"bench {result.name}: {device}, {facts['cpu_count']} cores, {facts['threads']} torch threads{load}; "
        f"{versions}, Python {facts['python']}; commit {str(facts['commit'])[:8]}{dirty}",
    )
    console.print("  ".join(f"{name}: {value}" for name, value in result.settings.items()))
    tables = [result.to_table(each) for each in (columns, *more)]
    for table in [table for table in tables if table.row_count] or tables[:1]:
        print_table(table)
    for note in result.notes():
        console.print(note)


def _shown(value: Any, column: Column) -> str:
    if value is None:
        return "-"
    return f"{value * column.scale:,.{column.digits}f}" if _is_number(value) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
