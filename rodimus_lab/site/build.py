"""The whole site, built beside the runs: into a folder of its own, which then takes the place of the one before."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rodimus_lab.errors import UserError
from rodimus_lab.nn.zoo import MODELS
from rodimus_lab.records import PROJECT_ROOT, Record, canonical_json, figures_root, load_records, tables_root
from rodimus_lab.registry import load_plugins
from rodimus_lab.report import FIGURES, PaperResults, quoted_tables, write, write_figure
from rodimus_lab.report.artefacts import PAPER, belongs, beyond
from rodimus_lab.report.figure import figure_csv
from rodimus_lab.site.documents import Document, documents
from rodimus_lab.site.pages import Entry, Pages
from rodimus_lab.site.views import (
    CONTEXTS,
    ArtefactView,
    FigureView,
    ModelView,
    RunView,
    TableView,
    model_view,
    plain,
    report_tables,
    run_address,
)

MARK = ".rodimus-lab-site"
FILES = (".svg", ".pdf", ".png", ".csv")  # of a figure


def site_root() -> Path:
    """Where the site is built: `site` beside the runs."""
    return tables_root().parent / "site"


def build_site(folder: Path) -> Path:
    """Build every page from all records; returns the first page's path.

    Without matplotlib there are no figures. Raises `UserError` where `folder` holds something else than a site.
    """
    if folder.exists() and not (folder / MARK).is_file():
        raise UserError(f"{folder} is no site that this command built; move it away")
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        fresh.mkdir(parents=True)
        (fresh / MARK).write_text("built by rodimus-lab report\n", encoding="utf-8")
        _build(fresh)
        if folder.exists():
            shutil.rmtree(folder)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder / "index.html"


def _build(folder: Path) -> None:
    load_plugins()
    records, paper = load_records(), PaperResults()
    pages = Pages(folder)
    by_experiment: dict[str, list[Record]] = {}
    for record in records:
        by_experiment.setdefault(record.experiment, []).append(record)
    reported = report_tables(by_experiment, paper)
    made = reported | quoted_tables(list(reported), paper)
    places = {record.id: run_address(record) for record in records}
    tables = {name: TableView.of(name, table, places) for name, table in made.items()}
    for name, table in made.items():
        write(table, folder / "tables", name)
    figures = _draw(folder / "figures", records, paper, places)

    artefacts = _artefacts(tables, figures)
    runs = _runs(records)
    models = [model_view(name, made.get("table4"), records) for name in MODELS]
    texts = documents(PROJECT_ROOT, {name: view.address for view in artefacts for name in _names(view)})
    _write(pages, artefacts, runs, models, texts)
    pages.write_static()


def _artefacts(tables: Mapping[str, TableView], figures: Mapping[str, FigureView]) -> list[ArtefactView]:
    """The paper's in its order, then ours beyond it."""
    views = [
        plain(
            artefact,
            [view for name, view in tables.items() if belongs(name, artefact)],
            [view for name, view in figures.items() if belongs(name, artefact)],
        )
        for artefact in PAPER
    ]
    for name in beyond(dict.fromkeys([*tables, *figures])):
        table, figure = tables.get(name), figures.get(name)
        title = table.title if table else figure.title if figure else name
        parts = ([table] if table else [], [figure] if figure else [])
        views.append(ArtefactView(name, name.replace("_", " "), title, "ours", *parts))
    return views


def _names(view: ArtefactView) -> list[str]:
    return [table.name for table in view.tables] + [figure.name for figure in view.figures]


def _draw(
    folder: Path, records: Sequence[Record], paper: PaperResults, places: Mapping[str, str]
) -> dict[str, FigureView]:
    """Every registered figure; one that makes several gives them by what follows its name."""
    if find_spec("matplotlib") is None:
        return {}
    drawings: dict[str, Any] = {}
    for name in FIGURES:
        drawn: Any = FIGURES[name](records, paper)
        drawings |= (
            {f"{name}-{end}": one for end, one in drawn.items()} if isinstance(drawn, Mapping) else {name: drawn}
        )
    return {name: _figure(folder, name, drawing, places) for name, drawing in drawings.items()}


def _figure(folder: Path, name: str, drawing: Any, places: Mapping[str, str]) -> FigureView:
    """The files of `make figures` where they have the same numbers, for drawing takes its time; else drawn anew."""
    numbers = figure_csv(drawing)
    there = sorted(figures_root().glob(f"{name}.*"))
    beside = next((path for path in there if path.suffix == ".csv"), None)
    if {path.suffix for path in there} == set(FILES) and beside and beside.read_text(encoding="utf-8") == numbers:
        folder.mkdir(exist_ok=True)
        for path in there:
            shutil.copyfile(path, folder / path.name)
    else:
        write_figure(drawing, folder, name)
    return FigureView.of(name, drawing, [folder / f"{name}{suffix}" for suffix in FILES], numbers, places)


def _runs(records: Sequence[Record]) -> list[RunView]:
    """Each run with the other seeds of its recipe."""
    same: dict[str, list[Record]] = {}
    for record in records:
        same.setdefault(_but_seed(record), []).append(record)
    return [RunView.of(record, same[_but_seed(record)]) for record in records]


def _but_seed(record: Record) -> str:
    return record.experiment + canonical_json({name: value for name, value in record.recipe.items() if name != "seed"})


def _write(
    pages: Pages,
    artefacts: Sequence[ArtefactView],
    runs: Sequence[RunView],
    models: Sequence[ModelView],
    texts: Sequence[Document],
) -> None:
    known = {model.name: model.address for model in models}
    pages.write(
        "index.html", "index.html", {"title": "Results", "artefacts": artefacts, "runs": runs, "models": models}
    )
    for index, view in enumerate(artefacts):
        neighbours = {"before": artefacts[index - 1] if index else None, "after": _at(artefacts, index + 1)}
        entry = Entry(f"{view.label}. {view.title}", view.kind, view.address, view.plain)
        pages.write("artefact.html", view.address, {"title": entry.title, "view": view, **neighbours}, entry)
    pages.write(
        "runs.html", "runs/index.html", {"title": "Runs", "runs": runs}, Entry("Runs", "page", "runs/index.html")
    )
    for run in runs:
        cited = [view for view in artefacts if run.record.id in view.run_ids]
        entry = Entry(f"Run {run.record.id}", "run", run.address, run.plain)
        values = {"title": entry.title, "run": run, "cited": cited, "known": known}
        pages.write("run.html", run.address, values, entry)
    values = {"title": "Models", "models": models}
    pages.write("models.html", "models/index.html", values, Entry("Models", "page", "models/index.html"))
    for model in models:
        entry = Entry(f"Model {model.name}", "model", model.address, model.plain)
        values = {"title": entry.title, "model": model, "contexts": CONTEXTS, "places": _places(model)}
        pages.write("model.html", model.address, values, entry)
    for text in texts:
        entry = Entry(text.title, "docs", text.address, text.plain)
        pages.write("document.html", text.address, {"title": text.title, "text": text, "all": texts}, entry)
        for picture in text.pictures:
            shutil.copyfile(PROJECT_ROOT / "docs" / picture, pages.folder / "docs" / picture)


def _places(model: ModelView) -> dict[str, str]:
    return {record.id: run_address(record) for record in model.runs}


def _at(views: Sequence[ArtefactView], index: int) -> ArtefactView | None:
    return views[index] if index < len(views) else None
