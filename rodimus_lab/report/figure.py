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

from rodimus_lab.config import did_you_mean
from rodimus_lab.errors import UserError
from rodimus_lab.records import Record, figures_root, load_records, write_atomic
from rodimus_lab.registry import Registry, load_plugins
from rodimus_lab.report.absent import NotRun, say_not_run
from rodimus_lab.report.caption import told_runs
from rodimus_lab.report.diagram import Diagram
from rodimus_lab.report.heat_map import HeatMap, wrap_title
from rodimus_lab.report.paper import PaperResults
from rodimus_lab.report.style import HOUSE, mark, shade_of, style_of
from rodimus_lab.report.table import check_name

# What the files would else say of when and by which version they were drawn.
UNDATED = {
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "png": {"Software": None},
}
PROVENANCE = ("corpus", "budget", "device")  # beside a measured point
BOUNDS = {"share": (0, 1), "score": (0, 100)}
MARGIN = 0.03  # beyond the points, as a part of an axis
NOTE_LETTERS = 14  # in an inch of a note
NOTE_LINES, NOTE_LINE = (
    4,
    0.125,
)  # Lines of a note that a figure has room for, and the inches that each further one adds.
LABEL_GAP = 0.042  # between the names at the right, as a part of the height


@dataclass(frozen=True)
class Line:
    """The points of one model. `sources` say point by point where each is from, and `runs` which runs stand behind it;
    `quoted` ones are the paper's, drawn pale and behind ours. `stds` are the standard deviations over seeds, 0 where
    there is one seed, drawn as bars. A line of no model has a `shade`, from 0 to 1, in place of a model's colour."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    sources: Sequence[str] = ()
    quoted: bool = False
    stds: Sequence[float] = ()
    runs: Sequence[Sequence[Record]] = ()
    shade: float | None = None

    @property
    def style(self) -> dict[str, Any]:
        """Colour and marker for matplotlib."""
        return style_of(self.name) if self.shade is None else shade_of(self.shade)

    def told(self) -> list[tuple[str, ...]]:
        """Point by point its source, and the corpora, budgets and devices of its runs."""
        sources = self.sources or ["; ".join(run.id for run in runs) for runs in self.runs] or [""] * len(self.xs)
        runs = self.runs or [()] * len(self.xs)
        return [(source, *_provenance(some)) for source, some in zip(sources, runs, strict=True)]


@dataclass(frozen=True)
class Axis:
    """On `log2` the points are marked, `tight` is logarithmic within about one decade, a `share` is from 0 to 1 and a
    `score` from 0 to 100.
    `unit` is written with the numbers, in thousands and millions. `also` is a second axis of the same points: its
    label, and what a value of this one is worth on it."""

    label: str
    scale: Literal["log2", "log", "tight", "linear", "share", "score"] = "log"
    unit: str | None = None
    also: tuple[str, float] | None = None

    @property
    def is_linear(self) -> bool:
        return self.scale in ("linear", *BOUNDS)


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


def tell_points(points: Iterable[tuple[str, float | None]], whole: Set[str] = frozenset()) -> str:
    """(name, x) in words, such as "a, b at 1, 2"; of those that are `whole`, or at no x, the name alone."""
    at: dict[str, list[str]] = {}
    for name, x in points:
        at.setdefault(name, []).extend([] if x is None else [f"{x:g}"])
    return ", ".join(f"{name} at {', '.join(xs)}" if xs and name not in whole else name for name, xs in at.items())


@dataclass(frozen=True)
class Figure:
    """Lines over two axes. `missing` are points that are not there: (name, x or None where it is not known),
    `unfinished` those of which only some runs are, `command` is what would run them; `remark` is what else has to be
    known, any corpus but `paper_corpus` a stand-in. Points with a band are not joined. Where there is no line at all it
    says "not run"."""

    title: str
    x: Axis
    y: Axis
    lines: Sequence[Line]
    missing: Sequence[tuple[str, float | None]] = ()
    unfinished: Sequence[tuple[str, float]] = ()
    size: tuple[float, float] = (7.5, 5.0)
    bands: Sequence[Band] = ()
    remark: str = ""
    command: str = ""
    paper_corpus: str | tuple[str, ...] | None = None

    @property
    def note(self) -> str:
        """What has to be known beside the lines: which are quoted, the runs behind the others with their conditions,
        what was not run, and the remark."""
        quoted = [line for line in self.lines if line.quoted]
        by_eye = ", read by eye" if any("by eye" in source for line in quoted for source in line.sources) else ""
        parts = [f"dashed and pale: the paper's{by_eye}"] if quoted else []
        told = told_runs((run for line in self.lines for some in line.runs for run in some), self.paper_corpus)
        parts += [told] if told else []
        parts += ["bars: one standard deviation over seeds"] if any(any(line.stds) for line in self.lines) else []
        parts += ["shaded: where the fitted law lies with 95 % confidence"] if self.bands else []
        begun = {line.name for line in self.lines if not line.quoted} | {name for name, _ in self.unfinished}
        absent = tell_points(self.missing, whole={name for name, _ in self.missing} - begun)
        parts += [f"not run: {absent}{f' ({self.command})' if self.command else ''}"] if absent else []
        if self.unfinished:
            how = f" ({self.command})" if self.command and not absent else ""
            parts += [f"not drawn before all its runs are there: {tell_points(self.unfinished)}{how}"]
        return "; ".join([*parts, *([self.remark] if self.remark else [])])

    def rows(self) -> list[tuple[Any, ...]]:
        """The points below their header, with source, corpus, budget and device where there are any; one that is
        missing has no y. Fitted laws follow, with their limits in two more columns."""
        header: tuple[str, ...] = ("name", self.x.label, self.y.label, "source", *PROVENANCE)
        rows: list[tuple[Any, ...]] = [
            (line.name, x, y, *told)
            for line in self.lines
            for x, y, told in zip(line.xs, line.ys, line.told(), strict=True)
        ]
        rows += [(name, "" if x is None else x, "", "not run", "", "", "") for name, x in self.missing]
        rows += [(name, x, "", "some runs are missing", "", "", "") for name, x in self.unfinished]
        used = max((index for row in rows for index, value in enumerate(row) if value != ""), default=3) + 1
        header, rows = header[: max(3, used)], [row[: max(3, used)] for row in rows]
        if not self.bands:
            return [header, *rows]
        source = ("fit", "", "", "")[: len(header) - 3]
        laws = [row for band in self.bands for row in band.rows(source)]
        return [(*header, "low", "high"), *((*row, "", "") for row in rows), *laws]

    def paint(self, canvas: Any, noted: bool = True) -> None:
        """Draw into a matplotlib figure or a part of one; `noted` with the note below."""
        axes = canvas.add_subplot(title=wrap_title(self.title, self.size[0]))
        xs = sorted({x for line in self.lines for x in line.xs} | {x for _, x in self.missing if x is not None})
        if noted:
            _write_note(canvas, self.note, self.size[0])
        for axis, ticks, set_scale in ((self.x, axes.xaxis, axes.set_xscale), (self.y, axes.yaxis, axes.set_yscale)):
            set_scale("linear" if axis.is_linear else "log")
            ticks.set_label_text(axis.label)
        if not self.lines:
            say_not_run(axes, self.command, said="some runs are missing" if self.unfinished else "not run")
            return
        fitted = {band.name for band in self.bands}
        for line in self.lines:
            pale: dict[str, Any] = {"alpha": 0.4, "linestyle": "--", "zorder": 1.9} if line.quoted else {}
            loose = {"linestyle": "none"} if not pale and line.name in fitted else {}
            axes.plot(line.xs, line.ys, **line.style, **pale, **loose, clip_on=False)
            several = (
                [point for point in zip(line.xs, line.ys, line.stds, strict=True) if point[2]] if line.stds else []
            )
            if several:
                bars: dict[str, Any] = {"ecolor": line.style["color"], "elinewidth": 0.8, "capsize": 2.5}
                xs_of, ys_of, stds = zip(*several, strict=True)
                axes.errorbar(xs_of, ys_of, yerr=stds, fmt="none", **bars)
        for band in self.bands:
            band.paint(axes)
        axes.set_xlim(*_around(xs, linear=self.x.is_linear))
        if self.y.scale in BOUNDS:
            axes.set_ylim(*BOUNDS[self.y.scale])
        for axis, ticks in ((self.x, axes.xaxis), (self.y, axes.yaxis)):
            mark(ticks, axis.scale, axis.unit, xs)
        if self.x.also is not None:
            label, worth = self.x.also
            above = axes.secondary_xaxis("top", functions=(lambda x: x * worth, lambda x: x / worth))
            above.set_xlabel(label)
            mark(above.xaxis, self.x.scale, None, [x * worth for x in xs])
        ours = {line.name for line in self.lines if not line.quoted}
        _name_lines(axes, [line for line in self.lines if not line.quoted or line.name not in ours])


@dataclass(frozen=True)
class Panels:
    """Figures, heat maps or diagrams, so many in a row; their numbers have the same columns but for the names of the
    axes, and for those that only some have, which come last. `remark` is what has to be known beside all of them;
    `runs` stand behind every part."""

    title: str
    parts: Sequence[Figure | HeatMap | Diagram]
    columns: int = 2
    remark: str = ""
    runs: Sequence[Record] = ()
    paper_corpus: str | tuple[str, ...] | None = None

    @property
    def note(self) -> str:
        """What all parts would say alike, the runs behind all of them with their conditions, and the remark."""
        return "; ".join(filter(None, [self._alike, told_runs(self.runs, self.paper_corpus), self.remark]))

    @property
    def _alike(self) -> str:
        """The note of the parts where it is the same for all."""
        notes = {part.note if isinstance(part, Figure) else "" for part in self.parts}
        return notes.pop() if len(notes) == 1 else ""

    @property
    def size(self) -> tuple[float, float]:
        """As wide and high as its parts."""
        down = -(-len(self.parts) // self.columns)
        across = min(self.columns, len(self.parts))
        return across * max(part.size[0] for part in self.parts), down * max(part.size[1] for part in self.parts)

    def rows(self) -> list[tuple[Any, ...]]:
        """The numbers of all parts below one header."""
        header = max((part.rows()[0] for part in self.parts), key=len)
        rows = [(part.title, *row, *[""] * (len(header) - len(row))) for part in self.parts for row in part.rows()[1:]]
        names = ("source", *PROVENANCE) if self.runs else ()
        told = [_joined(run.id for run in self.runs), *_provenance(self.runs)] if self.runs else []
        return [("panel", *header, *names), *((*row, *told) for row in rows)]

    def paint(self, canvas: Any) -> None:
        """Draw into a matplotlib figure."""
        canvas.suptitle(wrap_title(self.title, self.size[0]))
        across = min(self.columns, len(self.parts))
        pieces = canvas.subfigures(-(-len(self.parts) // across), across, squeeze=False)
        for part, piece in zip(self.parts, pieces.flat, strict=False):
            if isinstance(part, Figure):
                part.paint(piece, noted=not self._alike)
            else:
                part.paint(piece)
        _write_note(canvas, self.note, self.size[0])


Drawing: TypeAlias = Figure | HeatMap | Diagram | Panels | NotRun
MakeFigure: TypeAlias = Callable[[Sequence[Record], PaperResults], Drawing | Mapping[str, Drawing]]
FIGURES: Registry[MakeFigure] = Registry("figure")


def write_figures(out_dir: Path | str | None = None, names: Iterable[str] | None = None) -> list[Path]:
    """Draw registered figures, by default all, from all records, by default beside them; returns the files' paths. One
    of several that are registered under one name goes by its file's: `figure06-rates-128`."""
    load_plugins()
    records, paper = load_records(), PaperResults()
    asked = FIGURES if names is None else names
    drawings = {file: one for name in asked for file, one in _drawings(name, records, paper).items()}
    folder = figures_root() if out_dir is None else out_dir
    return [path for file, drawing in drawings.items() for path in write_figure(drawing, folder, file)]


def _drawings(name: str, records: Sequence[Record], paper: PaperResults) -> dict[str, Drawing]:
    """What goes by a name, by the names of the files. Raises `UserError` where nothing does."""
    several = next((known for known in FIGURES if name.startswith(f"{known}-")), "")
    if name in FIGURES or not several:
        name = FIGURES.canonical(name)
        return by_name(name, FIGURES[name](records, paper))
    made = by_name(several, FIGURES[several](records, paper))
    if name not in made:
        raise UserError(f"there is no figure named {name!r}{did_you_mean(name, [*FIGURES, *made])}")
    return {name: made[name]}


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
        canvas = Canvas(figsize=_with_room(figure), layout="constrained")
        figure.paint(canvas)
        for suffix, metadata in UNDATED.items():
            file = io.BytesIO()
            canvas.savefig(file, format=suffix, metadata=metadata)
            files[suffix] = file.getvalue()
    return files


def _with_room(figure: Drawing) -> tuple[float, float]:
    """Its size, higher where its note is long, so that the axes keep theirs and the names beside them do not meet."""
    width, height = figure.size
    note = figure.note if isinstance(figure, Figure | Panels) else ""
    return width, height + NOTE_LINE * max(0, _filled(note, width).count("\n") + 1 - NOTE_LINES)


def _write_note(canvas: Any, note: str, inches: float) -> None:
    """At the foot of a figure, or of a part of one, so many inches wide."""
    if note:
        canvas.supxlabel(_filled(note, inches), fontsize="small", x=0.02, ha="left")


def _filled(note: str, inches: float) -> str:
    return fill(note, int(NOTE_LETTERS * inches))


def _provenance(runs: Sequence[Record]) -> list[str]:
    """The columns of `PROVENANCE`."""
    told = ((run.corpus, run.budget_text, run.device) for run in runs)
    return [*map(_joined, zip(*told, strict=True))] or [""] * len(PROVENANCE)


def _joined(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts))


def _around(xs: Sequence[float], *, linear: bool) -> tuple[float, float]:
    """Limits a little wider than the points, whose markers would else lie on the axis."""
    low, high = xs[0], xs[-1]
    if linear:
        room = MARGIN * ((high - low) or abs(high) or 1)
        return low - room, high + room
    room = max((high / low) ** MARGIN, 1.1)
    return low / room, high * room


def _name_lines(axes: Any, lines: Sequence[Line]) -> None:
    """Write each line's name at the right, in its colour and near its end."""
    axes.autoscale_view()  # The limits are otherwise found only when it is drawn.
    to_height = (axes.transData + axes.transAxes.inverted()).transform
    ends = sorted(lines, key=lambda line: (line.ys[-1], line.name))
    heights = spread([to_height((line.xs[-1], line.ys[-1]))[1] for line in ends], LABEL_GAP)
    for line, height in zip(ends, heights, strict=True):
        colour = line.style["color"]
        leader: dict[str, Any] = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "linestyle": ":"}
        leader |= {"shrinkA": 0, "shrinkB": 4, "relpos": (0, 0.5)}
        axes.annotate(
            line.name + " (paper)" * line.quoted,
            (line.xs[-1], line.ys[-1]),
            (1.07, height),
            textcoords="axes fraction",
            va="center",
            color=colour,
            arrowprops=leader,
            zorder=1.5,
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
