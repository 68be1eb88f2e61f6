"""Heat maps, as parts of figures (`figure.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from textwrap import fill
from typing import Any

SCORES = ("#D55E00", "#F0E442", "#009E73")  # Of 0, 50 and 100, and told apart by the colour-blind.
MARKS = 10  # Rows that are named, about.
TITLE_LETTERS = 10  # In an inch of a title, at most.


def wrap_title(title: str, inches: float) -> str:
    """The title in lines that fit into so many inches."""
    return fill(title, max(1, int(TITLE_LETTERS * inches)))


@dataclass(frozen=True)
class HeatMap:
    """`values[row][column]`, one row for each of `ys` from the top down, and in it one for each of `xs`: names, or
    lengths in tokens. None is a cell without a value, which is hatched. `scores` are from 0 to 100, and over them
    runs the mean of every column."""

    title: str
    x_label: str
    y_label: str
    xs: Sequence[str] | Sequence[int]
    ys: Sequence[float]
    values: Sequence[Sequence[float | None]]
    scores: bool = False
    size: tuple[float, float] = (7.5, 5.0)

    def rows(self) -> list[tuple[Any, ...]]:
        """The cells below their header; columns are counted too, for their names may repeat."""
        cells = zip(self.ys, self.values, strict=True)
        points = [(column, self.xs[column], y, value) for y, row in cells for column, value in enumerate(row)]
        return [("column", self.x_label, self.y_label, "value"), *points]

    def means(self) -> list[float | None]:
        """The mean of every column's values, None where it has none."""
        columns = ([row[index] for row in self.values] for index in range(len(self.xs)))
        there = ([value for value in column if value is not None] for column in columns)
        return [fmean(values) if values else None for values in there]

    def paint(self, canvas: Any) -> None:
        """Draw into a matplotlib figure or a part of one."""
        from matplotlib.colors import LinearSegmentedColormap

        title = wrap_title(self.title, self.size[0] - 1.5)  # Less what stands at both sides of the axes.
        axes = canvas.add_subplot(title=title, xlabel=self.x_label, ylabel=self.y_label, facecolor="white")
        axes.patch.set(hatch="////", edgecolor="#BBBBBB")
        style: dict[str, Any] = {"cmap": "viridis"}
        if self.scores:
            colours = LinearSegmentedColormap.from_list("scores", SCORES)
            style = {"cmap": colours, "vmin": 0, "vmax": 100, "edgecolors": "white", "linewidth": 0.3}
        numbers = [[float("nan") if value is None else value for value in row] for row in self.values]
        mesh = axes.pcolormesh(numbers, rasterized=not self.scores, **style)
        axes.invert_yaxis()
        axes.grid(False)
        self._mark(axes)
        canvas.colorbar(mesh, ax=axes, fraction=0.04, pad=0.01, aspect=40)
        if self.scores:
            self._draw_means(axes.twinx())

    def _mark(self, axes: Any) -> None:
        places = [index + 0.5 for index in range(len(self.xs))]
        # A dollar sign would begin a formula.
        names = [x.replace("$", r"\$") if isinstance(x, str) else _short(x) for x in self.xs]
        axes.set_xticks(places, names)
        if any(isinstance(x, str) for x in self.xs):
            axes.tick_params(axis="x", labelsize=6, labelrotation=90)
        shown = range(0, len(self.ys), max(1, len(self.ys) // MARKS))
        axes.set_yticks([index + 0.5 for index in shown], [f"{self.ys[index]:g}" for index in shown])

    def _draw_means(self, over: Any) -> None:
        """0 at the bottom and 100 at the top."""
        over.set(ylim=(0, 100), yticks=[])
        over.grid(False)
        points = [(index + 0.5, mean) for index, mean in enumerate(self.means()) if mean is not None]
        over.plot([x for x, _ in points], [mean for _, mean in points], color="white", marker="o", clip_on=False)
        for x, mean in points:
            over.annotate(f"{mean:.1f}", (x, mean), (0, 5), textcoords="offset points", ha="center", fontsize=7)


def _short(length: int) -> str:
    return f"{length / 1000:g}k" if length >= 1000 else str(length)
