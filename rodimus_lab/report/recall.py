"""Recall runs as the points of a figure: the best of several learning rates, with every run that stands behind it."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rodimus_lab.errors import UserError
from rodimus_lab.records import Record
from rodimus_lab.registry import plain_spelling

METRIC = "test_accuracy"
CLOSE = 0.03  # Models that differ by less are run with more seeds, and are told to be level.
# The sublayer of a model, and its field, that sets the state expansion n.
EXPANSION_FIELDS = {
    "rodimus": ("rodimus", "n"),
    "rodimus+": ("rodimus", "n"),
    "mamba2": ("mamba2", "state"),
    "mamba": ("mamba", "state"),
}


@dataclass(frozen=True)
class Grid:
    """The points of a figure: every model at every length, width and expansion (where there are none, at its own), each
    the best of `rates`."""

    models: Sequence[str]
    lengths: Sequence[int]
    widths: Sequence[int]
    rates: Sequence[float]
    expansions: Sequence[int] = ()


FIGURE_6 = Grid(
    models=("rodimus", "rodimus+", "mamba", "mamba2", "rwkv4", "rwkv6", "transformer++"),
    lengths=(128, 256, 512),
    widths=(64, 128, 256, 512),
    rates=(1e-4, 4.642e-4, 2.154e-3, 1e-2),
)
FIGURE_1B = Grid(
    models=("rodimus", "rodimus+", "mamba2", "mamba"),
    lengths=(1024,),
    widths=(256,),
    rates=(3.162e-4, 3.162e-3, 1e-2),
    expansions=(16, 32, 64, 128, 256),
)


@dataclass(frozen=True)
class Best:
    """One model at one shape of the task, width and expansion (None where it has none); a model's settings are told
    apart by all else that is in its recipe. `by_rate`: its runs by learning rate, those of several seeds together.
    `lr` is the rate whose mean accuracy (0 to 1) is the highest, the lowest such rate where several are."""

    model: str
    seq_len: int
    num_pairs: int
    width: int
    expansion: int | None
    by_rate: Mapping[float, Sequence[Record]]

    @property
    def lr(self) -> float:
        return max(sorted(self.by_rate), key=lambda rate: mean_accuracy(self.by_rate[rate]))

    @property
    def runs(self) -> Sequence[Record]:
        return self.by_rate[self.lr]

    @property
    def accuracy(self) -> float:
        return mean_accuracy(self.runs)

    def is_settled(self, rates: Collection[float], enough: float) -> bool:
        """Whether no rate of `rates` that is still missing matters: all are there, or it is above `enough`, beyond
        which nothing is told apart."""
        return self.accuracy > enough or set(rates) <= set(self.by_rate)


def mean_accuracy(runs: Sequence[Record]) -> float:
    return statistics.fmean(run.metrics[METRIC] for run in runs)


def spread_over_seeds(runs: Sequence[Record]) -> float:
    """The standard deviation of the accuracy; 0 of a single run."""
    return statistics.stdev(run.metrics[METRIC] for run in runs) if len(runs) > 1 else 0.0


def best_points(records: Iterable[Record]) -> dict[str, list[Best]]:
    """Points by budget in words, such as `paper budget, 64 epochs, fp32`; runs of mixtures of shapes are no points.

    Where runs of one model, shape, width, expansion and rate differ in more than the seed, those of the last one to
    finish and its seeds count. Raises `UserError` naming the folder of a run that lacks what a recall run has.
    """
    groups: dict[str, dict[tuple[Any, ...], dict[float, list[Record]]]] = {}
    for record in sorted(records, key=lambda record: (record.finished, record.id)):
        try:
            place = _place_of(record)
        except (AttributeError, LookupError, StopIteration, TypeError, ZeroDivisionError):
            raise UserError(
                f"{record.path} is not a whole recall run; restore its files, or delete the folder and run again"
            ) from None
        if place is None:
            continue
        budget, key, rate = place
        runs = groups.setdefault(budget, {}).setdefault(key, {}).setdefault(rate, [])
        runs[:] = [run for run in runs if _but_seed(run) == _but_seed(record)] + [record]
    return {
        budget: [
            Best(model, seq_len, pairs, width, n, {lr: sorted(rates[lr], key=_seed) for lr in sorted(rates)})
            for (model, seq_len, pairs, width, n), rates in sorted(points.items(), key=lambda item: str(item[0]))
        ]
        for budget, points in sorted(groups.items())
    }


def _place_of(record: Record) -> tuple[str, tuple[Any, ...], float] | None:
    """The setting, point and learning rate of a run; None where it is none of a figure's."""
    recipe, model = record.recipe, plain_spelling(record.label)
    data = recipe["data"]
    if data.get("task") != "mqar" or len(data["train"]) != 1 or METRIC not in record.metrics:
        return None
    (shape,) = data["train"]
    if not 0 <= record.metrics[METRIC] <= 1 or recipe["seed"] < 0 or record.budget["batch_size"] < 1:
        raise LookupError
    key = (model, shape["seq_len"], shape["num_pairs"], recipe["model"]["d_model"], _expansion(model, record))
    return _budget(record), key, recipe["optimizer"]["lr"]


def too_close(points: Sequence[Best], margin: float, enough: float) -> list[Best]:
    """Points that another model at the same shape, width and expansion comes closer to than `margin`.

    Where both are above `enough` there is nothing to tell apart, for such runs end there.
    """
    close = []
    for point in points:
        rivals = [other for other in points if other.model != point.model and _place(other) == _place(point)]
        if any(
            abs(other.accuracy - point.accuracy) < margin and min(other.accuracy, point.accuracy) <= enough
            for other in rivals
        ):
            close.append(point)
    return close


def _place(point: Best) -> tuple[Any, ...]:
    """At one width, models of one figure have one expansion each, which Figure 1b varies and Figure 6 does not."""
    varied = point.expansion if point.seq_len == 1024 else None
    return point.seq_len, point.num_pairs, point.width, varied


def _expansion(model: str, record: Record) -> int | None:
    if model not in EXPANSION_FIELDS:
        return None
    kind, field = EXPANSION_FIELDS[model]
    return next(sublayer[field] for sublayer in _sublayers(record.recipe["model"]) if sublayer["kind"] == kind)


def _sublayers(model: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for block in model["pattern"]:
        for hop in block["hops"]:
            yield from hop


def _budget(record: Record) -> str:
    budget = record.budget
    epochs = budget["steps"] // budget["eval_every"]
    return f"{budget['name']} budget, {epochs} epochs, {record.recipe['precision']}"


def _but_seed(record: Record) -> dict[str, Any]:
    return {name: value for name, value in record.recipe.items() if name != "seed"}


def _seed(record: Record) -> int:
    return record.recipe["seed"]
