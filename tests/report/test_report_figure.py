"""Figures: reproducible files, one style a model, names that do not run into one another; and those committed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from rodimus_lab.nn.zoo import MODELS
from rodimus_lab.records import PROJECT_ROOT, load_records
from rodimus_lab.registry import load_plugins
from rodimus_lab.report import (
    FIGURES,
    Axis,
    Band,
    Figure,
    HeatMap,
    Line,
    NotRun,
    Panels,
    PaperResults,
    told_runs,
    write_figure,
)
from rodimus_lab.report.figure import by_name, figure_csv, spread
from rodimus_lab.report.style import FAMILIES, OTHERS, model_of, style_of

LINES = [Line("rodimus", (512, 1024), (5, 5)), Line("transformer", (512, 1024), (1.5, 3))]
FIGURE = Figure("State", Axis("Context", "log2"), Axis("Bytes", unit="B"), LINES)


def test_the_same_figure_is_the_same_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first = write_figure(FIGURE, tmp_path / "first", "state")
    again = write_figure(FIGURE, tmp_path / "again", "state")
    assert [path.suffix for path in first] == [".svg", ".pdf", ".png", ".csv"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert b"<dc:date>" not in first[0].read_bytes()
    assert b"Date" not in first[1].read_bytes()


@pytest.mark.parametrize(
    "part",
    [FIGURE, HeatMap("g", "token", "row", ["a", "$b", "a"], [0, 1], [[0.5, 1.0, 2.0], [0.1, 0.2, 0.3]])],
    ids=lambda part: part.title,
)
def test_panels_hold_what_their_parts_do(part: Figure | HeatMap, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    both = Panels("Both", [part, part, part], remark="what they are of")
    assert figure_csv(both).count("\n") == 3 * (len(part.rows()) - 1) + 1
    again = [path.read_bytes() for path in write_figure(both, tmp_path / "again", "both")]
    assert again == [path.read_bytes() for path in write_figure(both, tmp_path, "both")]


def test_points_of_several_seeds_have_bars_and_others_none() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure as Canvas

    line = Line("rodimus", (512, 1024, 2048), (5, 5, 5), stds=(0, 0.5, 0))
    canvas = Canvas()
    replace(FIGURE, lines=[line]).paint(canvas)
    (bars,) = canvas.axes[0].collections
    (segment,) = bars.get_segments()
    assert segment.tolist() == [[1024, 4.5], [1024, 5.5]]


def test_what_is_half_run_has_the_command_that_goes_on() -> None:
    half = replace(FIGURE, unfinished=[("rodimus", 2048)], command="rodimus-lab more")
    assert half.note == "not drawn before all its runs are there: rodimus at 2048 (rodimus-lab more)"
    assert replace(half, missing=[("gla", None)]).note.count("rodimus-lab more") == 1


def test_a_long_note_leaves_the_axes_their_height() -> None:
    pytest.importorskip("matplotlib")
    from io import BytesIO

    from matplotlib.image import imread

    from rodimus_lab.report.figure import draw

    heights = [
        imread(BytesIO(draw(replace(FIGURE, remark="some word " * words), "a")["png"])).shape[0]
        for words in (0, 30, 200)
    ]
    assert heights[0] == heights[1] == 750
    assert heights[2] > 1000


@pytest.mark.parametrize("parts", [0, 1, 4])
def test_long_titles_are_within_the_picture(parts: int) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure as Canvas

    title = f"NeedleBench, {'rodimus-plus-' * 12}0a1b2c3d ({', '.join(['all 24 lengths'] * 20)})"
    heat_map = HeatMap("g" if parts else title, "token", "row", [1000, 2000], [0], [[50.0, 100.0]], scores=True)
    drawing = Panels(title, [heat_map] * parts) if parts else heat_map
    canvas = Canvas(figsize=drawing.size, layout="constrained")
    drawing.paint(canvas)
    canvas.draw_without_rendering()
    drawn = canvas._suptitle if parts else canvas.axes[0].title
    extent = drawn.get_window_extent()
    assert drawn.get_text().count("\n") >= 1
    assert canvas.bbox.x0 <= extent.x0
    assert extent.x1 <= canvas.bbox.x1
    assert extent.y1 <= canvas.bbox.y1


def test_a_heat_map_names_its_columns() -> None:
    assert figure_csv(HeatMap("g", "token", "row", ["a", "b"], [0], [[0.5, 1.0]])).splitlines() == [
        "column,token,row,value",
        "0,a,0,0.5",
        "1,b,0,1.0",
    ]


def test_numbers_stand_beside_it() -> None:
    assert figure_csv(FIGURE).splitlines() == [
        "name,Context,Bytes",
        "rodimus,512,5",
        "rodimus,1024,5",
        "transformer,512,1.5",
        "transformer,1024,3",
    ]


def test_every_model_has_a_style_of_its_own() -> None:
    load_plugins()
    styles = {name: (style_of(name)["color"], style_of(name)["marker"]) for name in MODELS}
    assert len(set(styles.values())) == len(styles)


def test_a_style_is_of_the_name_alone_and_of_one_model() -> None:
    names = [name for family in FAMILIES.values() for name in family]
    styles = {(style["color"], style["marker"]) for style in map(style_of, names)}
    assert len(styles) == len(names)
    assert style_of("some new model") == style_of("some new model")


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("Rodimus+-1.6B", "rodimus+"),
        ("rodimus_plus-b6357da5", "rodimus+"),
        ("rodimus-b6357da5", "rodimus"),
        ("transformer_pp-swa", "transformer++-swa"),
        ("Mamba2-1.3B", "mamba2"),
        ("mambalike", "mambalike"),
    ],
)
def test_a_model_keeps_its_colour_under_every_name(name: str, model: str) -> None:
    assert model_of(name) == model
    assert style_of(name) == style_of(model)
    assert (style_of(name)["color"] == OTHERS) is (name == model)


def test_lines_of_a_parameter_are_told_apart_by_shade() -> None:
    pytest.importorskip("matplotlib")
    shades = [Line(name, (1,), (1,), shade=share).style["color"] for name, share in (("a", 0), ("b", 0.5), ("c", 1))]
    assert len(set(shades)) == 3
    assert not {"marker"} & set(Line("a", (1,), (1,), shade=0).style)


@pytest.mark.parametrize("scale", ["log", "log2", "linear"])
def test_no_point_lies_on_the_edge_and_every_axis_has_numbers(scale: Literal["log", "log2", "linear"]) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(layout="constrained")
    xs = (393_216, 3_145_728)
    lines = [Line("rodimus", xs, (1, 2))]
    also = ("millions", 1e-6)
    replace(FIGURE, x=Axis("Cache", scale, "B", also), lines=lines, missing=[("mamba", 5e6)]).paint(canvas)
    canvas.draw_without_rendering()
    (axes,) = canvas.axes
    low, high = axes.get_xlim()
    assert low < min(xs)
    assert high > 5e6
    (above,) = axes.child_axes
    for one in (axes, above):
        ends = sorted(one.get_xlim())
        named = [x for x, text in zip(one.get_xticks(), one.get_xticklabels(), strict=True) if text.get_text()]
        assert len([x for x in named if ends[0] <= x <= ends[1]]) >= 2
        assert not any("10^" in text.get_text() for text in one.get_xticklabels())


def test_the_runs_behind_the_points_are_told_in_the_note_and_in_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    wikitext = load_records(PROJECT_ROOT / "results" / "runs", "wikitext103")
    runs = [record for record in wikitext if record.id in ("rodimus-b6357da5", "rodimus_plus-36701bfc")]
    lines = [Line(run.label, (1, 2), (run.metrics["valid_ppl"],) * 2, runs=[[run], [run]]) for run in runs]
    figure = replace(FIGURE, lines=lines, paper_corpus="wikitext-103")
    budget = "short budget 1,500 of 25,000 steps, batch 256, 197M tokens"
    told = f"enwiki-25k standing in for wikitext-103, gpt2 tokens, {budget}, NVIDIA H200"
    assert figure.note == f"rodimus-b6357da5, rodimus_plus-36701bfc: {told}"
    (_, first, *_) = figure.rows()
    assert first == (
        "rodimus",
        1,
        runs[0].metrics["valid_ppl"],
        "rodimus-b6357da5",
        "enwiki-25k",
        budget,
        "NVIDIA H200",
    )
    svg = write_figure(Panels("Both", [figure, FIGURE], runs=runs[:1]), tmp_path, "told")[0].read_text()
    assert "rodimus_plus-36701bfc" in svg
    cut = replace(runs[0], metrics=runs[0].metrics | {"steps": 700})
    assert told_runs([cut]).startswith("rodimus-b6357da5 (ended after 700 steps): enwiki-25k, gpt2 tokens, short")
    many = [replace(runs[0], id=f"run-{number}") for number in range(9)]
    assert told_runs(many).startswith("9 runs, named in the CSV: enwiki-25k")
    many[3:5] = [replace(run, metrics=run.metrics | {"steps": 700 + place}) for place, run in enumerate(many[3:5])]
    assert told_runs(many).startswith("9 runs, named in the CSV, 2 of which ended after 700 to 701 steps: enwiki-25k")


def test_what_was_not_run_says_so_and_how_to_run_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    empty = replace(FIGURE, lines=[], missing=[("rodimus", 512)], command="rodimus-lab wikitext103")
    absent = NotRun("Figure 9", "rodimus-lab needlebench RUN", "RUN is a run")
    for figure in (empty, absent):
        svg = write_figure(figure, tmp_path, "absent")[0].read_text()
        assert "<!-- not run -->" in svg
        assert f"<!-- {figure.command} -->" in svg
        assert "not run" in figure_csv(figure)
        assert f"{figure.command}" in figure.note


@pytest.mark.parametrize(
    ("heights", "apart"),
    [
        ([], []),
        ([0.1, 0.5], [0.1, 0.5]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.5, 0.5, 0.58], [0.4267, 0.5267, 0.6267]),
    ],
)
def test_names_are_kept_apart(heights: list[float], apart: list[float]) -> None:
    assert spread(heights, 0.1) == pytest.approx(apart, abs=1e-4)


def test_the_committed_numbers_are_those_of_the_code(committed: Path) -> None:
    load_plugins()
    figures = committed / "figures"
    records, paper = load_records(committed / "runs"), PaperResults()
    made = {end: one for name in FIGURES for end, one in by_name(name, FIGURES[name](records, paper)).items()}
    assert {path.stem for path in figures.iterdir()} == set(made)
    for name, figure in made.items():
        assert (figures / f"{name}.csv").read_text() == figure_csv(figure), f"run `make figures` and commit {name}"
        assert (figures / f"{name}.svg").is_file()
        assert (figures / f"{name}.png").stat().st_size < 500_000
        assert (figures / f"{name}.pdf").stat().st_size < 100_000


def test_sources_and_what_is_missing_stand_in_the_numbers_and_the_note(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    quoted = Line("rodimus", (16, 32), (0.2, 0.4), sources=("paper", "paper"), quoted=True)
    ours = Line("rodimus", (16,), (0.3,), sources=("run-1",))
    axes = Axis("n", "log2"), Axis("Accuracy", "share")
    figure = Figure("Recall", *axes, [quoted, ours], missing=[("rodimus", 32), ("mamba", 16)])
    assert figure.note == "dashed and pale: the paper's; not run: rodimus at 32, mamba"
    assert figure_csv(figure).splitlines() == [
        "name,n,Accuracy,source",
        "rodimus,16,0.2,paper",
        "rodimus,32,0.4,paper",
        "rodimus,16,0.3,run-1",
        "rodimus,32,,not run",
        "mamba,16,,not run",
    ]
    svg = write_figure(figure, tmp_path, "recall")[0].read_text()
    assert "stroke-dasharray" in svg
    by_eye = replace(quoted, sources=("paper, read by eye",) * 2)
    unknown = replace(figure, lines=[by_eye, ours], missing=[("mamba", None)])
    assert unknown.note == "dashed and pale: the paper's, read by eye; not run: mamba"
    assert figure_csv(unknown).splitlines()[-1] == "mamba,,,not run"
    empty = Figure("Recall", *axes, [], missing=[("rodimus", 16), ("rodimus", 32)])
    assert empty.note == "not run: rodimus"
    assert write_figure(empty, tmp_path, "empty")[1].stat().st_size > 0


@pytest.mark.parametrize(("scale", "limits"), [("share", (0, 1)), ("score", (0, 100))])
def test_what_has_bounds_is_drawn_within_them(scale: str, limits: tuple[float, float]) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    replace(FIGURE, y=Axis("Accuracy", scale)).paint(figure)
    assert figure.axes[0].get_ylim() == limits
    assert figure.axes[0].get_yscale() == "linear"


def test_a_fitted_law_has_a_band_in_the_picture_and_in_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    band = Band("rodimus", (1e15, 1e16), (8.0, 6.0), (7.0, 5.5), (9.0, 6.5))
    points = Line("rodimus", (1e15, 1e16), (8.1, 5.9), sources=("run-1", "run-2"))
    axes = Axis("FLOPs", "log"), Axis("PPL", "tight")
    figure = Figure("Loss", *axes, [points], missing=[("mamba", 1e15)], bands=[band])
    assert figure.note == "shaded: where the fitted law lies with 95 % confidence; not run: mamba"
    assert figure_csv(figure).splitlines() == [
        "name,FLOPs,PPL,source,low,high",
        "rodimus,1000000000000000.0,8.1,run-1,,",
        "rodimus,1e+16,5.9,run-2,,",
        "mamba,1000000000000000.0,,not run,,",
        "rodimus,1e+15,8,fit,7,9",
        "rodimus,1e+16,6,fit,5.5,6.5",
    ]
    plain = write_figure(replace(figure, bands=()), tmp_path, "plain")[0].read_text()
    assert write_figure(figure, tmp_path, "law")[0].read_text().count("FillBetweenPolyCollection") > plain.count(
        "FillBetweenPolyCollection"
    )
