"""The notebooks run top to bottom on what is in results/, define nothing, and are committed without outputs."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from rodimus_lab import results
from rodimus_lab.records import PROJECT_ROOT
from rodimus_lab.report.curves import draw_curves

NOTEBOOKS = sorted((PROJECT_ROOT / "notebooks").glob("*.ipynb"))
GROUPS = {"wikitext103_and_ablations", "mqar", "memory_and_speed", "scaling", "needlebench", "gates"}


def code(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_there_is_one_for_each_group() -> None:
    assert {path.stem for path in NOTEBOOKS} == GROUPS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_without_outputs(path: Path) -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code(path))
    assert path.stat().st_size < 20_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_defines_nothing_and_reads_results_alone(path: Path) -> None:
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in code(path)))
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.Assign)
    assert not [node for node in ast.walk(tree) if isinstance(node, defined)]
    imports = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports == ["from rodimus_lab import results"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_top_to_bottom(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    monkeypatch.delenv("RODIMUS_LAB_RESULTS", raising=False)
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    nbclient.NotebookClient(book, timeout=60, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in book.cells:
        if cell.cell_type == "code" and not cell.source.startswith("from "):
            assert cell.outputs, f"{cell.source} shows nothing"


def test_what_is_not_there_says_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RODIMUS_LAB_RESULTS", str(tmp_path / "runs"))
    assert results.overview("mqar").iloc[0, 0] == "not run"
    assert results.curves("mqar", "test_accuracy") == "not run"
    assert results.picture("figure08") == "not run"
    assert results.table("table6").iloc[0, 0] == "not run"
    assert results.figure("figure04").iloc[0, 0] == "not run"


def test_curves_have_the_colours_of_their_models() -> None:
    pytest.importorskip("matplotlib")
    lines = results.metrics("rodimus-b6357da5", PROJECT_ROOT / "results" / "runs")[["step", "loss"]].dropna()
    drawing = draw_curves({"corpus": [("rodimus", lines), ("transformer++", lines), ("rodimus", lines)]}, "loss")
    (axes,) = drawing.axes
    colours = [(line.get_color(), len(line.get_xdata())) for line in axes.lines]
    assert colours == [("#0072B2", 500), ("#D55E00", 500), ("#0072B2", 500)]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["rodimus, 2 runs", "transformer++"]


def test_curves_are_shown_as_a_picture() -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("IPython")
    shown = results.curves("wikitext103", "valid_ppl", PROJECT_ROOT / "results" / "runs")
    assert shown.data.count("<path") > 10


def test_curves_of_several_corpora_or_budgets_have_panels_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("IPython")
    drawn = {}
    monkeypatch.setattr(results, "draw_curves", lambda panels, name: drawn.update(panels) or draw_curves(panels, name))
    results.curves("wikitext103", "valid_ppl", PROJECT_ROOT / "results" / "runs", where=["model=rodimus"])
    steps = {title: [lines["step"].max() for _, lines in curves] for title, curves in drawn.items()}
    assert steps == {
        "enwiki-25k, short budget 1,000 of 25,000 steps, batch 256, 131M tokens": [1000],
        "enwiki-25k, short budget 1,500 of 25,000 steps, batch 256, 197M tokens": [1500],
    }
