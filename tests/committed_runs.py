"""Three committed records, by their ids: what is tested on them does not change when others join them."""

from __future__ import annotations

import shutil
from pathlib import Path

from rodimus_lab.records import PROJECT_ROOT

WIKITEXT103 = PROJECT_ROOT / "results" / "runs" / "wikitext103"
THREE = ("rodimus-b6357da5", "rodimus_plus-36701bfc", "transformer_pp-9d4b7f8d")


def copy_three(root: Path) -> None:
    """Below a folder of runs."""
    for run in THREE:
        shutil.copytree(WIKITEXT103 / run, root / "wikitext103" / run)
