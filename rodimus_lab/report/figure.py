"""Figures: named lines, drawn as SVG and PNG with their numbers beside them as CSV, byte for byte reproducible.

A function that makes one is registered under its name, `@FIGURES.register("state_bytes")`. A model has the same colour
and marker in every figure.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
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
LABEL_GAP = 0.042  # between the names at the right, as a part of the height


@dataclass(frozen=True)
class Line:
    """The points of one model."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True)
class Figure:
    """Lines over logarithmic axes, x in powers of two. `unit` is that of y."""

    title: str
    x_label: str
    y_label: str
    unit: str
    lines: Sequence[Line]


MakeFigure: TypeAlias = Callable[[Sequence[Record], PaperResults], Figure]
FIGURES: Registry[MakeFigure] = Registry("figure")


def write_figures(out_dir: Path | str = PROJECT_ROOT / "results" / "figures") -> list[Path]:
    """Draw every registered figure from all records; returns the files' paths."""
    load_plugins()
    records, paper = load_records(), PaperResults()
    return [path for name in FIGURES for path in write_figure(FIGURES[name](records, paper), out_dir, name)]


def write_figure(figure: Figure, out_dir: Path | str, name: str) -> list[Path]:
    """Write `name.svg`, `name.png` and `name.csv` into `out_dir`; returns their paths."""
    check_name(name)
    svg, png, numbers = (Path(out_dir) / f"{name}.{suffix}" for suffix in ("svg", "png", "csv"))
    drawn = draw(figure, name)
    write_atomic(numbers, figure_csv(figure))
    write_atomic(svg, drawn["svg"].decode())
    png.write_bytes(drawn["png"])
    return [svg, png, numbers]


def figure_csv(figure: Figure) -> str:
    """A row for every point."""
    text = io.StringIO()
    rows = ((line.name, x, y) for line in figure.lines for x, y in zip(line.xs, line.ys, strict=True))
    csv.writer(text, lineterminator="\n").writerows([("name", figure.x_label, figure.y_label), *rows])
    return text.getvalue()


def draw(figure: Figure, salt: str) -> dict[str, bytes]:
    """The figure as SVG and PNG. Raises `UserError` where matplotlib is not installed."""
    try:
        from matplotlib import style
        from matplotlib.figure import Figure as Canvas
        from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, NullLocator
    except ImportError:
        raise UserError("figures need matplotlib; install it with: pip install -e '.[figures]'") from None
    files = {}
    with style.context(["default", HOUSE | {"svg.hashsalt": salt}]):
        canvas = Canvas(figsize=(7.5, 5.0), layout="constrained")
        axes = canvas.add_subplot(xscale="log", yscale="log", title=figure.title)
        axes.set(xlabel=figure.x_label, ylabel=figure.y_label)
        for line in figure.lines:
            axes.plot(line.xs, line.ys, **style_of(line.name), clip_on=False)
        axes.xaxis.set_major_locator(FixedLocator(sorted({x for line in figure.lines for x in line.xs})))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(EngFormatter(figure.unit))
        _name_lines(axes, figure.lines)
        for suffix, metadata in {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}.items():
            file = io.BytesIO()
            canvas.savefig(file, format=suffix, metadata=metadata)
            files[suffix] = file.getvalue()
    return files


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
