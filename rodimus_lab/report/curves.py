"""Curves of what runs logged, in the house style, for notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rodimus_lab.errors import UserError
from rodimus_lab.report.heat_map import wrap_title
from rodimus_lab.report.style import HOUSE, style_of

PANEL, KEY = (5.0, 3.4), 2.0  # inches


def draw_curves(panels: Mapping[str, Sequence[tuple[str, Any]]], label: str) -> Any:
    """A matplotlib figure of one panel for each title. Its curves are frames with the columns `step` and `label`, each
    named after its model, which the key has once, with the number of its curves where it has several."""
    try:
        from matplotlib import style
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        raise UserError("figures need matplotlib; install it with: pip install -e '.[figures]'") from None
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    with style.context(["default", HOUSE]):
        canvas = Canvas(figsize=(across * (PANEL[0] + KEY), down * PANEL[1]), layout="constrained")
        for number, (title, curves) in enumerate(panels.items(), 1):
            axes = canvas.add_subplot(down, across, number, xlabel="step", ylabel=label)
            axes.set_title(wrap_title(title, PANEL[0]))
            names = [name for name, _ in curves]
            for index, (name, lines) in enumerate(curves):
                drawn = style_of(name) | {"markevery": max(1, len(lines) // 12)}
                told = f"{name}, {names.count(name)} runs" if names.count(name) > 1 else name
                axes.plot(lines["step"], lines[label], label=f"_{told}" if name in names[:index] else told, **drawn)
            axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return canvas
