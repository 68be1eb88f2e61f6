"""The console that every command writes to; of several ranks the first alone speaks."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

console = Console(highlight=False, markup=False, soft_wrap=True, quiet=os.environ.get("RANK", "0") != "0")


def shown(path: Path, root: Path) -> str:
    """A path as it is said to a reader: from `root` where it lies there."""
    return str(path.relative_to(root) if path.is_relative_to(root) else path)
