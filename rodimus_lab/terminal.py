"""The console that every command writes to; of several ranks the first alone speaks."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

console = Console(highlight=False, markup=False, soft_wrap=True, quiet=os.environ.get("RANK", "0") != "0")


def print_table(table: Table, to: Console = console) -> None:
    """With every cell on one line: one that is broader than the terminal runs over instead of being squeezed."""
    table.width = Measurement.get(to, to.options.update(max_width=10_000), table).maximum
    to.print(table, crop=False)


def shown(path: Path, root: Path) -> str:
    """A path as it is said to a reader: from `root` where it lies there."""
    return str(path.relative_to(root) if path.is_relative_to(root) else path)
