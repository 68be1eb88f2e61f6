"""What the runs of mqar say: Figure 6 (accuracy by width) and Figure 1b (by state expansion), as tables and pictures.

A point is the best of its learning rates. Beside Figure 6, and not in the paper, stand every rate by itself and the
steps that a model took: where all recall everything in the end, these tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rodimus_lab.data.mqar import PAPER_PAIRS, MqarConfig
from rodimus_lab.experiment import report
from rodimus_lab.records import Record
from rodimus_lab.report import (
    FIGURES,
    NOT_RUN,
    Axis,
    Cell,
    Column,
    Figure,
    Line,
    Panels,
    PaperResults,
    Table,
    tell_points,
)
from rodimus_lab.report.order import with_order
from rodimus_lab.report.recall import (
    CLOSE,
    FIGURE_1B,
    FIGURE_6,
    METRIC,
    Best,
    best_points,
    mean_accuracy,
    spread_over_seeds,
)
from rodimus_lab.report.recall_tables import aside, beside, columns, in_columns, progress

ENOUGH: float = MqarConfig.model_fields["enough"].default
(LONG,), (LONG_WIDTH,) = FIGURE_1B.lengths, FIGURE_1B.widths
PRECISIONS = {
    "fp32": "float32",
    "tf32": "float32, its products in TensorFloat32",
    "bf16": "bfloat16 over float32 weights",
}


@report("figure06", experiments=("mqar",))
def figure06(records: Sequence[Record], paper: PaperResults) -> Table:
    """Figure 6 as a table: accuracy by model, length and width, the best of the learning rates and each of them."""
    rows = [(one, t, d) for t in FIGURE_6.lengths for one in FIGURE_6.models for d in FIGURE_6.widths]
    found = {
        budget: {(b.model, b.seq_len, b.width): b for b in points if _in_6(b)}
        for budget, points in best_points(records).items()
    }
    names = [
        (Column("Model"), [Cell(one) for one, _, _ in rows]),
        (Column("Tokens"), [Cell(t) for _, t, _ in rows]),
        (Column("Pairs"), [Cell(PAPER_PAIRS[t]) for _, t, _ in rows]),
        (Column("Width d"), [Cell(d) for _, _, d in rows]),
    ]
    at_hand = {setting: list(points.values()) for setting, points in found.items()}
    measured = [
        column
        for setting in in_columns(found)
        for column in columns(rows, found[setting], setting, FIGURE_6.rates, ENOUGH)
    ]
    return Table.of(
        "Figure 6. Accuracy of recall (MQAR) by width",
        names + (measured or [(Column("Accuracy (%)"), [NOT_RUN] * len(rows))]),
        [
            "The paper prints no numbers for this figure, and no picture of it was at hand to read points from.",
            _WORDS,
            *beside(at_hand, ("rodimus", "rodimus+"), FIGURE_6.models[2:-1], FIGURE_6.rates, CLOSE, ENOUGH),
            _RULE,
            *progress(at_hand, FIGURE_6.rates, len(rows), "width"),
            *aside(at_hand, FIGURE_6.rates, "width"),
            _CONTINUE.format(figure="6"),
        ],
        sections=[f"{t} tokens" for _, t, _ in rows],
    )


@report("figure01b", experiments=("mqar",))
def figure01b(records: Sequence[Record], paper: PaperResults) -> Table:
    """Figure 1b as a table: accuracy by state expansion n, the paper's points beside ours."""
    rows = [(one, LONG, n) for one in FIGURE_1B.models for n in FIGURE_1B.expansions]
    read = {(row["model"], float(str(row["expansion"]))): row["accuracy"] for row in paper.figure("01b")}
    found = {
        budget: {(b.model, b.seq_len, b.expansion): b for b in points if _in_1b(b)}
        for budget, points in best_points(records).items()
    }
    quoted = [read.get((one, n)) for one, _, n in rows]
    names = [
        (Column("Model"), [Cell(one) for one, _, _ in rows]),
        (Column("n"), [Cell(n) for _, _, n in rows]),
        (
            Column("Accuracy (%), read by eye", "higher"),
            [Cell(None if y is None else round(100 * float(y)), source="paper") for y in quoted],
        ),
    ]
    at_hand = {setting: list(points.values()) for setting, points in found.items()}
    measured = [
        column
        for setting in in_columns(found)
        for column in columns(rows, found[setting], setting, FIGURE_1B.rates, ENOUGH)
    ]
    table = Table.of(
        f"Figure 1b. Accuracy of recall (MQAR) by state expansion: {LONG} tokens, {PAPER_PAIRS[LONG]} pairs, "
        f"d = {LONG_WIDTH}",
        names + (measured or [(Column("Accuracy (%)"), [NOT_RUN] * len(rows))]),
        [
            "The paper's points are read by eye off the picture, to about 1 % of the axis.",
            _RULE,
            *progress(at_hand, FIGURE_1B.rates, len(rows), "expansion"),
            *aside(at_hand, FIGURE_1B.rates, "expansion"),
            _CONTINUE.format(figure="1b"),
        ],
    )
    return with_order(table, "Accuracy (%)", ("Model", "n"), within=("n",), quoted="Accuracy (%), read by eye")


def _register_figure_6(seq_len: int) -> None:
    @FIGURES.register(f"figure06-{seq_len}")
    def panel(records: Sequence[Record], paper: PaperResults) -> Figure:
        """Figure 6 at one length: accuracy by width."""
        return _figure(
            f"Figure 6. MQAR, {_task(seq_len)}",
            "Width d",
            [(one, FIGURE_6.widths) for one in FIGURE_6.models],
            _points_at(seq_len, records),
            FIGURE_6.rates,
            quoted=[],
            command=_command(seq_len),
        )


for _length in FIGURE_6.lengths:
    _register_figure_6(_length)


@FIGURES.register("figure06-rates")
def draw_rates(records: Sequence[Record], paper: PaperResults) -> Mapping[str, Panels]:
    """Accuracy at every learning rate, a panel a width, for each length that has runs: what the best rate hides."""
    return {str(t): _by_rate(t, points) for t in FIGURE_6.lengths if (points := _points_at(t, records))}


@FIGURES.register("figure06-steps")
def draw_steps(records: Sequence[Record], paper: PaperResults) -> Mapping[str, Figure]:
    """Steps until a model recalled enough, by width, for each length that has runs: what an early end hides."""
    return {str(t): _steps(t, points) for t in FIGURE_6.lengths if (points := _points_at(t, records))}


@FIGURES.register("figure01b")
def draw_figure_1b(records: Sequence[Record], paper: PaperResults) -> Figure:
    """Figure 1b: accuracy by state expansion, over the paper's points."""
    quoted = []
    for one in FIGURE_1B.models:
        rows = [row for row in paper.figure("01b") if row["model"] == one]
        xs, ys = ([float(str(row[name])) for row in rows] for name in ("expansion", "accuracy"))
        quoted.append(Line(one, xs, ys, sources=["paper, read by eye"] * len(rows), quoted=True))
    return _figure(
        f"Figure 1b. MQAR, {_task(LONG)}, d = {LONG_WIDTH}",
        "State expansion n",
        [(one, FIGURE_1B.expansions) for one in FIGURE_1B.models],
        {(point.model, point.expansion): point for point in _drawn(records, _in_1b)},
        FIGURE_1B.rates,
        quoted=quoted,
        command="rodimus-lab mqar --figure 1b --budget paper",
    )


_RULE = (
    "Of several learning rates the best accuracy counts; every rate stands beside it. Where models differ by less "
    f"than {CLOSE:.0%} short of 99 %, the best rate is run with three seeds. Accuracy is that of the last epoch."
)
_CONTINUE = (
    "rodimus-lab mqar --figure {figure} --budget paper runs what is missing; with --dry-run it lists the runs and "
    "their hours."
)
_WORDS = (
    "Of the order the paper's text says (D.7): Rodimus and Rodimus+ achieve the highest performance, Mamba and RWKV "
    "underperform, particularly where the width is small. Transformer++ is ours alone: the paper leaves full attention "
    "out, as it recalls everything."
)


def _points_at(seq_len: int, records: Sequence[Record]) -> dict[tuple[str, int], Best]:
    points = _drawn(records, lambda point: _in_6(point) and point.seq_len == seq_len)
    return {(point.model, point.width): point for point in points}


def _by_rate(seq_len: int, points: Mapping[tuple[str, int], Best]) -> Panels:
    parts = []
    for width in FIGURE_6.widths:
        runs = {name: points[name, width].by_rate for name in FIGURE_6.models if (name, width) in points}
        at = {name: [rate for rate in FIGURE_6.rates if rate in by_rate] for name, by_rate in runs.items()}
        lines = [_line(name, rates, [runs[name][rate] for rate in rates]) for name, rates in at.items() if rates]
        missing = [(name, rate) for name in FIGURE_6.models for rate in FIGURE_6.rates if rate not in at.get(name, ())]
        x, y = Axis("Learning rate"), Axis("Accuracy", "share")
        parts.append(Figure(f"Width {width}", x, y, lines, missing, command=_command(seq_len)))
    return Panels(f"MQAR, {_task(seq_len)}, by learning rate", parts)


def _steps(seq_len: int, points: Mapping[tuple[str, int], Best]) -> Figure:
    """The fewest steps of any rate; of those that never recall enough there is no point, and the remark names them."""
    lines, missing, never = [], [], []
    for name in FIGURE_6.models:
        soonest = {}
        for width in FIGURE_6.widths:
            if (name, width) not in points:
                missing.append((name, width))
                continue
            runs = [run for some in points[name, width].by_rate.values() for run in some]
            enough = [run for run in runs if run.metrics[METRIC] > ENOUGH]
            if enough:
                soonest[width] = min(enough, key=lambda run: (run.metrics["steps"], run.id))
            else:
                never.append((name, width))
        if soonest:
            steps = [run.metrics["steps"] for run in soonest.values()]
            sources = [f"{run.id} at rate {run.recipe['optimizer']['lr']:g}" for run in soonest.values()]
            lines.append(Line(name, list(soonest), steps, sources, runs=[[run] for run in soonest.values()]))
    return Figure(
        f"MQAR, {_task(seq_len)}: steps until more than {ENOUGH:.0%} are recalled",
        Axis("Width d", "log2"),
        Axis("Steps, at the soonest of the rates"),
        lines,
        missing,
        remark=f"never, at any rate: {tell_points(never)}" if never else "",
        command=_command(seq_len),
    )


def _line(name: str, xs: Sequence[float], runs: Sequence[Sequence[Record]], sources: Sequence[str] = ()) -> Line:
    """The mean accuracy of the runs of each point."""
    stds = [spread_over_seeds(some) for some in runs]
    return Line(name, xs, [mean_accuracy(some) for some in runs], sources, stds=stds, runs=runs)


def _task(seq_len: int) -> str:
    return f"{seq_len} tokens, {PAPER_PAIRS[seq_len]} pairs"


def _command(seq_len: int) -> str:
    return f"rodimus-lab mqar --length {seq_len} --budget paper"


def _in_6(point: Best) -> bool:
    return (
        point.model in FIGURE_6.models
        and point.seq_len in FIGURE_6.lengths
        and point.num_pairs == PAPER_PAIRS[point.seq_len]
    )


def _in_1b(point: Best) -> bool:
    return (point.seq_len, point.num_pairs, point.width) == (LONG, PAPER_PAIRS[LONG], LONG_WIDTH)


def _drawn(records: Iterable[Record], belongs: Callable[[Best], bool]) -> list[Best]:
    """The points of one budget and precision: the paper's budget where any run has it, and of several the one with the
    most runs."""
    found = best_points(record for record in records if record.experiment == "mqar")
    groups = [[point for point in points if belongs(point)] for points in found.values()]

    def rank(points: list[Best]) -> tuple[bool, int]:
        runs = [run for point in points for some in point.by_rate.values() for run in some]
        return runs[0].budget["name"] == "paper", len(runs)

    return max(filter(None, groups), key=rank, default=[])


def _figure(
    title: str,
    x_label: str,
    wanted: Sequence[tuple[str, Sequence[int]]],
    points: Mapping[Any, Best],
    rates: Sequence[float],
    quoted: Sequence[Line],
    command: str,
) -> Figure:
    """A point is the best of its rates. Those of fewer than all `rates` so far are named, and drawn only where a run
    ended above 99 %: at the others another rate may do far better."""
    partly = {key for key, point in points.items() if not set(rates) <= set(point.by_rate)}
    open_yet = {key for key, point in points.items() if not point.is_settled(rates, ENOUGH)}
    lines, missing = list(quoted), []
    for name, xs in wanted:
        run = [x for x in xs if (name, x) in points and (name, x) not in open_yet]
        missing += [(name, x) for x in xs if (name, x) not in points]
        if run:
            best = [points[name, x] for x in run]
            sources = [f"{'; '.join(run.id for run in b.runs)} at rate {b.lr:g}" for b in best]
            lines.append(_line(name, run, [b.runs for b in best], sources))
    started = [(name, x) for name, xs in wanted for x in xs if (name, x) in partly]
    ended = tell_points(key for key in started if key not in open_yet)
    unfinished = [key for key in started if key in open_yet]
    remarks = [PRECISIONS[run.recipe["precision"]] for point in points.values() for run in point.runs][:1]
    remarks += [f"not all of {len(rates)} learning rates yet: {ended}"] if ended else []
    x, y = Axis(x_label, "log2"), Axis("Accuracy", "share")
    return Figure(title, x, y, lines, missing, unfinished, remark="; ".join(remarks), command=command)
