"""Figures: named lines and heat maps, drawn as SVG and PNG with their numbers beside them as CSV, byte for byte
reproducible.

A function that makes one is registered under its name, `@FIGURES.register("state_bytes")`. A model has the same colour
and marker in every figure.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias
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
LABEL_GAP = 0.042  # between the names at the right, as a part of the height


@dataclass(frozen=True)
class Line:
    """The points of one model."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True)
class Axis:
    """`scale` is log2 (powers of two are marked), log or linear; `unit` is written with the numbers, in thousands and
    millions. `also` is a second axis of the same points: its label, and what a value of this one is worth on it."""

    label: str
    scale: Literal["log2", "log", "linear"] = "log"
    unit: str | None = None
    also: tuple[str, float] | None = None


@dataclass(frozen=True)
class Figure:
    """Lines over two axes."""

    title: str
    x: Axis
    y: Axis
    lines: Sequence[Line]
    size: tuple[float, float] = (7.5, 5.0)

    def rows(self) -> list[tuple[Any, ...]]:
        """The numbers below their header."""
        points = [(line.name, x, y) for line in self.lines for x, y in zip(line.xs, line.ys, strict=True)]
        return [("name", self.x.label, self.y.label), *points]

    def paint(self, canvas: Any) -> None:
        """Draw into a matplotlib figure or a part of one."""
        from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

        axes = canvas.add_subplot(title=self.title)
        for axis, ticks, set_scale in ((self.x, axes.xaxis, axes.set_xscale), (self.y, axes.yaxis, axes.set_yscale)):
            set_scale("linear" if axis.scale == "linear" else "log")
            ticks.set_label_text(axis.label)
        for line in self.lines:
            axes.plot(line.xs, line.ys, **style_of(line.name), clip_on=False)
        if self.x.scale == "log2":
            axes.xaxis.set_major_locator(FixedLocator(sorted({x for line in self.lines for x in line.xs})))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
        for axis, ticks in ((self.x, axes.xaxis), (self.y, axes.yaxis)):
            if axis.unit is not None:
                _in_unit(ticks, axis.unit)
        if self.x.also is not None:
            label, worth = self.x.also
            axes.secondary_xaxis("top", functions=(lambda x: x * worth, lambda x: x / worth)).set_xlabel(label)
        _name_lines(axes, self.lines)


@dataclass(frozen=True)
class HeatMap:
    """`values[row][column]`; the columns have names, the rows are counted from 0."""

    title: str
    columns: Sequence[str]
    values: Sequence[Sequence[float]]

    def rows(self) -> list[tuple[Any, ...]]:
        """The numbers below their header."""
        cells = [
            (column, self.columns[column], row, value)
            for row, line in enumerate(self.values)
            for column, value in enumerate(line)
        ]
        return [("column", "name", "row", "value"), *cells]

    def paint(self, canvas: Any) -> None:
        """Draw into a matplotlib figure or a part of one."""
        axes = canvas.add_subplot(title=self.title)
        image = axes.imshow(self.values, aspect="auto", cmap="viridis", interpolation="nearest", rasterized=True)
        axes.grid(False)
        # A dollar sign would begin a formula.
        axes.set_xticks(range(len(self.columns)), [name.replace("$", r"\$") for name in self.columns], rotation=90)
        axes.tick_params(axis="x", labelsize=6)
        canvas.colorbar(image, ax=axes)


@dataclass(frozen=True)
class Panels:
    """Figures or heat maps, so many in a row."""

    title: str
    parts: Sequence[Figure | HeatMap]
    columns: int = 2
    size: tuple[float, float] = (13.0, 5.0)

    def rows(self) -> list[tuple[Any, ...]]:
        """The numbers of all panels, which have one header in common but for the names of their axes."""
        header = ("panel", *self.parts[0].rows()[0])
        return [header, *((part.title, *row) for part in self.parts for row in part.rows()[1:])]

    def paint(self, canvas: Any) -> None:
        """Draw into a matplotlib figure."""
        canvas.suptitle(self.title)
        pieces = canvas.subfigures(-(-len(self.parts) // self.columns), self.columns, squeeze=False)
        for part, piece in zip(self.parts, pieces.flat, strict=False):
            part.paint(piece)


Drawing: TypeAlias = Figure | HeatMap | Panels
MakeFigure: TypeAlias = Callable[[Sequence[Record], PaperResults], Drawing]
FIGURES: Registry[MakeFigure] = Registry("figure")


def write_figures(out_dir: Path | str = PROJECT_ROOT / "results" / "figures") -> list[Path]:
    """Draw every registered figure from all records; returns the files' paths."""
    load_plugins()
    records, paper = load_records(), PaperResults()
    return [path for name in FIGURES for path in write_figure(FIGURES[name](records, paper), out_dir, name)]


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
    """A row for every point."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(figure.rows())
    return text.getvalue()


def draw(figure: Drawing, salt: str) -> dict[str, bytes]:
    """The figure as SVG and PNG. Raises `UserError` where matplotlib is not installed."""
    try:
        from matplotlib import style
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        raise UserError("figures need matplotlib; install it with: pip install -e '.[figures]'") from None
    files = {}
    with style.context(["default", HOUSE | {"svg.hashsalt": salt}]):
        canvas = Canvas(figsize=getattr(figure, "size", (7.5, 5.0)), layout="constrained")
        figure.paint(canvas)
        for suffix, metadata in {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}.items():
            file = io.BytesIO()
            canvas.savefig(file, format=suffix, metadata=metadata)
            files[suffix] = file.getvalue()
    return files


def _in_unit(ticks: Any, unit: str) -> None:
    from matplotlib.ticker import EngFormatter, NullFormatter

    ticks.set_major_formatter(EngFormatter(unit))
    ticks.set_minor_formatter(NullFormatter())


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
