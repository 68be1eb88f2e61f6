"""Line charts as plain geometry, which the templates draw as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 44
POINTS = 300  # of a curve, at most
NOT_CURVES = frozenset({"step", "tokens", "epoch", "seconds"})
TITLES = {
    "loss": "Training loss (nats a token)",
    "ppl": "Perplexity a token",
    "word_ppl": "Perplexity a word",
    "accuracy": "Accuracy (%)",
    "lr": "Learning rate",
    "grad_norm": "Norm of the gradient",
}

Point = tuple[float, float]


class Curve(NamedTuple):
    """`path` is SVG's; `told` says in words where the curve begins and ends."""

    name: str
    path: str
    dots: Sequence[Point]
    told: str


class Tick(NamedTuple):
    at: float
    text: str


class Chart(NamedTuple):
    title: str
    curves: Sequence[Curve]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def charts_of(lines: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """A chart for each quantity that a run logged, over its steps; those of several splits share one."""
    groups: dict[str, dict[str, list[Point]]] = {}
    for line in lines:
        step = line.get("step")
        for name, value in line.items():
            if _is_number(step) and _is_number(value) and name not in NOT_CURVES:
                scale = 100 if name.endswith("accuracy") else 1
                groups.setdefault(_group(name), {}).setdefault(name, []).append((float(step or 0), value * scale))
    order = list(TITLES)
    known = sorted(groups, key=lambda name: (order.index(name) if name in order else len(order), name))
    return [_chart(TITLES.get(name, name), groups[name]) for name in known]


def _group(name: str) -> str:
    """`valid_ppl` and `test_ppl` are one quantity."""
    return next((end for end in ("word_ppl", "ppl", "accuracy") if name.endswith(end)), name)


def _chart(title: str, curves: Mapping[str, Sequence[Point]]) -> Chart:
    xs = [x for points in curves.values() for x, _ in points]
    ys = [y for points in curves.values() for _, y in points]
    logarithmic = title.startswith("Perplexity") and min(ys) > 0 and max(ys) / min(ys) > 3
    x_ticks, y_ticks = _ticks(0, max(xs)), (_log_ticks if logarithmic else _ticks)(min(ys), max(ys))
    low, high = min(*y_ticks, *ys), max(*y_ticks, *ys)

    def place_x(x: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * x / (max(xs) or 1), 1)

    def place_y(y: float) -> float:
        there = math.log(y / low) / (math.log(high / low) or 1) if logarithmic else (y - low) / ((high - low) or 1)
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * there, 1)

    drawn = []
    for name, points in curves.items():
        places = [(place_x(x), place_y(y)) for x, y in _thinned(points)]
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in places)
        (first, begin), (last, end) = points[0], points[-1]
        told = f"{name}: from {begin:.4g} at step {first:,.0f} to {end:.4g} at step {last:,.0f}"
        drawn.append(Curve(name, path, places if len(places) <= 30 else [], told))
    return Chart(
        title,
        drawn,
        [Tick(place_x(x), f"{x:,.0f}") for x in x_ticks if x <= max(xs)],
        [Tick(place_y(y), f"{y:g}") for y in y_ticks],
    )


def _thinned(points: Sequence[Point]) -> list[Point]:
    every = -(-len(points) // POINTS)
    return [*points[:-1:every], points[-1]]


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / wanted))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= wanted)
    first, last = math.floor(low / step), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10 ... from at most `low` to at least `high`."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    below, above = max(tick for tick in ticks if tick <= low), min(tick for tick in ticks if tick >= high)
    return [tick for tick in ticks if below <= tick <= above]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
