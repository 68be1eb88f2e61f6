"""What the runs of scaling-laws say: Figure 4, the laws through its points, and Tables 6, 8 and 9.

FLOPs stand in two accountings (`rodimus_lab/accounting.py`): the paper's rule, which counts the embedding twice,
attention in full and no state updates, and the true one. The paper's points are read by eye off its picture; of Mamba2,
drawn without markers, only the ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Literal, get_args

from rodimus_lab.accounting import Architecture, Mamba2, NoPaperRule, paper_accounting
from rodimus_lab.experiment import report
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.nn.zoo import SIZES, model_config
from rodimus_lab.recipe import Recipe
from rodimus_lab.records import Record
from rodimus_lab.report import (
    FIGURES,
    NOT_RUN,
    Axis,
    Cell,
    Column,
    Figure,
    Line,
    Metric,
    PaperResults,
    Table,
    paper_vs_measured,
)
from rodimus_lab.report.power_law import PowerLaw
from rodimus_lab.report.scaling import Group, Points, band_of, law_of, model_and_size, scaling_points

Rule = Literal["paper", "true"]
RULES: Mapping[Rule, str] = {"paper": "the paper's rule", "true": "truly"}
MODELS = ("rodimus", "rodimus+", "mamba2", "transformer++")
NAMES = ("125m", "350m", "760m", "1.3b")
SEQUENCES = 256  # a batch: 0.5M tokens
PILE = "the Pile"
READ = "The paper prints no numbers for this figure: its points are read by eye, to about 1 % of the axis."
STAND_IN = "Its authors' Pile is not to be had any more; `pile` here is monology/pile-uncopyrighted, a stand-in."
Key = tuple[str, str]


def counted(config: LanguageModelConfig) -> Architecture:
    """The model as the paper's rule counts it, which knows Mamba2 by its shape."""
    mixers = [sublayer for block in config.blocks for sublayer in block.sublayers if sublayer.kind == "mamba2"]
    if not mixers:
        return config
    first, d = mixers[0].to_dict(), config.d_model
    heads = max(1, first["expand"] * d // first["head_width"])
    return Mamba2(len(mixers), d, config.vocab_size, heads, first["head_width"], first["state"], first["conv_width"])


def training_flops(config: LanguageModelConfig, seq_len: int, sequences: int, rule: Rule) -> float | None:
    """FLOPs of training on so many sequences; None where the paper's rule says nothing of the model."""
    if rule == "true":
        return config.training_flops_per_token(seq_len) * seq_len * sequences
    try:
        return paper_accounting(counted(config), seq_len).training_flops * sequences
    except NoPaperRule:
        return None


def flops_of(record: Record, rule: Rule) -> float | None:
    recipe = Recipe.from_dict(record.recipe)
    steps = record.metrics.get("steps", recipe.budget.steps)
    return training_flops(recipe.model, recipe.data.seq_len, recipe.budget.batch_size * steps, rule)


@cache
def flops_at(model: str, size: str, rule: Rule) -> float:
    """FLOPs of a run of Table 8."""
    steps = next(int(float(str(row["steps"]))) for row in PaperResults().table(8) if str(row["size"]).lower() == size)
    flops = training_flops(model_config(model, size=size), SIZES[size].context, SEQUENCES * steps, rule)
    assert flops is not None
    return flops


def ratio_of(record: Record) -> float:
    """Tokens that a run was trained for a parameter beside the embedding."""
    recipe = Recipe.from_dict(record.recipe)
    parameters = recipe.model.num_params() - recipe.model.vocab_size * recipe.model.d_model
    return recipe.budget.steps * recipe.budget.batch_size * recipe.data.seq_len / parameters


def quoted(paper: PaperResults) -> dict[Key, tuple[float, float]]:
    """(FLOPs, perplexity) of the paper's points."""
    return {
        (str(row["model"]), str(row["size"]).lower()): (float(str(row["train_flops"])), float(str(row["valid_ppl"])))
        for row in paper.figure("04")
    }


def groups_of(records: Sequence[Record]) -> dict[Group, Points]:
    """The points of Table 8's sizes and of the ladders; Table 9's are trained otherwise and make no law."""
    own = [record for record in records if record.label.rpartition("-")[2] not in TABLE_9]
    groups = {
        group: {key: point for key, point in points.items() if group.budget != "paper" or key[1] in NAMES}
        for group, points in scaling_points(own, ratio_of).items()
    }
    return {group: points for group, points in groups.items() if points}


@report("figure04", experiments=("scaling-laws",))
def figure04(records: Sequence[Record], paper: PaperResults) -> Table:
    """Figure 4 as a table: FLOPs by both accountings and perplexity, the paper's points beside ours."""
    groups, points = groups_of(records), quoted(paper)
    rows: list[Key] = [(model, size) for model in MODELS for size in NAMES]
    for found in groups.values():
        rows += [key for key in found if key not in rows]
    runs = {key: point.runs[-1] for found in groups.values() for key, point in found.items()}
    columns: list[tuple[Column, list[Cell]]] = [
        (Column("Model"), [Cell(model) for model, _ in rows]),
        (Column("Size"), [Cell(size) for _, size in rows]),
        (Column("FLOPs, the paper's rule"), [_flops(key, runs, "paper") for key in rows]),
        (Column("FLOPs, truly"), [_flops(key, runs, "true") for key in rows]),
        (
            Column("FLOPs, read by eye"),
            [Cell(f"{points[key][0]:.2e}" if key in points else None, source="paper") for key in rows],
        ),
        (
            Column("Valid PPL, read by eye"),
            [Cell(points[key][1] if key in points else None, digits=2, source="paper") for key in rows],
        ),
    ]
    for group, found in groups.items():
        columns.append((Column("Valid PPL", "lower"), [_ppl(found, key, group) for key in rows]))
    if not groups:
        columns.append((Column("Valid PPL"), [NOT_RUN] * len(rows)))
    computed = "the models' configs and the steps of Table 8, or of the run"
    return _table("Figure 4. Perplexity against training FLOPs", columns, [READ, STAND_IN], computed)


@report("figure04-fit", experiments=("scaling-laws",))
def figure04_fit(records: Sequence[Record], paper: PaperResults) -> Table:
    """The power laws through Figure 4's points: loss = scale * FLOPs^-exponent, with intervals of 95 %."""
    groups, points = groups_of(records), quoted(paper)
    rows = [(model, rule) for model in MODELS for rule in get_args(Rule)]
    columns: list[tuple[Column, list[Cell]]] = [
        (Column("Model"), [Cell(model) for model, _ in rows]),
        (Column("FLOPs"), [Cell(RULES[rule]) for _, rule in rows]),
    ]
    theirs = [_law_of_quoted(points, model, rule) for model, rule in rows]
    columns += [
        (Column("Exponent, points read by eye"), [_exponent(law) for law in theirs]),
        (Column("95 %"), [Cell(_interval(law), source="computed") for law in theirs]),
    ]
    for group, found in groups.items():
        laws = [_law_of_measured(found, model, rule) for model, rule in rows]
        if not any(laws):
            continue
        ids = ["; ".join(point.ids for (name, _), point in found.items() if name == model) for model, _ in rows]
        devices = "; ".join(dict.fromkeys(point.devices for point in found.values()))

        def measured(
            value: float | str | None,
            run_ids: str,
            group: Group = group,
            device: str = devices,
            digits: int | None = None,
        ) -> Cell:
            return Cell(
                value, digits, "measured", run_ids or None, group.corpus, group.text, device, "", group.tokenizer
            )

        columns += [
            (
                Column("Exponent"),
                [
                    measured(law.exponent if law else None, run_ids, digits=4)
                    for law, run_ids in zip(laws, ids, strict=True)
                ],
            ),
            (Column("95 %"), [measured(_interval(law), run_ids) for law, run_ids in zip(laws, ids, strict=True)]),
            (
                Column("Loss at 1e18"),
                [
                    measured(law(1e18) if law else None, run_ids, digits=3)
                    for law, run_ids in zip(laws, ids, strict=True)
                ],
            ),
        ]
    notes = [
        "Loss in nats a token, FLOPs of training; least squares on the logarithms, three points at least. " + READ,
        "Ladders span small sizes and a stand-in corpus: their laws compare models with one another, not with the "
        "paper's.",
    ]
    return _table("Figure 4. The laws through its points", columns, notes, "the paper's points, by the fit above")


@report("table6", experiments=("scaling-laws", "pile"))
def table6(records: Sequence[Record], paper: PaperResults) -> Table:
    """Table 6: validation perplexity at 350M, the paper's beside ours."""
    mine = [r for r in records if r.label.endswith(("-350m", "-smoke"))]
    return paper_vs_measured(
        paper.table(6),
        mine,
        title="Table 6. Perplexity on the Pile, 350M parameters",
        metrics=(
            Metric("Params (M)", "params", None, better=None, scale=1e-6),
            Metric("Valid PPL", "valid_ppl", "valid_ppl"),
            Metric("Test PPL", "test_ppl", None),
        ),
        record_key=lambda record: (model_and_size(record.label)[0],),
        paper_corpus=PILE,
        caption="Perplexity is per token of the stated tokenizer.",
        notes=[STAND_IN],
    )


@report("table8", experiments=("scaling-laws",))
def table8(records: Sequence[Record], paper: PaperResults) -> Table:
    """Table 8: its settings, the parameters of the four models at them, and what each reached."""
    groups = {group: found for group, found in groups_of(records).items() if group.budget == "paper"}
    settings = {str(row["size"]).lower(): row for row in paper.table(8)}
    rows: list[Key] = [(model, size) for size in NAMES for model in MODELS]
    columns: list[tuple[Column, list[Cell]]] = [
        (Column("Size"), [Cell(size) for _, size in rows]),
        (Column("Model"), [Cell(model) for model, _ in rows]),
    ]
    for heading, name in (
        ("Layers", "n_layers"), ("d", "d_model"), ("Heads", "n_heads"), ("Steps", "steps"), ("Rate", "peak_lr"),
        ("Batch (M tokens)", "batch_m_tokens"), ("Tokens (B)", "tokens_b"),
    ):  # fmt: skip
        columns.append((Column(heading), [Cell(settings[size][name], source="paper") for _, size in rows]))
    params = [model_config(model, size=size).num_params() / 1e6 for model, size in rows]
    columns.append((Column("Params (M)"), [Cell(count, digits=1, source="computed") for count in params]))
    for group, found in groups.items():
        columns.append((Column("Valid PPL", "lower"), [_ppl(found, key, group) for key in rows]))
    if not groups:
        columns.append((Column("Valid PPL"), [NOT_RUN] * len(rows)))
    return _table("Table 8. The scaling sizes and their training", columns, [STAND_IN], "the models' configs")


TABLE_9 = {"130m": "0.13", "460m": "0.46", "1.4b": "1.4", "1.6b": "1.4"}


@report("table9", experiments=("scaling-laws",))
def table9(records: Sequence[Record], paper: PaperResults) -> Table:
    """Table 9: the settings of the released models, and what runs at them reached."""
    settings = {str(row["params_b"]): row for row in paper.table(9)}
    mine = {}
    for record in sorted(records, key=lambda record: (record.finished, record.id)):
        if record.budget["name"] == "paper" and record.label.rpartition("-")[2] in TABLE_9:
            mine[model_and_size(record.label)] = record
    rows: list[Key] = [
        (model, size)
        for size in TABLE_9
        for model in ("rodimus", "rodimus+")
        if (model, size) not in (("rodimus+", "1.4b"), ("rodimus", "1.6b"))
    ]
    theirs = [settings[TABLE_9[size]] for _, size in rows]
    columns: list[tuple[Column, list[Cell]]] = [
        (Column("Model"), [Cell(model) for model, _ in rows]),
        (Column("Size"), [Cell(size) for _, size in rows]),
    ]
    for heading, name in (
        ("Tokenizer", "tokenizer"), ("Context", "seq_len"), ("Batch (M tokens)", "batch_m_tokens"),
        ("Rate", "peak_lr"), ("Least rate", "min_lr"),
    ):  # fmt: skip
        columns.append((Column(heading), [Cell(row[name], source="paper") for row in theirs]))
    found = [mine.get(key) for key in rows]
    for corpus, tokenizer in sorted({(r.corpus, r.tokenizer) for r in found if r}):
        cells = [_of_table_9(r if r and (r.corpus, r.tokenizer) == (corpus, tokenizer) else None) for r in found]
        columns.append((Column("Valid PPL", "lower"), cells))
    if not any(found):
        columns.append((Column("Valid PPL"), [NOT_RUN] * len(rows)))
    notes = [
        "The 1.6B model is trained by the row of 1.4B; steps are the tokens of Table 2 over the batch.",
        "The corpus behind the Rodimus tokenizer's rows is not public. " + STAND_IN,
    ]
    return _table("Table 9. Training settings of the released models", columns, notes)


def _of_table_9(record: Record | None) -> Cell:
    if record is None or record.metrics.get("valid_ppl") is None:
        return NOT_RUN
    return Cell(
        record.metrics["valid_ppl"], 2, "measured", record.id, record.corpus, "paper budget", record.device,
        record.budget_text, record.tokenizer,
    )  # fmt: skip


def _register(name: str, rule: Rule, short: bool) -> None:
    @FIGURES.register(name)
    def make(records: Sequence[Record], paper: PaperResults) -> Figure:
        """Perplexity against FLOPs by one rule, with the law through each model's points."""
        own = [r for r in records if r.experiment == "scaling-laws" and (r.budget["name"] == "paper") is not short]
        groups = {group: found for group, found in groups_of(own).items() if group.budget in ("paper", "short")}
        chosen = max(groups, key=lambda group: len(groups[group])) if groups else None
        lines = [] if short else list(_quoted_lines(quoted(paper), rule))
        missing: list[tuple[str, float | None]] = []
        bands = []
        for model in MODELS:
            found = {} if chosen is None else {k: p for k, p in groups[chosen].items() if k[0] == model}
            placed = sorted((flops, p) for p in found.values() if (flops := flops_of(p.runs[-1], rule)) is not None)
            if not short:
                missing += [(model, _digits(flops_at(model, s, rule))) for s in NAMES if (model, s) not in found]
            elif not placed:
                missing.append((model, None))
            if placed:
                xs = [_digits(flops) for flops, _ in placed]
                points = [point for _, point in placed]
                stds, runs = [point.std for point in points], [point.runs for point in points]
                lines.append(Line(model, xs, [point.ppl for point in points], stds=stds, runs=runs))
                if law := law_of(xs, [p.loss for _, p in placed]):
                    bands.append(band_of(model, law, xs))
        where = "" if chosen is None else f", {chosen.corpus}, {chosen.text}"
        title = f"{'The short ladder' if short else 'Figure 4. Perplexity against compute'}{where}"
        x, y = Axis(f"Training FLOPs ({RULES[rule]})", "log"), Axis("Valid PPL", "tight")
        command = f"rodimus-lab scaling-laws --budget {'short' if short else 'paper'}"
        return Figure(title, x, y, lines, missing, bands=bands, command=command, paper_corpus=PILE)


for _rule in get_args(Rule):
    _register("figure04" if _rule == "paper" else "figure04-true", _rule, short=False)
    _register("figure04-short" if _rule == "paper" else "figure04-short-true", _rule, short=True)


def _quoted_lines(points: Mapping[Key, tuple[float, float]], rule: Rule) -> list[Line]:
    """The paper's points; by the true accounting they stand at what their runs really cost."""
    lines = []
    for model in MODELS:
        sizes = [size for size in NAMES if (model, size) in points]
        xs = [points[model, s][0] if rule == "paper" else _digits(flops_at(model, s, rule)) for s in sizes]
        ys = [points[model, size][1] for size in sizes]
        lines.append(Line(model, xs, ys, sources=["paper, read by eye"] * len(xs), quoted=True))
    return lines


def _law_of_quoted(points: Mapping[Key, tuple[float, float]], model: str, rule: Rule) -> PowerLaw | None:
    found = {size: point for (name, size), point in points.items() if name == model}
    flops = [x if rule == "paper" else flops_at(model, size, rule) for size, (x, _) in found.items()]
    return law_of(flops, [math.log(y) for _, y in found.values()])


def _law_of_measured(points: Points, model: str, rule: Rule) -> PowerLaw | None:
    found = [(flops_of(p.runs[-1], rule), p.loss) for (name, _), p in points.items() if name == model]
    known = [(flops, loss) for flops, loss in found if flops is not None]
    return law_of([flops for flops, _ in known], [loss for _, loss in known])


def _exponent(law: PowerLaw | None) -> Cell:
    return Cell(law.exponent if law else None, digits=4, source="computed")


def _interval(law: PowerLaw | None) -> str | None:
    return None if law is None else "{:.4f} to {:.4f}".format(*law.exponent_interval())


def _flops(key: Key, runs: Mapping[Key, Record], rule: Rule) -> Cell:
    model, size = key
    flops = flops_at(model, size, rule) if model in MODELS and size in NAMES else flops_of(runs[key], rule)
    return Cell(None if flops is None else f"{flops:.3e}", source="computed")


def _ppl(points: Points, key: Key, group: Group) -> Cell:
    point = points.get(key)
    if point is None:
        return NOT_RUN
    return Cell(
        point.ppl, 2, "measured", point.ids, group.corpus, group.text, point.devices, point.runs[-1].budget_text,
        group.tokenizer, count=len(point.runs),
    )  # fmt: skip


def _digits(flops: float) -> float:
    return float(f"{flops:.4g}")


def _table(
    title: str, columns: Sequence[tuple[Column, Sequence[Cell]]], notes: Sequence[str], computed: str = ""
) -> Table:
    return Table.of(title, columns, notes, paper_corpus=PILE, computed=computed)
