"""Figures: named lines, drawn as SVG, PDF and PNG with their numbers beside them as CSV, byte for byte reproducible.

A function that makes one is registered under its name, `@FIGURES.register("state_bytes")`. A model has the same colour
and marker in every figure.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
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
class Figure:
    """Lines over x in powers of two; `unit` is that of y, which goes up in powers or, a share, from 0 to 1.

    `missing` are points that are not there: (name, x).
    """

    title: str
    x_label: str
    y_label: str
    unit: str
    lines: Sequence[Line]
    y_scale: Literal["log", "share"] = "log"
    missing: Sequence[tuple[str, float]] = ()

    @property
    def note(self) -> str:
        """What has to be known beside the lines: which are quoted, and what was not run."""
        parts = ["dashed and pale: the paper's"] if any(line.quoted for line in self.lines) else []
        absent: dict[str, list[str]] = {}
        for name, x in self.missing:
            absent.setdefault(name, []).append(f"{x:g}")
        whole = {name for name in absent if name not in {line.name for line in self.lines if not line.quoted}}
        told = [name if name in whole else f"{name} at {', '.join(xs)}" for name, xs in absent.items()]
        return "; ".join(parts + ([f"not run: {', '.join(told)}"] if told else []))


MakeFigure: TypeAlias = Callable[[Sequence[Record], PaperResults], Figure]
FIGURES: Registry[MakeFigure] = Registry("figure")


def write_figures(out_dir: Path | str = PROJECT_ROOT / "results" / "figures") -> list[Path]:
    """Draw every registered figure from all records; returns the files' paths."""
    load_plugins()
    records, paper = load_records(), PaperResults()
    return [path for name in FIGURES for path in write_figure(FIGURES[name](records, paper), out_dir, name)]


def write_figure(figure: Figure, out_dir: Path | str, name: str) -> list[Path]:
    """Write `name.svg`, `name.pdf`, `name.png` and `name.csv` into `out_dir`; returns their paths."""
    check_name(name)
    drawn = draw(figure, name) | {"csv": figure_csv(figure).encode()}
    paths = [Path(out_dir) / f"{name}.{suffix}" for suffix in drawn]
    for path, content in zip(paths, drawn.values(), strict=True):
        write_atomic(path, content)
    return paths


def figure_csv(figure: Figure) -> str:
    """A row for every point, with its source where the figure gives any; one that is missing has no y."""
    text = io.StringIO()
    header: tuple[str, ...] = ("name", figure.x_label, figure.y_label)
    rows: list[tuple[Any, ...]] = [
        (line.name, x, y) for line in figure.lines for x, y in zip(line.xs, line.ys, strict=True)
    ]
    if figure.missing or any(line.sources for line in figure.lines):
        header += ("source",)
        sources = [source for line in figure.lines for source in line.sources or [""] * len(line.xs)]
        rows = [(*row, source) for row, source in zip(rows, sources, strict=True)]
        rows += [(name, x, "", "not run") for name, x in figure.missing]
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def draw(figure: Figure, salt: str) -> dict[str, bytes]:
    """The figure as SVG, PDF and PNG. Raises `UserError` where matplotlib is not installed."""
    try:
        from matplotlib import style
        from matplotlib.figure import Figure as Canvas
        from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, NullLocator, PercentFormatter
    except ImportError:
        raise UserError("figures need matplotlib; install it with: pip install -e '.[figures]'") from None
    files = {}
    with style.context(["default", HOUSE | {"svg.hashsalt": salt}]):
        canvas = Canvas(figsize=(7.5, 5.0), layout="constrained")
        axes = canvas.add_subplot(
            xscale="log", yscale="log" if figure.y_scale == "log" else "linear", title=figure.title
        )
        axes.set(xlabel=figure.x_label, ylabel=figure.y_label)
        for line in figure.lines:
            pale: dict[str, Any] = {"alpha": 0.4, "linestyle": "--", "zorder": 1.9} if line.quoted else {}
            axes.plot(line.xs, line.ys, **style_of(line.name), **pale, clip_on=False)
            if any(line.stds):
                low, high = ([y + sign * std for y, std in zip(line.ys, line.stds, strict=True)] for sign in (-1, 1))
                axes.fill_between(line.xs, low, high, color=style_of(line.name)["color"], alpha=0.15, linewidth=0)
        xs = {x for line in figure.lines for x in line.xs} | {x for _, x in figure.missing}
        axes.set_xlim(*((min(xs), max(xs)) if figure.missing else (None, None)))
        axes.xaxis.set_major_locator(FixedLocator(sorted(xs)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        if figure.y_scale == "share":
            axes.set_ylim(0, 1)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        else:
            axes.yaxis.set_major_formatter(EngFormatter(figure.unit))
        ours = {line.name for line in figure.lines if not line.quoted}
        _name_lines(axes, [line for line in figure.lines if not line.quoted or line.name not in ours])
        if figure.note:
            canvas.supxlabel(fill(figure.note, 110), fontsize="small", x=0.02, ha="left")
        for suffix, metadata in UNDATED.items():
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
    ends = sorted(
        (((line.xs[-1], line.ys[-1]), line.name, " (paper)" * line.quoted) for line in lines),
        key=lambda end: (end[0][1], end[1]),
    )
    heights = spread([to_height(point)[1] for point, *_ in ends], LABEL_GAP)
    for (point, name, whose), height in zip(ends, heights, strict=True):
        colour = style_of(name)["color"]
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 4, "relpos": (0, 0.5)}
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
