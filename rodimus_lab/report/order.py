"""Whether the order that the paper's numbers give holds in ours: one sentence for every measured setting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

from rodimus_lab.report.table import Cell, Table

SHOWN = 3  # exceptions that a sentence names
UNKNOWN = (
    "No two rows that the paper orders have all their runs at one setting, so whether its order holds is not known."
)


def with_order(
    table: Table, metric: str, names: Sequence[str], within: Sequence[str] = (), quoted: str | None = None
) -> Table:
    """`table` with a note on the order by `metric`, the name of one column of the paper's and of measured ones; the
    paper's has the name `quoted` where that is another.

    Rows are told by the columns `names`; only rows that agree in the columns `within` are compared, and of these every
    pair that the paper's printed digits tell apart. Where both rows are means over seeds, a pair counts only if the
    means are further apart than twice the standard error of their difference; of single seeds the noise is not known,
    and the sentence says so. Cells that are not settled are left out.
    """
    places = {column.name: index for index, column in enumerate(table.columns)}
    paper, measured = _columns(table, metric, quoted or metric)
    notes = []
    for index in measured:
        rows = [row for row in table.rows if row[paper].is_number and row[index].is_number and row[index].settled]
        pairs = [
            (first, second) if _number(first[paper]) < _number(second[paper]) else (second, first)
            for first, second in combinations(rows, 2)
            if all(first[places[name]].text == second[places[name]].text for name in within)
            and _number(first[paper]) != _number(second[paper])
        ]
        if pairs:
            notes.append(_sentence(table, metric, index, pairs, [places[name] for name in names]))
    return replace(table, notes=(*table.notes, *(notes or [UNKNOWN])))


def _sentence(
    table: Table, metric: str, index: int, pairs: Sequence[tuple[Sequence[Cell], Sequence[Cell]]], names: Sequence[int]
) -> str:
    noises = [_noise(low[index], high[index]) for low, high in pairs]
    verdicts = [
        _verdict(_number(high[index]) - _number(low[index]), noise)
        for (low, high), noise in zip(pairs, noises, strict=True)
    ]
    held, close = verdicts.count("held"), verdicts.count("close")
    broken = [
        f"({' '.join(high[name].text for name in names)}) is not above ({' '.join(low[name].text for name in names)})"
        for (low, high), verdict in zip(pairs, verdicts, strict=True)
        if verdict == "broken"
    ]
    said = f"{held} of {len(pairs)} pairs of rows stand as in the paper" + (
        f", {close} lie within noise" if close else ""
    )
    if broken:
        more = len(broken) - SHOWN
        said += f"; {'; '.join(broken[:SHOWN])}" + (f"; and {more} more" if more > 0 else "")
    cell = next(low[index] for low, _ in pairs)
    seeds = "One seed a row: the noise is not known." if None in noises else "Noise is that over seeds."
    return f"Order by {metric}, {cell.corpus}, {cell.budget}: {said}. {seeds}"


def _verdict(gap: float, noise: float | None) -> str:
    """Of a pair whose gap the paper has above 0."""
    if noise is not None and abs(gap) <= noise:
        return "close"
    return "held" if gap > 0 else "broken"


def _columns(table: Table, metric: str, quoted: str) -> tuple[int, list[int]]:
    """The paper's column of a metric and the measured ones."""
    found = [index for index, column in enumerate(table.columns) if column.name in (metric, quoted)]
    sources = {index: {row[index].source for row in table.rows if row[index].value is not None} for index in found}
    (paper,) = [index for index in found if sources[index] == {"paper"}]
    return paper, [index for index in found if sources[index] == {"measured"}]


def _noise(first: Cell, second: Cell) -> float | None:
    """Twice the standard error of the difference of two means; None where one of them is a single run."""
    variances = list(_variances(first, second))
    return 2 * math.sqrt(sum(variances)) if len(variances) == 2 else None


def _variances(*cells: Cell) -> Iterator[float]:
    for cell in cells:
        if cell.std is not None:
            yield cell.std**2 / cell.count


def _number(cell: Cell) -> float:
    assert isinstance(cell.value, int | float)
    return float(cell.value)
