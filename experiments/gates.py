"""The gates and their temperature: Figure 7 from the formulas alone, Figure 8 of a trained layer over a sentence.

`rodimus-lab gates RUN --text ...` draws the maps of whichever run and text it is given; with `--record` it keeps them
as a record of the experiment `gates`, and Figure 8 is drawn of the newest of these, one with a run beside it first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from rodimus_lab.command import command
from rodimus_lab.convert import open_checkpoint
from rodimus_lab.convert.provenance import Provenance, provenance
from rodimus_lab.errors import UserError
from rodimus_lab.gates import TITLE, Reading, heat_maps, layer_gates, read_gates, rodimus_layers, write_gates
from rodimus_lab.records import (
    FROM_FOLDER,
    Record,
    RunDir,
    describe_budget,
    environment,
    load_records,
    runs_root,
)
from rodimus_lab.report import (
    FIGURES,
    Axis,
    Drawing,
    Figure,
    Line,
    NotRun,
    Panels,
    PaperResults,
    told_runs,
    write_figure,
)

EXPERIMENT, PAPER_CORPUS, DEVICE = "gates", "wikitext-103", "cpu"
TEMPERATURES = (0.1, 0.25, 0.5, 0.75, 1.0)
SELECTIONS = (0.01, 0.1, 0.5, 1.0, 2.0)
G = [0.01 * 10 ** (step / 10) for step in range(26)]  # 0.01 to 3.2
COMMAND = "rodimus-lab gates RUN --text TEXT --record"
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
        over_g = [(f"tau = {tau:g}", G, [gate(g, tau) for g in G]) for tau in TEMPERATURES]
        over_tau = [(f"g = {g:g}", TAU, [gate(g, tau) for tau in TAU]) for g in SELECTIONS]
        y = Axis(name, "linear")
        parts.append(Figure(f"{name} over g", Axis("g"), y, _curves(over_g), size=PANEL))
        parts.append(Figure(f"{name} over tau", Axis("tau", "linear"), y, _curves(over_tau), size=PANEL))
    return Panels("Figure 7. The gates and their temperature", parts, remark="computed from the formulas, of no run")


def _curves(named: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> list[Line]:
    """A curve for each value of a parameter, the least of them the darkest."""
    return [
        Line(name, [*map(_short, xs)], [*map(_short, ys)], ["computed"] * len(xs), shade=index / (len(named) - 1))
        for index, (name, xs, ys) in enumerate(named)
    ]


def _short(value: float) -> float:
    return float(f"{value:.6g}")


@FIGURES.register("figure08")
def figure_8(records: Sequence[Record], paper: PaperResults) -> Drawing:
    """The gates of a trained layer over a sentence, with and without tau."""
    own = [record for record in records if record.experiment == EXPERIMENT]
    if not own:
        return NotRun(TITLE, COMMAND, "It needs a trained run of Rodimus, such as one of Table 1.")
    record = max(own, key=lambda one: (one.recipe["beside"] is not None, one.finished, one.id))
    maps = heat_maps(read_gates(record.path), _note(record.recipe, records))
    return replace(maps, runs=[record], paper_corpus=PAPER_CORPUS)


def _note(recipe: Mapping[str, Any], records: Sequence[Record]) -> str:
    """What a figure's maps are of: runs, corpora, budgets, devices, layer and tokens; `records` may hold the runs."""
    beside = recipe["beside"]
    without = (
        f"{_told(beside, records)}, trained without tau" if beside else "the same run read without its temperature"
    )
    layer = f"Rodimus layer {recipe['layer']} of {recipe['layers']}"
    read = f"tokens of {recipe['tokenizer']['name']}, read on {recipe['device']}"
    return f"g^tau and exp(-g tau): {_told(recipe['model'], records)}; g and exp(-g): {without}; {layer}; {read}"


def _told(run: Mapping[str, Any], records: Sequence[Record]) -> str:
    for record in records:
        if f"{record.experiment}/{record.id}" == run["name"]:
            return told_runs([record], PAPER_CORPUS)
    stand_in = "" if run["corpus"] in (PAPER_CORPUS, FROM_FOLDER) else f" standing in for {PAPER_CORPUS}"
    return f"{run['name']} ({run['corpus']}{stand_in}, {describe_budget(run['budget'])})"


@command("gates", panel="Models")
def gates(
    run: Annotated[str, typer.Argument(help="A run of rodimus or rodimus+: its id, or a folder with its weights.")],
    text: Annotated[str, typer.Option(help="The sentence to read.")],
    layer: Annotated[int | None, typer.Option(min=1, help="Counted from 1. Default: the middle one.")] = None,
    beside: Annotated[str | None, typer.Option(help="A run without tau, for the maps of g and exp(-g).")] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Keep a run record too, of which make figures draws Figure 8.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The folder to write to. Default: results/gates.")] = None,
) -> None:
    """Draw the gates of a trained layer over a sentence, with and without the temperature (Figure 8)."""
    checkpoint = open_checkpoint(run)
    tokenizer, origin = checkpoint.tokenizer(), provenance(checkpoint)
    ids = tokenizer.encode(text)
    model = checkpoint.build(device=DEVICE)
    layers = len(rodimus_layers(model))
    layer = layer or (layers + 1) // 2
    own, plain, other = layer_gates(model, ids, layer, run=run), None, None
    if own.tau_Tn is None:
        raise UserError(f"{run} has no gate tau; give a run that has it, and this one as --beside")
    if beside is not None:
        without = open_checkpoint(beside)
        if without.tokenizer().fingerprint != tokenizer.fingerprint:
            raise UserError(f"{beside} reads other tokens than {run}; give runs of one tokenizer")
        plain, other = layer_gates(without.build(device=DEVICE), ids, layer, run=beside), provenance(without)
        if plain.tau_Tn is not None:
            raise UserError(f"{beside} has the gate tau; give a run without it, such as one of ablate --gate tau")
    reading = Reading([tokenizer.decode([token]) for token in ids], own, plain)
    recipe = {
        "label": origin.label,
        "model": _source(origin),
        "beside": other and _source(other),
        "text": text,
        "layer": layer,
        "layers": layers,
        "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint},
        "device": DEVICE,
    }
    if record:
        print(f"kept as {_keep(recipe, reading)}; make figures draws Figure 8")
    name = Path(origin.identity["name"]).name
    paths = write_figure(heat_maps(reading, _note(recipe, load_records())), out or runs_root().parent / "gates", name)
    print(f"written: {', '.join(map(str, paths))}")


def _source(origin: Provenance) -> dict[str, Any]:
    return origin.identity | {"corpus": origin.corpus, "budget": origin.budget}


def _keep(recipe: Mapping[str, Any], reading: Reading) -> str:
    """Write the record, in place of one of the same recipe; returns its `experiment/id`."""
    label, facts = recipe["label"], environment()
    run = RunDir.of(runs_root(), EXPERIMENT, recipe)
    run.create(recipe)
    run.write_env(facts | {"device": recipe["device"]})
    write_gates(run.path, reading)
    run.finish(
        {
            "label": label,
            "corpus": recipe["model"]["corpus"],
            "tokenizer": recipe["tokenizer"]["name"],
            "budget": recipe["model"]["budget"],
            "device": recipe["device"],
            "commit": facts["commit"],
            "metrics": {f"mean {title}": _short(gate_Tn.mean().item()) for title, gate_Tn in reading.maps.items()},
        }
    )
    return f"{run.experiment}/{run.id}"
