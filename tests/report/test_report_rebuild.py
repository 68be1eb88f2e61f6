"""What is committed in results/tables and results/figures is what the code makes of the committed records again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rodimus_lab.experiment import REPORTS
from rodimus_lab.records import PROJECT_ROOT, load_records
from rodimus_lab.registry import load_plugins
from rodimus_lab.report import PaperResults, write

SHADES = 16  # of 255: processors differ by so much in the soft edges of a PNG's lines, and in nothing else


@pytest.fixture(autouse=True)
def _committed_records(monkeypatch: pytest.MonkeyPatch, committed: Path) -> None:
    monkeypatch.setenv("RODIMUS_LAB_RESULTS", str(committed / "runs"))


def test_tables_are_up_to_date(tmp_path: Path, committed: Path) -> None:
    load_plugins()
    paper = PaperResults()
    for name in REPORTS:
        records = [one for group in REPORTS[name].experiments for one in load_records(experiment=group)]
        for path in write(REPORTS[name].make(records, paper), tmp_path, name):
            there = committed / "tables" / path.name
            same = there.is_file() and path.read_bytes() == there.read_bytes()
            assert same, f"run `make tables` and commit {path.name}"


@pytest.mark.slow
def test_the_commands_rebuild_the_same_whatever_the_environment(tmp_path: Path, committed: Path) -> None:
    """Another number of threads, another order of sets, place, language and time of day."""
    pytest.importorskip("matplotlib")
    (tmp_path / "runs").symlink_to(committed / "runs")
    odd = {
        "RODIMUS_LAB_RESULTS": str(tmp_path / "runs"),
        "OMP_NUM_THREADS": "3",
        "PYTHONHASHSEED": "11",
        "LC_ALL": "C",
        "TZ": "Asia/Tokyo",
        "MPLBACKEND": "svg",
        "CUDA_VISIBLE_DEVICES": "",
    }
    paths = {"PYTHONPATH": str(PROJECT_ROOT)}
    for command in (["report", "--no-site"], ["figures"]):
        subprocess.run(
            [sys.executable, "-m", "rodimus_lab.cli", *command], check=True, cwd=tmp_path, env=os.environ | odd | paths
        )
    for kind in ("tables", "figures"):
        made = {path.name: path for path in (tmp_path / kind).iterdir()}
        other = set(made) ^ {path.name for path in (committed / kind).iterdir()}
        assert not other, f"run `make {kind}` and commit, or remove: {', '.join(sorted(other))}"
        for name, path in made.items():
            there = committed / kind / name
            same = apart(path, there) <= SHADES if path.suffix == ".png" else path.read_bytes() == there.read_bytes()
            assert same, f"run `make {kind}` and commit {name}"


def test_a_changed_picture_is_seen(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for name, shade in (("white", 255), ("grey", 200)):
        image.new("RGB", (4, 4), (shade,) * 3).save(tmp_path / f"{name}.png")
    assert apart(tmp_path / "white.png", tmp_path / "grey.png") == 55


def apart(one: Path, other: Path) -> int:
    """The largest difference of any two pixels' shades; 255 where the sizes differ."""
    from PIL import Image, ImageChops

    with Image.open(one) as first, Image.open(other) as second:
        if first.size != second.size:
            return 255
        extrema = ImageChops.difference(first.convert("RGB"), second.convert("RGB")).getextrema()
    return max(high for _, high in extrema)
