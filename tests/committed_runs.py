"""What is committed in results/: all of it, and three records by their ids. What is tested on them does not change when
others join them here."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from rodimus_lab.records import PROJECT_ROOT

WIKITEXT103 = PROJECT_ROOT / "results" / "runs" / "wikitext103"
THREE = ("rodimus-b6357da5", "rodimus_plus-36701bfc", "transformer_pp-9d4b7f8d")


def copy_three(root: Path) -> None:
    """Below a folder of runs."""
    for run in THREE:
        shutil.copytree(WIKITEXT103 / run, root / "wikitext103" / run)


def committed_results(root: Path) -> Path:
    """results/ as git's index has it, below `root`: without what was run or rebuilt here since. Where there is no git,
    the folder itself."""
    listed = subprocess.run(["git", "ls-files", "-z", "results"], cwd=PROJECT_ROOT, capture_output=True)
    if listed.returncode or not listed.stdout:
        return PROJECT_ROOT / "results"
    command = ["git", "checkout-index", "-z", "--stdin", f"--prefix={root}/"]
    subprocess.run(command, input=listed.stdout, cwd=PROJECT_ROOT, check=True)
    return root / "results"
