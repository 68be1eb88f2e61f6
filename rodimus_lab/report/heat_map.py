"""Heat maps, as parts of figures (`figure.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class HeatMap:
    """`values[row][column]`, one row for each of `ys` from the top down, and in it one for each of `xs`."""

    title: str
    x_label: str
    y_label: str
    xs: Sequence[str]
    ys: Sequence[float]
    values: Sequence[Sequence[float]]
    size: tuple[float, float] = (7.5, 5.0)

    def rows(self) -> list[tuple[Any, ...]]:
        """The cells below their header; columns are counted too, for their names may repeat."""
        cells = zip(self.ys, self.values, strict=True)
        points = [(column, self.xs[column], y, value) for y, row in cells for column, value in enumerate(row)]
        return [("column", self.x_label, self.y_label, "value"), *points]

    def paint(self, canvas: Any) -> None:
        """Draw into a matplotlib figure or a part of one."""
        axes = canvas.add_subplot(title=self.title, xlabel=self.x_label, ylabel=self.y_label)
        image = axes.imshow(self.values, aspect="auto", cmap="viridis", interpolation="nearest", rasterized=True)
        axes.grid(False)
        # A dollar sign would begin a formula.
        axes.set_xticks(range(len(self.xs)), [name.replace("$", r"\$") for name in self.xs], rotation=90)
        axes.tick_params(axis="x", labelsize=6)
        canvas.colorbar(image, ax=axes)
