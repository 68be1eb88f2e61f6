"""Curves of what runs logged, in the house style, for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rodimus_lab.errors import UserError
from rodimus_lab.report.style import HOUSE, style_of


def draw_curves(curves: Sequence[tuple[str, Any]], label: str) -> Any:
    """A matplotlib figure of frames with the columns `step` and `label`, each named after its model."""
    try:
        from matplotlib import style
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        raise UserError("figures need matplotlib; install it with: pip install -e '.[figures]'") from None
    with style.context(["default", HOUSE]):
        canvas = Canvas(figsize=(7.5, 4.0), layout="constrained")
        axes = canvas.add_subplot(xlabel="step", ylabel=label)
        for name, lines in curves:
            drawn = style_of(name) | {"markevery": max(1, len(lines) // 12)}
            axes.plot(lines["step"], lines[label], label=name, **drawn)
        axes.legend(frameon=False)
    return canvas
