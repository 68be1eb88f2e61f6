"""Runs of several sizes as the points of a scaling law: which belong together, and the law through them.

Loss is ln of the validation perplexity, in nats a token. Needs no torch: what a run cost is the caller's to say.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rodimus_lab.records import Record
from rodimus_lab.report.figure import Band
from rodimus_lab.report.power_law import LEAST_POINTS, PowerLaw, fit_power_law

METRIC = "valid_ppl"
BAND_POINTS = 25


class Group(NamedTuple):
    """What the points of one law share; a corpus is named without the number of its tokens."""

    corpus: str
    tokenizer: str
    budget: str
    text: str


@dataclass(frozen=True)
class Point:
    """One model at one size: runs that differ in the seed only."""

    model: str
    size: str
    runs: Sequence[Record]

    @property
    def loss(self) -> float:
        return statistics.fmean(math.log(run.metrics[METRIC]) for run in self.runs)

    @property
    def ppl(self) -> float:
        return math.exp(self.loss)

    @property
    def std(self) -> float:
        """The standard deviation of the perplexity over seeds; 0 of a single run."""
        return statistics.stdev(run.metrics[METRIC] for run in self.runs) if len(self.runs) > 1 else 0.0

    @property
    def ids(self) -> str:
        return "; ".join(run.id for run in self.runs)

    @property
    def devices(self) -> str:
        return "; ".join(dict.fromkeys(run.device for run in self.runs))


Points = Mapping[tuple[str, str], Point]


def model_and_size(label: str) -> tuple[str, str]:
    """`rodimus_plus-125m` -> (rodimus+, 125m)."""
    model, _, size = label.rpartition("-")
    return model.replace("_plus", "+").replace("_pp", "++"), size


def scaling_points(records: Iterable[Record], ratio_of: Callable[[Record], float]) -> dict[Group, Points]:
    """Points by (model, size), group by group. `ratio_of` gives the tokens a parameter that a run was trained for,
    which all runs of a short or smoke group share; of runs of one point that differ in more than the seed, those of the
    last one to finish and its seeds count."""
    groups: dict[Group, dict[tuple[str, str], list[Record]]] = {}
    for record in sorted(records, key=lambda record: (record.finished, record.id)):
        if record.metrics.get(METRIC) is None:
            continue
        runs = groups.setdefault(_group(record, ratio_of(record)), {}).setdefault(model_and_size(record.label), [])
        runs[:] = [run for run in runs if _but_seed(run) == _but_seed(record)] + [record]
    return {
        group: {key: Point(*key, sorted(runs, key=lambda run: run.recipe["seed"])) for key, runs in found.items()}
        for group, found in sorted(groups.items())
    }


def law_of(flops: Sequence[float], losses: Sequence[float]) -> PowerLaw | None:
    """The law of loss over FLOPs; None where the points are too few."""
    return fit_power_law(flops, losses) if len(set(flops)) >= LEAST_POINTS else None


def band_of(model: str, law: PowerLaw, flops: Sequence[float]) -> Band:
    """The law as perplexity between the least and the most of `flops`, with its band of 95 %."""
    low, high = math.log(min(flops)), math.log(max(flops))
    xs = [math.exp(low + (high - low) * step / (BAND_POINTS - 1)) for step in range(BAND_POINTS)]
    limits = [law.band(x) for x in xs]
    return Band(
        model,
        xs,
        [math.exp(law(x)) for x in xs],
        [math.exp(low) for low, _ in limits],
        [math.exp(high) for _, high in limits],
    )


def _group(record: Record, ratio: float) -> Group:
    corpus = record.corpus.partition(":")[0]
    name = record.budget["name"]
    if name == "paper":
        text = "paper budget"
    elif record.budget.get("paper_steps"):
        text = f"short budget, {record.budget['steps'] / record.budget['paper_steps']:.3g} of the paper's steps"
    else:
        text = f"{name} budget, {_asked(ratio, record.budget['steps']):g} tokens a parameter"
    return Group(corpus, record.tokenizer, name, text)


def _asked(ratio: float, steps: int) -> float:
    """The ratio that was asked for: the shortest number that whole steps round to this one, half a step up or down."""
    shorter = (float(f"{ratio:.{digits}g}") for digits in range(1, 5))
    return next((one for one in shorter if abs(one - ratio) <= 0.5001 * ratio / steps), ratio)


def _but_seed(record: Record) -> dict[str, object]:
    return {name: value for name, value in record.recipe.items() if name != "seed"}
