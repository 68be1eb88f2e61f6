"""Multi-query associative recall: Figure 6 (accuracy by width) and Figure 1b (accuracy by state expansion), D.7.

Every run is one model, one shape of the task and one learning rate, trained as Zoology's code trains (docs/choices.md).
A point of a figure is the best of its learning rates; where models come closer than `CLOSE`, of three seeds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from rodimus_lab.data.mqar import PAPER_PAIRS, MqarConfig, MqarSegment, single
from rodimus_lab.errors import UserError
from rodimus_lab.experiment import BudgetName, TrainAll, choose_budget, experiment, report
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.nn.zoo import MODELS, Size, model_config, slug
from rodimus_lab.recipe import BudgetConfig, OptimizerConfig, Recipe, ScheduleConfig
from rodimus_lab.records import Record, load_records
from rodimus_lab.registry import plain_spelling
from rodimus_lab.report import FIGURES, NOT_RUN, Axis, Cell, Column, Figure, Line, PaperResults, Table, tell_points
from rodimus_lab.report.order import with_order
from rodimus_lab.report.recall import EXPANSION_FIELDS, METRIC, Best, best_points, spread_over_seeds, too_close
from rodimus_lab.report.recall_tables import aside, beside, columns, in_columns, progress
from rodimus_lab.scoring import Precision

LAYERS = 2
SEED = 123  # Zoology's
LENGTHS, WIDTHS = (128, 256, 512), (64, 128, 256, 512)
FIGURE_6_MODELS = ("rodimus", "rodimus+", "mamba", "mamba2", "rwkv4", "rwkv6", "transformer++")
FIGURE_1B_MODELS = ("rodimus", "rodimus+", "mamba2", "mamba")
EXPANSIONS = (16, 32, 64, 128, 256)
LONG, LONG_WIDTH = 1024, 256  # Figure 1b
BATCHES = {64: 512, 128: 512, 256: 256, 512: 128, 1024: 64}
RATES = {"6": (1e-4, 4.642e-4, 2.154e-3, 1e-2), "1b": (3.162e-4, 3.162e-3, 1e-2)}
EPOCHS = {"6": 64, "1b": 32}
PRECISION: Precision = "bf16"
PRECISIONS = {
    "fp32": "float32",
    "tf32": "float32, its products in TensorFloat32",
    "bf16": "bfloat16 over float32 weights",
}
# Milliseconds of a step of 512 x 128 tokens on an H200, in bf16 and captured, at the least and the greatest width
# (docs/benchmarks.md).
STEP_MS = {
    "rodimus": (1.68, 6.66),
    "rodimus+": (2.45, 12.06),
    "mamba": (3.62, 21.46),
    "mamba2": (3.31, 13.94),
    "rwkv4": (1.76, 9.57),
    "rwkv6": (2.80, 15.87),
    "transformer++": (1.28, 9.28),
}
TIMED_LENGTH = 128
CLOSE = 0.03
ENOUGH: float = MqarConfig.model_fields["enough"].default
SEEDS = 3
SHORT = 8  # The short budget has one epoch for so many of the paper's.
SMOKE = {"seq_len": 64, "num_pairs": 4, "vocab_size": 256, "width": 32, "expansion": 16, "lr": 1.4e-2}
SMOKE_EXAMPLES, SMOKE_EPOCHS, SMOKE_BATCH = 8_000, 3, 16


def run_all(recipes: Sequence[Recipe], train_all: TrainAll) -> None:
    """Train the recipes, and then, with two seeds more, those whose points came too close to call."""
    train_all(recipes)
    asked = {recipe.id for recipe in recipes}
    found = [record for record in load_records(experiment="mqar") if record.id in asked]
    best_points(found)  # Refuses runs that are not whole.
    there = {record.id for record in found}
    lacking = {_but_rate(recipe.to_dict()) for recipe in recipes if recipe.id not in there}
    settled = (
        record
        for record in found
        if record.metrics.get(METRIC, 0.0) > ENOUGH or _but_rate(record.recipe) not in lacking
    )
    train_all(contested(list(settled)))


def contested(records: Sequence[Record]) -> list[Recipe]:
    """The best runs of the points where models differ by less than `CLOSE`, with the next seeds."""
    more = []
    for points in best_points(records).values():
        for point in too_close(points, CLOSE, ENOUGH):
            recipe = Recipe.from_dict(point.runs[0].recipe)
            more += [recipe.replace(seed=recipe.seed + number) for number in range(1, SEEDS)]
    return more


def gpu_hours(recipe: Recipe) -> float | None:
    """At most so long does the run take on an H200, by the steps that were timed there; evaluations and compilation are
    not in it. None for models and widths that were not timed.

    Between the two widths the time goes by a power of the width. A longer example or a larger state takes as much more
    as its FLOPs are more, with the logits of the questions alone.
    """
    model, data, budget = plain_spelling(recipe.label), recipe.data, recipe.budget
    width = recipe.model.d_model
    if not isinstance(data, MqarConfig) or len(data.train) != 1 or model not in STEP_MS:
        return None
    (low, high), (first, last) = STEP_MS[model], (WIDTHS[0], WIDTHS[-1])
    if not first <= width <= last or len(recipe.model.blocks) != LAYERS:
        return None
    timed = single(TIMED_LENGTH, PAPER_PAIRS[TIMED_LENGTH])
    more = _work(recipe.model, data) / _work(architecture(model, timed, width), timed)
    part = budget.batch_size * data.seq_len / (BATCHES[TIMED_LENGTH] * TIMED_LENGTH)
    step = low * (high / low) ** (math.log(width / first) / math.log(last / first)) * more * part
    return budget.steps * step / 3.6e6


def _work(config: LanguageModelConfig, data: MqarConfig) -> float:
    """Training FLOPs a token, where only the questions have logits."""
    (shape,) = data.train
    unasked = 1 - shape.num_pairs / shape.seq_len
    return config.training_flops_per_token(shape.seq_len) - 6 * config.vocab_size * config.d_model * unasked


@experiment("mqar", reports=("figure06", "figure01b"), run=run_all, hours=gpu_hours)
def mqar(
    figure: Literal["6", "1b"] = "6",
    model: str | None = None,
    length: int | None = None,
    width: Annotated[int | None, Field(ge=1)] = None,
    expansion: Annotated[int | None, Field(ge=1)] = None,
    lr: Annotated[float | None, Field(gt=0)] = None,
    budget: BudgetName | None = None,
    precision: Precision | None = None,
    seed: Annotated[int, Field(ge=0)] = SEED,
) -> Sequence[Recipe]:
    """Train on multi-query associative recall: a figure's runs, or those of one model, length, width or rate.

    The smoke budget trains one small model on a short task; the short one has an eighth of the epochs. The precision is
    bf16 unless it is given, of the smoke budget fp32.
    """
    name, _ = choose_budget(budget)
    if name == "smoke":
        asked = {"--figure": figure if figure != "6" else None, "--length": length, "--width": width}
        for option, value in (asked | {"--expansion": expansion}).items():
            if value is not None:
                raise UserError(
                    f"the smoke budget trains one small model of its own, so {option} {value} would change nothing; "
                    "leave it out, or add --budget short or paper"
                )
        return [_smoke(model or "rodimus", lr=lr, seed=seed, precision=precision or "fp32")]
    models: Sequence[str] = FIGURE_6_MODELS if figure == "6" else FIGURE_1B_MODELS
    if model is not None:
        models = [MODELS.canonical(model)]
    points: list[tuple[int, int, int | None]]
    if figure == "6":
        if expansion is not None:
            raise UserError("--expansion belongs to Figure 1b; add --figure 1b, or leave it out")
        points = [(t, d, None) for t in _chosen("length", length, LENGTHS) for d in _chosen("width", width, WIDTHS)]
    else:
        _chosen("length", length, (LONG,))
        _chosen("width", width, (LONG_WIDTH,))
        if fixed := [one for one in models if one not in EXPANSION_FIELDS]:
            raise UserError(f"{fixed[0]} has no state expansion to vary; give one of {', '.join(EXPANSION_FIELDS)}")
        points = [(LONG, LONG_WIDTH, n) for n in _chosen("expansion", expansion, EXPANSIONS)]
    rates = RATES[figure] if lr is None else (lr,)
    epochs = EPOCHS[figure]
    trained = epochs if name == "paper" else epochs // SHORT
    return [
        recipe_of(
            one, single(t, PAPER_PAIRS[t]), d, rate, epochs=trained, paper_epochs=epochs, batch_size=BATCHES[t],
            name=name, expansion=n, seed=seed, precision=precision or PRECISION,
        )
        for t, d, n in points
        for one in models
        for rate in rates
    ]  # fmt: skip


def recipe_of(
    model: str,
    data: MqarConfig,
    width: int,
    lr: float,
    *,
    epochs: int,
    batch_size: int,
    name: BudgetName,
    paper_epochs: int | None = None,
    expansion: int | None = None,
    layers: int = LAYERS,
    seed: int = SEED,
    precision: Precision = PRECISION,
) -> Recipe:
    """One run: a model of `layers` blocks, evaluated after every epoch."""
    per_epoch = sum(-(-segment.num_examples // batch_size) for segment in data.train)
    return Recipe(
        experiment="mqar",
        label=slug(model),
        model=architecture(model, data, width, layers=layers, expansion=expansion),
        data=data,
        optimizer=OptimizerConfig(lr=lr, beta1=0.9, beta2=0.999, weight_decay=0.1, clip_norm=None),
        schedule=ScheduleConfig(kind="cosine_by_epoch", warmup_steps=0, min_lr=0),
        budget=BudgetConfig(
            name=name,
            steps=epochs * per_epoch,
            batch_size=batch_size,
            paper_steps=None if paper_epochs is None else paper_epochs * per_epoch,
            eval_every=per_epoch,
        ),
        precision=precision,
        seed=seed,
        evaluators=("accuracy",),
    )


def architecture(
    model: str, data: MqarConfig, width: int, *, layers: int = LAYERS, expansion: int | None = None
) -> LanguageModelConfig:
    """The first `layers` blocks of the model at a width, with one head of attention."""
    size = Size("mqar", layers, width, 1, data.vocab_size, data.seq_len)
    changes: dict[str, Any] = {}
    if expansion is not None:
        kind, field = EXPANSION_FIELDS[MODELS.canonical(model)]
        changes[kind] = {field: expansion}
    config = model_config(model, size=size, **changes)
    return config.replace(pattern=config.blocks[:layers], repeats=1)


def _smoke(model: str, *, lr: float | None, seed: int, precision: Precision) -> Recipe:
    def segment(count: int) -> MqarSegment:
        return MqarSegment(num_examples=count, seq_len=int(SMOKE["seq_len"]), num_pairs=int(SMOKE["num_pairs"]))

    data = MqarConfig(train=(segment(SMOKE_EXAMPLES),), test=segment(1_000), vocab_size=int(SMOKE["vocab_size"]))
    expansion = int(SMOKE["expansion"]) if MODELS.canonical(model) in EXPANSION_FIELDS else None
    return recipe_of(
        model, data, int(SMOKE["width"]), lr or SMOKE["lr"], epochs=SMOKE_EPOCHS, batch_size=SMOKE_BATCH, name="smoke",
        expansion=expansion, seed=seed, precision=precision,
    )  # fmt: skip


def _but_rate(recipe: Mapping[str, Any]) -> str:
    """What the runs of one point have in common, in one spelling."""
    optimizer = {name: value for name, value in recipe["optimizer"].items() if name != "lr"}
    return json.dumps({**recipe, "optimizer": optimizer}, sort_keys=True)


def _chosen(option: str, value: int | None, known: Sequence[int]) -> Sequence[int]:
    if value is None:
        return known
    if value not in known:
        raise UserError(f"--{option}: {value} is not in the figure; give one of {', '.join(map(str, known))}")
    return (value,)


@report("figure06", experiments=("mqar",))
def figure06(records: Sequence[Record], paper: PaperResults) -> Table:
    """Figure 6 as a table: accuracy by model, length and width, the best of the learning rates and each of them."""
    rows = [(one, t, d) for t in LENGTHS for one in FIGURE_6_MODELS for d in WIDTHS]
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
        column for setting in in_columns(found) for column in columns(rows, found[setting], setting, RATES["6"], ENOUGH)
    ]
    return Table.of(
        "Figure 6. Accuracy of recall (MQAR) by width",
        names + (measured or [(Column("Accuracy (%)"), [NOT_RUN] * len(rows))]),
        [
            "The paper prints no numbers for this figure, and no picture of it was at hand to read points from.",
            _WORDS,
            *beside(at_hand, ("rodimus", "rodimus+"), FIGURE_6_MODELS[2:-1], RATES["6"], CLOSE, ENOUGH),
            _RULE,
            *progress(at_hand, RATES["6"], len(rows), "width"),
            *aside(at_hand, RATES["6"], "width"),
            _CONTINUE.format(figure="6"),
        ],
        sections=[f"{t} tokens" for _, t, _ in rows],
    )


@report("figure01b", experiments=("mqar",))
def figure01b(records: Sequence[Record], paper: PaperResults) -> Table:
    """Figure 1b as a table: accuracy by state expansion n, the paper's points beside ours."""
    rows = [(one, LONG, n) for one in FIGURE_1B_MODELS for n in EXPANSIONS]
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
        for column in columns(rows, found[setting], setting, RATES["1b"], ENOUGH)
    ]
    table = Table.of(
        f"Figure 1b. Accuracy of recall (MQAR) by state expansion: {LONG} tokens, {PAPER_PAIRS[LONG]} pairs, "
        f"d = {LONG_WIDTH}",
        names + (measured or [(Column("Accuracy (%)"), [NOT_RUN] * len(rows))]),
        [
            "The paper's points are read by eye off the picture, to about 1 % of the axis.",
            _RULE,
            *progress(at_hand, RATES["1b"], len(rows), "expansion"),
            *aside(at_hand, RATES["1b"], "expansion"),
            _CONTINUE.format(figure="1b"),
        ],
    )
    return with_order(table, "Accuracy (%)", ("Model", "n"), within=("n",), quoted="Accuracy (%), read by eye")


def _register_figure_6(seq_len: int) -> None:
    @FIGURES.register(f"figure06-{seq_len}")
    def panel(records: Sequence[Record], paper: PaperResults) -> Figure:
        """Figure 6 at one length: accuracy by width."""
        points = _drawn(records, lambda point: _in_6(point) and point.seq_len == seq_len)
        return _figure(
            f"Figure 6. MQAR, {seq_len} tokens, {PAPER_PAIRS[seq_len]} pairs",
            "Width d",
            [(one, WIDTHS) for one in FIGURE_6_MODELS],
            {(point.model, point.width): point for point in points},
            RATES["6"],
            quoted=[],
            command=f"rodimus-lab mqar --length {seq_len} --budget paper",
        )


for _length in LENGTHS:
    _register_figure_6(_length)


@FIGURES.register("figure01b")
def draw_figure_1b(records: Sequence[Record], paper: PaperResults) -> Figure:
    """Figure 1b: accuracy by state expansion, over the paper's points."""
    quoted = []
    for one in FIGURE_1B_MODELS:
        rows = [row for row in paper.figure("01b") if row["model"] == one]
        xs, ys = ([float(str(row[name])) for row in rows] for name in ("expansion", "accuracy"))
        quoted.append(Line(one, xs, ys, sources=["paper, read by eye"] * len(rows), quoted=True))
    return _figure(
        f"Figure 1b. MQAR, {LONG} tokens, {PAPER_PAIRS[LONG]} pairs, d = {LONG_WIDTH}",
        "State expansion n",
        [(one, EXPANSIONS) for one in FIGURE_1B_MODELS],
        {(point.model, point.expansion): point for point in _drawn(records, _in_1b)},
        RATES["1b"],
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


def _in_6(point: Best) -> bool:
    return point.model in FIGURE_6_MODELS and point.seq_len in LENGTHS and point.num_pairs == PAPER_PAIRS[point.seq_len]


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
            stds = [spread_over_seeds(b.runs) for b in best]
            lines.append(Line(name, run, [b.accuracy for b in best], sources, stds=stds, runs=[b.runs for b in best]))
    started = [(name, x) for name, xs in wanted for x in xs if (name, x) in partly]
    ended = tell_points(key for key in started if key not in open_yet)
    unfinished = [key for key in started if key in open_yet]
    remarks = [PRECISIONS[run.recipe["precision"]] for point in points.values() for run in point.runs][:1]
    remarks += [f"not all of {len(rates)} learning rates yet: {ended}"] if ended else []
    x, y = Axis(x_label, "log2"), Axis("Accuracy", "share")
    return Figure(title, x, y, lines, missing, unfinished, remark="; ".join(remarks), command=command)
