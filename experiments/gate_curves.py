"""Figure 7: how the temperature tau bends the decay exp(-g tau) and the input gate g^tau, from the formulas alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rodimus_lab.records import Record
from rodimus_lab.report import FIGURES, Axis, Figure, Line, Panels, PaperResults

TEMPERATURES = (0.1, 0.25, 0.5, 0.75, 1.0)
SELECTIONS = (0.01, 0.1, 0.5, 1.0, 2.0)
G = [0.01 * 10 ** (step / 10) for step in range(26)]  # 0.01 to 3.2
TAU = [step / 20 for step in range(21)]


@FIGURES.register("figure7")
def figure7(records: Sequence[Record], paper: PaperResults) -> Panels:
    """Both gates over g at several tau, and over tau at several g."""
    gates: dict[str, Callable[[float, float], float]] = {
        "exp(-g tau)": lambda g, tau: math.exp(-g * tau),
        "g^tau": lambda g, tau: g**tau,
    }
    parts = []
    for name, gate in gates.items():
        over_g = [Line(f"tau = {tau:g}", G, [_short(gate(g, tau)) for g in G]) for tau in TEMPERATURES]
        over_tau = [Line(f"g = {g:g}", TAU, [_short(gate(g, tau)) for tau in TAU]) for g in SELECTIONS]
        parts.append(Figure(f"{name} over g", Axis("g"), Axis(name, "linear"), _plain(over_g)))
        parts.append(Figure(f"{name} over tau", Axis("tau", "linear"), Axis(name, "linear"), _plain(over_tau)))
    return Panels("The gates and their temperature (Figure 7)", parts, size=(11.0, 8.0))


def _plain(lines: Sequence[Line]) -> list[Line]:
    return [Line(line.name, [_short(x) for x in line.xs], line.ys) for line in lines]


def _short(value: float) -> float:
    return float(f"{value:.6g}")
