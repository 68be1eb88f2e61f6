"""The house style of figures: one colour and marker a model, the same in every figure, and the numbers along axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from zlib import crc32

from rodimus_lab.registry import plain_spelling

# Okabe and Ito's colours, which the colour-blind tell apart; without yellow, which is faint on white. One a family, and
# in it a marker a model; families begin with different ones, for where their models have the same value.
FAMILIES = {
    "#0072B2": ("rodimus", "rodimus+"),
    "#D55E00": ("transformer", "transformer++", "transformer++-swa", "llama3", "streaming_llm", "pythia"),
    "#009E73": ("linear_attention", "gla", "gla-table1", "retnet", "gretnet", "hgrn2", "gated_deltanet", "kda"),
    "#000000": ("s4d", "mamba", "mamba2", "mamba3", "samba"),
    "#CC79A7": ("rwkv4", "rwkv6", "rwkv7"),
    "#E69F00": ("hgrn", "hawk", "griffin"),
}
OTHERS = "#56B4E9"
PLAIN = 1e4  # below which the numbers of a logarithmic axis are no powers
DECADES = 2.5  # within which 2 and 5 stand on a logarithmic axis beside 1
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


def model_of(name: str) -> str:
    """The model that a name begins with, as in `Rodimus+-1.6B` or the run id `rodimus_plus-b6357da5`; else the name."""
    plain = plain_spelling(name.lower())
    known = (model for names in FAMILIES.values() for model in names if plain == model or plain.startswith(f"{model}-"))
    return max(known, key=len, default=name)


def style_of(name: str) -> dict[str, Any]:
    """Colour and marker of a model, in every figure the same. Markers are hollow, so that one on another is seen."""
    name = model_of(name)
    styles = {
        model: (colour, family + place)
        for family, (colour, names) in enumerate(FAMILIES.items())
        for place, model in enumerate(names)
    }
    colour, number = styles.get(name, (OTHERS, crc32(name.encode())))
    return {"color": colour, "marker": MARKERS[number % len(MARKERS)], "markerfacecolor": "none"}


def shade_of(share: float) -> dict[str, Any]:
    """The colour of a parameter's value, from 0 (dark) to 1 (bright), for lines that are no models."""
    from matplotlib import colormaps

    return {"color": colormaps["viridis"](0.8 * share)}


def mark(ticks: Any, scale: str, unit: str | None, xs: Sequence[float]) -> None:
    """The numbers along an axis of one of the scales of `Axis`, on which points stand at the rising `xs`."""
    from matplotlib.ticker import (
        EngFormatter,
        FixedLocator,
        FuncFormatter,
        LogLocator,
        MaxNLocator,
        NullFormatter,
        NullLocator,
        PercentFormatter,
    )

    if scale == "log2":
        ticks.set_major_locator(FixedLocator(xs))
        ticks.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"))
        ticks.set_minor_locator(NullLocator())
    elif scale == "tight":
        ticks.set_major_locator(MaxNLocator(6))
        ticks.set_major_formatter(EngFormatter(unit or ""))
        ticks.set_minor_locator(NullLocator())
    elif scale == "share":
        ticks.set_major_formatter(PercentFormatter(1, decimals=0))
    elif unit is not None:
        ticks.set_major_formatter(EngFormatter(unit))
        ticks.set_minor_formatter(NullFormatter())
    elif scale == "log" and xs[-1] < PLAIN:
        ticks.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        ticks.set_minor_formatter(NullFormatter())
    low, high = ticks.get_view_interval()
    if scale == "log" and (unit is not None or xs[-1] < PLAIN) and math.log10(high / low) < DECADES:
        ticks.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
