"""Figures: named lines, heat maps, or panels of both, drawn as SVG, PDF and PNG with their numbers beside them as
CSV, byte for byte reproducible.

A function that makes one is registered under its name, `@FIGURES.register("state_bytes")`; one that makes several, such
as one a run, gives them by what follows that name. A model has the same colour and marker in every figure.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any, Literal, TypeAlias
from zlib import crc32

from rodimus_lab.errors import UserError
from rodimus_lab.records import Record, figures_root, load_records, write_atomic
from rodimus_lab.registry import Registry, load_plugins
from rodimus_lab.report.heat_map import HeatMap, wrap_title
from rodimus_lab.report.paper import PaperResults
from rodimus_lab.report.table import check_name

# Okabe and Ito's colours, which the colour-blind tell apart; without yellow, which is faint on white. One a family, and
# in it a marker a model.
FAMILIES = {
    "#0072B2": ("rodimus", "rodimus+"),
    "#D55E00": ("transformer", "transformer++", "transformer++-swa", "llama3", "streaming_llm"),
    "#009E73": ("linear_attention", "gla", "gla-table1", "retnet", "gretnet", "hgrn2", "gated_deltanet", "kda"),
    "#000000": ("s4d", "mamba", "mamba2", "mamba3", "samba"),
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
# What the files would else say of when and by which version they were drawn.
UNDATED = {
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "png": {"Software": None},
}
LABEL_GAP = 0.042  # between the names at the right, as a part of the height


@dataclass(frozen=True)
class Line:
    """The points of one model. `sources` say point by point where each is from; `quoted` ones are the paper's, drawn
    pale and behind ours. `stds` are the standard deviations over seeds, 0 where there is one seed, drawn as a band."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    sources: Sequence[str] = ()
    quoted: bool = False
    stds: Sequence[float] = ()


@dataclass(frozen=True)
class Axis:
    """On `log2` the points are marked, `tight` is logarithmic within about one decade, and a `share` is from 0 to 1.
    `unit` is written with the numbers, in thousands and millions. `also` is a second axis of the same points: its
    label, and what a value of this one is worth on it."""

    label: str
    scale: Literal["log2", "log", "tight", "linear", "share"] = "log"
    unit: str | None = None
    also: tuple[str, float] | None = None


@dataclass(frozen=True)
class Band:
    """The law fitted through the points of one model, and at each x the limits that it lies between."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]

    def rows(self, source: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Name, x, y, `source`, low and high of every point."""
        points = zip(self.xs, self.ys, self.lows, self.highs, strict=True)
        told = [tuple(f"{value:.6g}" for value in point) for point in points]
        return [(self.name, *point[:2], *source, *point[2:]) for point in told]

    def paint(self, axes: Any) -> None:
        colour = style_of(self.name)["color"]
        axes.plot(self.xs, self.ys, color=colour, linewidth=1.0)
        axes.fill_between(self.xs, self.lows, self.highs, color=colour, alpha=0.12, linewidth=0)


def tell_points(points: Iterable[tuple[str, float]], whole: Set[str] = frozenset()) -> str:
    """(name, x) in words, such as "a, b at 1, 2"; of those that are `whole` the name alone."""
    at: dict[str, list[str]] = {}
    for name, x in points:
        at.setdefault(name, []).append(f"{x:g}")
    return ", ".join(name if name in whole else f"{name} at {', '.join(xs)}" for name, xs in at.items())


@dataclass(frozen=True)
class Figure:
    """Lines over two axes. `missing` are points that are not there: (name, x); `remark` is what else has to be known.
    Points with a band are not joined."""

    title: str
    x: Axis
    y: Axis
    lines: Sequence[Line]
    missing: Sequence[tuple[str, float]] = ()
    size: tuple[float, float] = (7.5, 5.0)
    bands: Sequence[Band] = ()
    remark: str = ""

    @property
    def note(self) -> str:
        """What has to be known beside the lines: which are quoted, what was not run, and the remark."""
        parts = ["dashed and pale: the paper's"] if any(line.quoted for line in self.lines) else []
        parts += ["shaded: where the fitted law lies with 95 % confidence"] if self.bands else []
        drawn = {line.name for line in self.lines if not line.quoted}
        absent = tell_points(self.missing, whole={name for name, _ in self.missing} - drawn)
        parts += [f"not run: {absent}"] if absent else []
        return "; ".join([*parts, *([self.remark] if self.remark else [])])

    def rows(self) -> list[tuple[Any, ...]]:
        """The points below their header, with their sources where there are any; one that is missing has no y. Fitted
        laws follow, with their limits in two more columns."""
        points = [(line.name, x, y) for line in self.lines for x, y in zip(line.xs, line.ys, strict=True)]
        header: tuple[str, ...] = ("name", self.x.label, self.y.label)
        rows: list[tuple[Any, ...]] = [*points]
        if self.missing or any(line.sources for line in self.lines):
            header += ("source",)
            sources = [source for line in self.lines for source in line.sources or [""] * len(line.xs)]
            rows = [(*point, source) for point, source in zip(points, sources, strict=True)]
            rows += [(name, x, "", "not run") for name, x in self.missing]
        if not self.bands:
            return [header, *rows]
        source = ("fit",) * (len(header) - 3)
        laws = [row for band in self.bands for row in band.rows(source)]
        return [(*header, "low", "high"), *((*row, "", "") for row in rows), *laws]

    def paint(self, canvas: Any) -> None:
        """Draw into a matplotlib figure or a part of one."""
        axes = canvas.add_subplot(title=self.title)
        xs = sorted({x for line in self.lines for x in line.xs} | {x for _, x in self.missing})
        for axis, ticks, set_scale in ((self.x, axes.xaxis, axes.set_xscale), (self.y, axes.yaxis, axes.set_yscale)):
            set_scale("linear" if axis.scale in ("linear", "share") else "log")
            ticks.set_label_text(axis.label)
        fitted = {band.name for band in self.bands}
        for line in self.lines:
            pale: dict[str, Any] = {"alpha": 0.4, "linestyle": "--", "zorder": 1.9} if line.quoted else {}
            loose = {"linestyle": "none"} if not pale and line.name in fitted else {}
            axes.plot(line.xs, line.ys, **style_of(line.name), **pale, **loose, clip_on=False)
            if any(line.stds):
                low, high = ([y + sign * std for y, std in zip(line.ys, line.stds, strict=True)] for sign in (-1, 1))
                axes.fill_between(line.xs, low, high, color=style_of(line.name)["color"], alpha=0.15, linewidth=0)
        for band in self.bands:
            band.paint(axes)
        if self.missing and len(xs) > 1:
            axes.set_xlim(xs[0], xs[-1])
        for axis, ticks, set_limits in ((self.x, axes.xaxis, axes.set_xlim), (self.y, axes.yaxis, axes.set_ylim)):
            if axis.scale == "share":
                set_limits(0, 1)
            _mark(ticks, axis, xs)
        if self.x.also is not None:
            label, worth = self.x.also
            axes.secondary_xaxis("top", functions=(lambda x: x * worth, lambda x: x / worth)).set_xlabel(label)
        ours = {line.name for line in self.lines if not line.quoted}
        _name_lines(axes, [line for line in self.lines if not line.quoted or line.name not in ours])
        _write_note(canvas, self.note)


@dataclass(frozen=True)
class Panels:
    """Figures or heat maps, so many in a row; their numbers have the same columns but for the names of the axes. `note`
    is what has to be known beside all of them."""

    title: str
    parts: Sequence[Figure | HeatMap]
    columns: int = 2
    note: str = ""

    @property
    def size(self) -> tuple[float, float]:
        """As wide and high as its parts."""
        down = -(-len(self.parts) // self.columns)
        across = min(self.columns, len(self.parts))
        return across * max(part.size[0] for part in self.parts), down * max(part.size[1] for part in self.parts)

    def rows(self) -> list[tuple[Any, ...]]:
        """The numbers of all parts below one header."""
        header = ("panel", *self.parts[0].rows()[0])
        return [header, *((part.title, *row) for part in self.parts for row in part.rows()[1:])]

    def paint(self, canvas: Any) -> None:
        """Draw into a matplotlib figure."""
        canvas.suptitle(wrap_title(self.title, self.size[0]))
        across = min(self.columns, len(self.parts))
        pieces = canvas.subfigures(-(-len(self.parts) // across), across, squeeze=False)
        for part, piece in zip(self.parts, pieces.flat, strict=False):
            part.paint(piece)
        _write_note(canvas, self.note)


Drawing: TypeAlias = Figure | HeatMap | Panels
MakeFigure: TypeAlias = Callable[[Sequence[Record], PaperResults], Drawing | Mapping[str, Drawing]]
FIGURES: Registry[MakeFigure] = Registry("figure")


def write_figures(out_dir: Path | str | None = None, names: Iterable[str] | None = None) -> list[Path]:
    """Draw registered figures, by default all, from all records, by default beside them; returns the files' paths."""
    load_plugins()
    records, paper = load_records(), PaperResults()
    asked = FIGURES if names is None else [FIGURES.canonical(name) for name in names]
    drawings = {file: one for name in asked for file, one in by_name(name, FIGURES[name](records, paper)).items()}
    folder = figures_root() if out_dir is None else out_dir
    return [path for file, drawing in drawings.items() for path in write_figure(drawing, folder, file)]


def by_name(name: str, made: Drawing | Mapping[str, Drawing]) -> dict[str, Drawing]:
    """What a registered function made, by the names of the files."""
    return {f"{name}-{end}": one for end, one in made.items()} if isinstance(made, Mapping) else {name: made}


def write_figure(figure: Drawing, out_dir: Path | str, name: str) -> list[Path]:
    """Write `name.svg`, `name.pdf`, `name.png` and `name.csv` into `out_dir`; returns their paths."""
    check_name(name)
    drawn = draw(figure, name) | {"csv": figure_csv(figure).encode()}
    paths = [Path(out_dir) / f"{name}.{suffix}" for suffix in drawn]
    for path, content in zip(paths, drawn.values(), strict=True):
        write_atomic(path, content)
    return paths


def figure_csv(figure: Drawing) -> str:
    """The numbers of a figure, a row for every point or cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(figure.rows())
    return text.getvalue()


def draw(figure: Drawing, salt: str) -> dict[str, bytes]:
    """The figure as SVG, PDF and PNG. Raises `UserError` where matplotlib is not installed."""
    try:
        from matplotlib import style
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        raise UserError("figures need matplotlib; install it with: pip install -e '.[figures]'") from None
    files = {}
    with style.context(["default", HOUSE | {"svg.hashsalt": salt}]):
        canvas = Canvas(figsize=figure.size, layout="constrained")
        figure.paint(canvas)
        for suffix, metadata in UNDATED.items():
            file = io.BytesIO()
            canvas.savefig(file, format=suffix, metadata=metadata)
            files[suffix] = file.getvalue()
    return files


def _write_note(canvas: Any, note: str) -> None:
    """At the foot of a figure, or of a part of one."""
    if note:
        canvas.supxlabel(fill(note, 110), fontsize="small", x=0.02, ha="left")


def _mark(ticks: Any, axis: Axis, xs: Sequence[float]) -> None:
    """The numbers along an axis."""
    from matplotlib.ticker import (
        EngFormatter,
        FixedLocator,
        FuncFormatter,
        MaxNLocator,
        NullFormatter,
        NullLocator,
        PercentFormatter,
    )

    if axis.scale == "log2":
        ticks.set_major_locator(FixedLocator(xs))
        ticks.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"))
        ticks.set_minor_locator(NullLocator())
    elif axis.scale == "tight":
        ticks.set_major_locator(MaxNLocator(6))
        ticks.set_major_formatter(EngFormatter(axis.unit or ""))
        ticks.set_minor_locator(NullLocator())
    elif axis.scale == "share":
        ticks.set_major_formatter(PercentFormatter(1, decimals=0))
    elif axis.unit is not None:
        ticks.set_major_formatter(EngFormatter(axis.unit))
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
    ends = sorted(
        (((line.xs[-1], line.ys[-1]), line.name, " (paper)" * line.quoted) for line in lines),
        key=lambda end: (end[0][1], end[1]),
    )
    heights = spread([to_height(point)[1] for point, *_ in ends], LABEL_GAP)
    for (point, name, whose), height in zip(ends, heights, strict=True):
        colour = style_of(name)["color"]
        leader: dict[str, Any] = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "linestyle": ":"}
        leader |= {"shrinkA": 0, "shrinkB": 4, "relpos": (0, 0.5)}
        axes.annotate(
            name + whose,
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
