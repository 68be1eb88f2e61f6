"""The gates and their temperature: Figure 7 from the formulas alone, Figure 8 of a trained layer over a sentence.

`rodimus-lab gates RUN --text ...` draws the maps of Figure 8; they are of whichever run and text it is given, and so
stand among no committed figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from rodimus_lab.command import command
from rodimus_lab.convert import open_checkpoint
from rodimus_lab.errors import UserError
from rodimus_lab.gates import heat_maps, layer_gates
from rodimus_lab.records import Record, runs_root
from rodimus_lab.report import FIGURES, Axis, Figure, Line, Panels, PaperResults, write_figure

TEMPERATURES = (0.1, 0.25, 0.5, 0.75, 1.0)
SELECTIONS = (0.01, 0.1, 0.5, 1.0, 2.0)
G = [0.01 * 10 ** (step / 10) for step in range(26)]  # 0.01 to 3.2
PANEL = (5.5, 4.0)
TAU = [step / 20 for step in range(21)]


@FIGURES.register("figure07")
def figure_7(records: Sequence[Record], paper: PaperResults) -> Panels:
    """Both gates over g at several tau, and over tau at several g."""
    gates: dict[str, Callable[[float, float], float]] = {
        "exp(-g tau)": lambda g, tau: math.exp(-g * tau),
        "g^tau": lambda g, tau: g**tau,
    }
    parts = []
    for name, gate in gates.items():
        over_g = [Line(f"tau = {tau:g}", G, [_short(gate(g, tau)) for g in G]) for tau in TEMPERATURES]
        over_tau = [Line(f"g = {g:g}", TAU, [_short(gate(g, tau)) for tau in TAU]) for g in SELECTIONS]
        parts.append(Figure(f"{name} over g", Axis("g"), Axis(name, "linear"), _plain(over_g), size=PANEL))
        parts.append(
            Figure(f"{name} over tau", Axis("tau", "linear"), Axis(name, "linear"), _plain(over_tau), size=PANEL)
        )
    return Panels("The gates and their temperature (Figure 7)", parts)


def _plain(lines: Sequence[Line]) -> list[Line]:
    return [Line(line.name, [_short(x) for x in line.xs], line.ys) for line in lines]


def _short(value: float) -> float:
    return float(f"{value:.6g}")


@command("gates", panel="Models")
def gates(
    run: Annotated[str, typer.Argument(help="A run of rodimus or rodimus+: its id, or a folder with its weights.")],
    text: Annotated[str, typer.Option(help="The sentence to read.")],
    layer: Annotated[int | None, typer.Option(help="Counted from 1. Default: the middle one.")] = None,
    beside: Annotated[str | None, typer.Option(help="A run without tau, for the maps of g and exp(-g).")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write to. Default: results/gates.")] = None,
) -> None:
    """Draw the gates of a trained layer over a sentence, with and without the temperature (Figure 8)."""
    checkpoint = open_checkpoint(run)
    tokenizer, name = checkpoint.tokenizer(), Path(run).name
    ids = tokenizer.encode(text)
    own = layer_gates(checkpoint.build(), ids, layer, run=name)
    plain = None
    if beside is not None:
        other = open_checkpoint(beside)
        if other.tokenizer().fingerprint != tokenizer.fingerprint:
            raise UserError(f"{beside} reads other tokens than {run}; give runs of one tokenizer")
        plain = layer_gates(other.build(), ids, layer, run=Path(beside).name)
        if plain.tau_Tn is not None:
            raise UserError(f"{beside} has the gate tau; give a run without it, such as one of ablate --gate tau")
    tokens = [tokenizer.decode([token]) for token in ids]
    said = f"layer {'in the middle' if layer is None else layer}"
    paths = write_figure(heat_maps(own, plain, tokens, said), out or runs_root().parent / "gates", name)
    print(f"written: {', '.join(map(str, paths))}")
