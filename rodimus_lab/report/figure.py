"""Figures: named lines, heat maps and panels of both, drawn as SVG and PNG with their numbers beside them as CSV, byte
for byte reproducible.

A function that makes one is registered under its name, `@FIGURES.register("state_bytes")`; one that makes several, such
as one a run, gives them by what follows that name. A model has the same colour and marker in every figure.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias
from zlib import crc32

from rodimus_lab.errors import UserError
from rodimus_lab.records import PROJECT_ROOT, Record, load_records, write_atomic
from rodimus_lab.registry import Registry, load_plugins
from rodimus_lab.report.paper import PaperResults
from rodimus_lab.report.table import check_name

# Okabe and Ito's colours, which the colour-blind tell apart; without yellow, which is faint on white. One a family, and
# in it a marker a model.
FAMILIES = {
    "#0072B2": ("rodimus", "rodimus+"),
    "#D55E00": ("transformer", "transformer++", "transformer++-swa", "llama3", "streaming_llm"),
    "#009E73": ("linear_attention", "gla", "gla-table1", "retnet", "gretnet", "hgrn2", "gated_deltanet", "kda"),
    "#000000": ("s4d", "mamba", "mamba2", "mamba3"),
    "#CC79A7": ("rwkv4", "rwkv6", "rwkv7"),
    "#E69F00": ("hgrn", "hawk", "griffin"),
}
OTHERS = "#56B4E9"
MARKERS = "os^DvPX*"
HOUSE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "savefig.dpi": 150,
}
SCORES = ("#D55E00", "#F0E442", "#009E73")  # Of 0, 50 and 100, and told apart by the colour-blind.
LABEL_GAP = 0.042  # between the names at the right, as a part of the height


@dataclass(frozen=True)
class Line:
    """The points of one model."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True)
class Figure:
    """Lines over logarithmic axes, x in powers of two, or over linear ones. `unit` is that of y."""

    title: str
    x_label: str
    y_label: str
    unit: str
    lines: Sequence[Line]
    logarithmic: bool = True


@dataclass(frozen=True)
class HeatMap:
    """`values`, from 0 to 100, one row for each of `ys`, from the top down, and in it one for each of `xs`. None is a
    cell without a value, which is hatched. Over it runs the mean of every column."""

    title: str
    x_label: str
    y_label: str
    xs: Sequence[float]
    ys: Sequence[float]
    values: Sequence[Sequence[float | None]]

    def means(self) -> list[float | None]:
        """The mean of every column's values, None where it has none."""
        columns = ([row[index] for row in self.values] for index in range(len(self.xs)))
        there = ([value for value in column if value is not None] for column in columns)
        return [fmean(values) if values else None for values in there]


@dataclass(frozen=True)
class Panels:
    """Several in one picture, two in a row."""

    title: str
    parts: Sequence[Figure | HeatMap]


Drawing: TypeAlias = Figure | HeatMap | Panels
MakeFigure: TypeAlias = Callable[[Sequence[Record], PaperResults], Drawing | Mapping[str, Drawing]]
FIGURES: Registry[MakeFigure] = Registry("figure")


def write_figures(out_dir: Path | str = PROJECT_ROOT / "results" / "figures") -> list[Path]:
    """Draw every registered figure from all records; returns the files' paths."""
    load_plugins()
    records, paper = load_records(), PaperResults()
    named = [pair for name in FIGURES for pair in by_name(name, FIGURES[name](records, paper)).items()]
    return [path for name, figure in named for path in write_figure(figure, out_dir, name)]


def by_name(name: str, made: Drawing | Mapping[str, Drawing]) -> dict[str, Drawing]:
    """What a registered function made, by the names of the files."""
    return {f"{name}-{end}": one for end, one in made.items()} if isinstance(made, Mapping) else {name: made}


def write_figure(figure: Drawing, out_dir: Path | str, name: str) -> list[Path]:
    """Write `name.svg`, `name.png` and `name.csv` into `out_dir`; returns their paths."""
    check_name(name)
    svg, png, numbers = (Path(out_dir) / f"{name}.{suffix}" for suffix in ("svg", "png", "csv"))
    drawn = draw(figure, name)
    write_atomic(numbers, figure_csv(figure))
    write_atomic(svg, drawn["svg"].decode())
    png.write_bytes(drawn["png"])
    return [svg, png, numbers]


def figure_csv(figure: Drawing) -> str:
    """A row for every point or cell; of panels, the title of each stands before its rows. What is missing is empty."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(_rows(figure))
    return text.getvalue()


def _rows(figure: Drawing) -> list[tuple[Any, ...]]:
    if isinstance(figure, Panels):
        parts = [(part.title, _rows(part)) for part in figure.parts]
        return [("panel", *parts[0][1][0]), *((title, *row) for title, rows in parts for row in rows[1:])]
    if isinstance(figure, HeatMap):
        cells = zip(figure.ys, figure.values, strict=True)
        points = [(x, y, value) for y, row in cells for x, value in zip(figure.xs, row, strict=True)]
        return [(figure.x_label, figure.y_label, "value"), *points]
    lines = [(line.name, x, y) for line in figure.lines for x, y in zip(line.xs, line.ys, strict=True)]
    return [("name", figure.x_label, figure.y_label), *lines]


def draw(figure: Drawing, salt: str) -> dict[str, bytes]:
    """The figure as SVG and PNG. Raises `UserError` where matplotlib is not installed."""
    try:
        from matplotlib import style
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        raise UserError("figures need matplotlib; install it with: pip install -e '.[figures]'") from None
    files = {}
    parts = figure.parts if isinstance(figure, Panels) else (figure,)
    rows, columns = (-(-len(parts) // 2), 2) if isinstance(figure, Panels) else (1, 1)
    with style.context(["default", HOUSE | {"svg.hashsalt": salt}]):
        canvas = Canvas(figsize=(7.5 * columns, 5.0 * rows), layout="constrained")
        if isinstance(figure, Panels):
            canvas.suptitle(figure.title)
        for number, part in enumerate(parts, 1):
            if isinstance(part, HeatMap):
                _draw_map(canvas.add_subplot(rows, columns, number, title=part.title), part)
            else:
                _draw_lines(canvas.add_subplot(rows, columns, number, title=part.title), part)
        for suffix, metadata in {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}.items():
            file = io.BytesIO()
            canvas.savefig(file, format=suffix, metadata=metadata)
            files[suffix] = file.getvalue()
    return files


def _draw_lines(axes: Any, figure: Figure) -> None:
    from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, NullLocator

    if figure.logarithmic:
        axes.set(xscale="log", yscale="log")
    axes.set(xlabel=figure.x_label, ylabel=figure.y_label)
    for line in figure.lines:
        axes.plot(line.xs, line.ys, **style_of(line.name), clip_on=False)
    kilo = 1024 if figure.logarithmic else 1000
    axes.xaxis.set_major_locator(FixedLocator(sorted({x for line in figure.lines for x in line.xs})))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / kilo:g}k" if x >= kilo else f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(EngFormatter(figure.unit))
    _name_lines(axes, figure.lines)


def _draw_map(axes: Any, heat: HeatMap) -> None:
    """Cells from red over yellow to green, and the columns' means, 0 at the bottom and 100 at the top."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("scores", SCORES)
    axes.set_facecolor("#FFFFFF")
    axes.patch.set(hatch="////", edgecolor="#BBBBBB")
    numbers = [[float("nan") if value is None else value for value in row] for row in heat.values]
    mesh = axes.pcolormesh(numbers, cmap=colours, vmin=0, vmax=100, edgecolors="white", linewidth=0.3)
    axes.invert_yaxis()
    axes.grid(False)
    axes.set(xlabel=heat.x_label, ylabel=heat.y_label)
    axes.set_xticks([index + 0.5 for index in range(len(heat.xs))], [f"{x / 1000:g}k" for x in heat.xs])
    shown = range(0, len(heat.ys), 2)
    axes.set_yticks([index + 0.5 for index in shown], [f"{heat.ys[index]:g}" for index in shown])
    axes.figure.colorbar(mesh, ax=axes, fraction=0.04, pad=0.01)
    over = axes.twinx()
    over.set(ylim=(0, 100), yticks=[])
    over.grid(False)
    points = [(index + 0.5, mean) for index, mean in enumerate(heat.means()) if mean is not None]
    over.plot([x for x, _ in points], [mean for _, mean in points], color="white", marker="o")
    for x, mean in points:
        over.annotate(f"{mean:.1f}", (x, mean), (0, 5), textcoords="offset points", ha="center", fontsize=7)


def style_of(name: str) -> dict[str, Any]:
    """Colour and marker of a model, in every figure the same."""
    colour = next((colour for colour, names in FAMILIES.items() if name in names), OTHERS)
    number = crc32(name.encode()) if colour == OTHERS else FAMILIES[colour].index(name)
    return {"color": colour, "marker": MARKERS[number % len(MARKERS)], "markerfacecolor": "white"}


def _name_lines(axes: Any, lines: Sequence[Line]) -> None:
    """Write each line's name at the right, in its colour and near its end."""
    axes.autoscale_view()  # The limits are otherwise found only when it is drawn.
    to_height = (axes.transData + axes.transAxes.inverted()).transform
    ends = sorted((((line.xs[-1], line.ys[-1]), line.name) for line in lines), key=lambda end: (end[0][1], end[1]))
    heights = spread([to_height(point)[1] for point, _ in ends], LABEL_GAP)
    for (point, name), height in zip(ends, heights, strict=True):
        colour = style_of(name)["color"]
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 4, "relpos": (0, 0.5)}
        axes.annotate(
            name,
            point,
            (1.07, height),
            textcoords="axes fraction",
            va="center",
            color=colour,
            arrowprops=leader,
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Rising heights, moved so as to be `gap` apart: those that crowd are set around their common middle."""
    crowds: list[list[float]] = []
    for height in heights:
        crowds.append([height])
        while len(crowds) > 1 and _middle(crowds[-1]) - _middle(crowds[-2]) < gap * len(crowds[-2] + crowds[-1]) / 2:
            last = crowds.pop()
            crowds[-1] += last
    return [_middle(crowd) + gap * (index - (len(crowd) - 1) / 2) for crowd in crowds for index, _ in enumerate(crowd)]


def _middle(heights: Sequence[float]) -> float:
    return sum(heights) / len(heights)
