"""Recall runs in tables: the best rate and every other, what is still missing, and who is ahead of whom."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rodimus_lab.records import Record, count_text
from rodimus_lab.report.comparison import NOT_RUN
from rodimus_lab.report.figure import tell_points
from rodimus_lab.report.recall import METRIC, Best
from rodimus_lab.report.table import Cell, Column

FEW = 0.25


def columns(
    rows: Sequence[tuple[str, int, int]],
    points: Mapping[Any, Best],
    budget: str,
    rates: Sequence[float],
    enough: float,
) -> list[tuple[Column, list[Cell]]]:
    """The best accuracy, its rate, and the accuracy at each rate that was run. The best is settled where `is_settled`
    says so."""
    found = [points.get(row) for row in rows]
    best_cells = [
        replace(_accuracy(best.runs, budget), settled=best.is_settled(rates, enough)) if best else NOT_RUN
        for best in found
    ]
    columns = [
        (Column("Accuracy (%)", "higher"), best_cells),
        (
            Column("Best rate"),
            [Cell(f"{best.lr:g}" if best else None, missing="") for best in found],
        ),
    ]
    for rate in sorted({rate for best in found if best for rate in best.by_rate}):
        cells = [_accuracy(best.by_rate.get(rate) if best else None, budget) for best in found]
        columns.append((Column(f"at {rate:g} (%)"), cells))
    return columns


def in_columns(found: Mapping[str, Collection[Any]]) -> list[str]:
    """The settings that get columns of their own: those with at least `FEW` of the points of the one with the most."""
    most = max(map(len, found.values()), default=0)
    return [setting for setting, points in found.items() if points and len(points) >= FEW * most]


def aside(found: Mapping[str, Sequence[Best]], rates: Sequence[float], x: str) -> list[str]:
    """The points of all other settings, in words."""
    shown = in_columns(found)
    return [
        f"Also run, {setting}, too few points for columns: "
        + "; ".join(
            f"{_named(point)} at {getattr(point, x)} {100 * point.accuracy:.1f}% at {point.lr:g}, the best of "
            f"{len(set(rates) & set(point.by_rate))} of {len(rates)} rates ({', '.join(run.id for run in point.runs)})"
            for point in sorted(points, key=lambda point: (point.seq_len, point.model, getattr(point, x) or 0))
        )
        + "."
        for setting, points in found.items()
        if points and setting not in shown
    ]


def progress(found: Mapping[str, Sequence[Best]], rates: Sequence[float], rows: int, x: str) -> list[str]:
    """For every setting how many of a figure's runs there are, of `rows` points at `rates`; and of the one that has the
    most, the points, at `x` of them, that have not all of their rates."""
    done = {
        setting: sum(rate in point.by_rate for point in points for rate in rates) for setting, points in found.items()
    }
    told = []
    for setting, points in found.items():
        if not done[setting]:
            continue
        partly = [point for point in points if not set(rates) <= set(point.by_rate)]
        partly.sort(key=lambda point: (point.seq_len, point.model, point.width, point.expansion or 0))
        some = tell_points((_named(point), getattr(point, x)) for point in partly)
        told.append(f"{setting}: {done[setting]} of the figure's {rows * len(rates)} runs.")
        if some and done[setting] == max(done.values()):
            told[-1] += f" Not all of {len(rates)} learning rates yet, so the best may become better: {some}."
    return told


def beside(
    found: Mapping[str, Sequence[Best]],
    ours: Sequence[str],
    others: Sequence[str],
    rates: Sequence[float],
    close: float,
    enough: float,
) -> list[str]:
    """For every setting the `others` beside the best of `ours`, point by point, of those that are settled."""
    said = []
    for setting, points in found.items():
        at: dict[tuple[int, int], dict[str, Best]] = {}
        for point in points:
            if point.is_settled(rates, enough):
                at.setdefault((point.seq_len, point.width), {})[point.model] = point
        told: dict[str, list[tuple[str, float | None]]] = {"ahead": [], "behind": [], "level": []}
        for _, models in sorted(at.items()):
            best = max((models[one].accuracy for one in ours if one in models), default=None)
            for one in others:
                if best is not None and one in models:
                    gap = models[one].accuracy - best
                    where = "level" if abs(gap) < close else "ahead" if gap > 0 else "behind"
                    told[where].append((_named(models[one]), models[one].width))
        if any(told.values()):
            words = "; ".join(f"{where}: {tell_points(points) or 'none'}" for where, points in told.items())
            said.append(
                f"Beside the better of {' and '.join(ours)} here, {setting}, level within {close:.0%} (a run ends "
                f"above {enough:.0%}, and what passes that is not told apart): {words}."
            )
    return said


def _named(point: Best) -> str:
    return f"{point.model} ({point.seq_len} tokens)"


def _accuracy(runs: Sequence[Record] | None, budget: str) -> Cell:
    if not runs:
        return NOT_RUN
    accuracies = [100 * run.metrics[METRIC] for run in runs]
    return Cell(
        statistics.fmean(accuracies),
        digits=1,
        source="measured",
        run_id="; ".join(run.id for run in runs),
        corpus="mqar",
        budget=budget,
        device="; ".join(dict.fromkeys(run.device for run in runs)),
        note="; ".join(dict.fromkeys(map(_trained, runs))),
        std=statistics.stdev(accuracies) if len(runs) > 1 else None,
        count=len(runs),
    )


def _trained(run: Record) -> str:
    """How far it was trained: steps differ with the length, and a run ends early where nothing is left to learn."""
    metrics = run.metrics
    read = f", {count_text(metrics['tokens'])} tokens" if metrics.get("tokens") else ""
    return f"{metrics.get('steps', run.budget['steps']):,} steps, batch {run.budget['batch_size']}{read}"
