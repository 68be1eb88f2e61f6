"""Scores of single predictions, 0 to 100, and what a run's cells come to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, TypeAlias

from evals.needlebench.ancestry import ORDERS
from evals.needlebench.prompts import Example
from evals.needlebench.spec import CHAINS, Spec, Task

Grid: TypeAlias = list[list[float | None]]

SUBTASKS: tuple[Task, ...] = ("single_retrieval", "multi_retrieval", "multi_reasoning")
WEIGHTS = dict(zip(SUBTASKS, (0.4, 0.3, 0.3), strict=True))
WITHOUT_KEYWORD = 0.2
SAID = re.compile(r"(?:[Aa]nswer is(?: option)?|答案[是为选]?)\s*[:：]?\s*([ABCD])(?![A-Za-z])")
ALONE = re.compile(r"(?<![A-Za-z])[ABCD](?![A-Za-z])")  # Not that of "Answer".
ANY = re.compile(r"[ABCD]")


def score(task: Task, prediction: str, example: Example) -> list[float]:
    """One number, or in multi-needle retrieval one for every depth."""
    if task == "single_retrieval":
        return [single_retrieval(prediction, example.reference, example.keywords[0])]
    if task == "multi_retrieval":
        return [100.0 * (keyword in prediction) for keyword in example.keywords]
    if task == "multi_reasoning":
        return [100 * fmean(word in prediction.lower() for word in example.keywords)]
    return [100.0 * (choice(prediction) == example.keywords[0])]


def settled(task: Task, prediction: str, example: Example) -> bool:
    """Whether no further text can change the score, so that generation may end."""
    if task == "ancestry":
        said = SAID.search(prediction)
        return said is not None and said.end() < len(prediction)
    return all(value == 100 for value in score(task, prediction, example))


def single_retrieval(prediction: str, needle: str, keyword: str) -> float:
    """100 where the keyword is in the prediction as it stands; else a fifth of 100 (1 - Levenshtein distance / longer
    length) of prediction and needle without their white space."""
    if keyword in prediction:
        return 100.0
    found, hidden = ("".join(text.split()) for text in (prediction, needle))
    longer = max(len(found), len(hidden))
    return WITHOUT_KEYWORD * 100 * (1 - levenshtein(found, hidden) / longer) if longer else WITHOUT_KEYWORD * 100


def levenshtein(a: str, b: str) -> int:
    """The least number of single characters to insert, delete or replace that makes one text of the other."""
    previous = list(range(len(b) + 1))
    for row, x in enumerate(a, 1):
        current = [row]
        for column, y in enumerate(b, 1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (x != y)))
        previous = current
    return previous[-1]


def choice(prediction: str) -> str:
    """The letter that a prediction chooses: the first after words such as "the answer is", else the first by itself,
    else the first of all; empty where there is none."""
    for pattern in (SAID, ALONE, ANY):
        if match := pattern.search(prediction):
            return match[match.lastindex or 0]
    return ""


def of_cell(task: Task, scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """A cell's scores from those of its predictions, in the order of its examples."""
    if task == "ancestry":
        right = [value[0] == 100 for value in scores]
        rounds = [all(right[start : start + len(ORDERS)]) for start in range(0, len(right), len(ORDERS))]
        return {"scores": [100 * fmean(right)], "circular": 100 * fmean(rounds)}
    return {"scores": [fmean(values) for values in zip(*scores, strict=True)]}


def summarize(spec: Spec, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The metrics of a run from its cells' results.

    `grids` holds for every dataset, every subtask and `overall` a score for each length (row) and depth, null where
    there is none. A subtask's cell is the mean over its datasets, and the overall one the weighted sum of the subtasks;
    both are there only where all their parts are. Beside them stand the means over depths, then lengths, of what is
    there; of ancestry the mean over the numbers of people, and the share with all four orders right (`_circular`).
    """
    grids: dict[str, Grid] = {}
    for task in spec.tasks:
        if task != "ancestry":
            parts = {name: _grid(spec, task, name, results) for name in _datasets(spec, task)}
            grids |= parts | {task: _joined(list(parts.values()), [1 / len(parts)] * len(parts))}
    if all(task in grids for task in SUBTASKS):
        grids["overall"] = _joined([grids[task] for task in SUBTASKS], [WEIGHTS[task] for task in SUBTASKS])
    metrics: dict[str, Any] = {name: mean for name, grid in grids.items() if (mean := average(grid)) is not None}
    if "ancestry" in spec.tasks:
        metrics |= _ancestry(spec, results)
    impossible = {key: result["impossible"] for key, result in results.items() if "impossible" in result}
    return metrics | {"cells": len(results), "impossible": impossible, "grids": grids}


def average(grid: Grid) -> float | None:
    """The mean of a grid's rows, each the mean of its cells, without those that are missing."""
    rows = [mean for mean in by_length(grid) if mean is not None]
    return fmean(rows) if rows else None


def by_length(grid: Grid) -> list[float | None]:
    """The mean over the depths, for each length."""
    rows = [[value for value in row if value is not None] for row in grid]
    return [fmean(row) if row else None for row in rows]


def _datasets(spec: Spec, task: Task) -> list[str]:
    stems = [f"{task}_{count}" for count in CHAINS] if task == "multi_reasoning" else [task]
    return [f"{stem}_{language}" for stem in stems for language in spec.languages]


def _grid(spec: Spec, task: Task, dataset: str, results: Mapping[str, Mapping[str, Any]]) -> Grid:
    grid: Grid = []
    for length in spec.lengths:
        if task == "multi_retrieval":
            found = [results[f"{dataset}/{length}"]]
        else:
            found = [results[f"{dataset}/{length}/{depth}"] for depth in spec.depths]
        row = [value for result in found for value in result.get("scores", [None])]
        grid.append(row if len(row) == len(spec.depths) else [None] * len(spec.depths))
    return grid


def _joined(grids: Sequence[Grid], weights: Sequence[float]) -> Grid:
    return [[_weighted(cells, weights) for cells in zip(*rows, strict=True)] for rows in zip(*grids, strict=True)]


def _weighted(values: Sequence[float | None], weights: Sequence[float]) -> float | None:
    there = [value for value in values if value is not None]
    if len(there) < len(values):
        return None
    return sum(weight * value for weight, value in zip(weights, there, strict=True))


def _ancestry(spec: Spec, results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    metrics = {}
    for language in spec.languages:
        found = [results[f"ancestry_{language}/{count}"] for count in spec.names]
        for name, values in {
            f"ancestry_{language}": [result["scores"][0] for result in found if "scores" in result],
            f"ancestry_{language}_circular": [result["circular"] for result in found if "circular" in result],
        }.items():
            if values:
                metrics[name] = fmean(values)
    return metrics
