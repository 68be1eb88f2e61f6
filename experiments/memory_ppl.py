"""Perplexity against the bytes of the cache: Figure 1a on WikiText-103 and Table 7 on the Pile.

The recurrent models' states grow with n, StreamingLLM's with its window (of which the token itself is one) beside 4
sinks. n is a field of Rodimus, Mamba and Mamba2; of GLA and HGRN2, whose states are n x d in all, it is the width of a
head, so that the number of heads falls as n grows and the parameters stay. StreamingLLM is trained with its window; the
paper does not say whether its numbers are of a Transformer++ that was trained without one.

Figure 1a's axis says "M Bytes" and shows millions of elements: in bfloat16 the caches are twice as many bytes. Bytes
here are those of real states, without the windows of short convolutions, as the paper has them.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field

from rodimus_lab.accounting import HALF, real_memory
from rodimus_lab.experiment import BudgetName, choose_budget, experiment, report
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.nn.zoo import SIZES, slug, with_sublayers
from rodimus_lab.recipe import Recipe
from rodimus_lab.records import Record
from rodimus_lab.registry import plain_spelling
from rodimus_lab.report import (
    FIGURES,
    Axis,
    Cell,
    Figure,
    Line,
    Metric,
    Panels,
    PaperResults,
    PaperRow,
    Printed,
    Table,
    paper_vs_measured,
    with_order,
)
from rodimus_lab.variant import Change, Row, Variant, distinct, listed, rows_of

MEMORY_PPL = "memory-ppl"
SINKS = 4
EXPANSIONS = (16, 32, 64, 128, 256)
FIGURE_1A = {
    "rodimus": EXPANSIONS,
    "rodimus+": EXPANSIONS,
    "mamba": EXPANSIONS[:-1],
    "mamba2": EXPANSIONS,
    "hgrn2": EXPANSIONS,
    "gla": EXPANSIONS,
    "streaming_llm": (16, 32, 64, 128, 256, 512),
}
# By the megabytes of Table 7's header, n or, for StreamingLLM, all keys of the cache.
TABLE_7 = {
    "streaming_llm": {"1.2": 32, "2.3": 64, "4.7": 128, "9.4": 256},
    "mamba2": {"1.2": 16, "2.3": 32, "4.7": 64, "9.4": 128},
    "rodimus": {"1.2": 16, "2.3": 32, "4.7": 64, "9.4": 128},
}
MILLION = 1e6
CORPUS, BEST = "wikitext-103", "best_valid_ppl"
COMMAND = "rodimus-lab memory-ppl --budget paper"
COMPUTED = "the real states of each model's config, made and measured in bytes"
AXIS = "Cache of one sequence in bfloat16"
PRINTED_AXIS = 'Millions of elements, which the paper calls "M Bytes"'


def sized(model: str, amount: int) -> Change:
    """The model with this n, or for StreamingLLM with a window of so many keys."""
    if model == "gla":
        return lambda config: with_sublayers(config, "gla", _heads_of(config.d_model, amount))
    kind, fields = {
        "rodimus": ("rodimus", {"n": amount}),
        "rodimus+": ("rodimus", {"n": amount}),
        "mamba": ("mamba", {"state": amount}),
        "mamba2": ("mamba2", {"state": amount}),
        "hgrn2": ("hgrn2", {"expand": amount}),
        "streaming_llm": ("streaming_llm", {"window": amount, "sinks": SINKS}),
    }[model]
    return lambda config: with_sublayers(config, kind, fields)


def _heads_of(d_model: int, n: int) -> dict[str, Any]:
    # The keys are half the model's width, or one head of width n where that is more.
    return {"num_heads": max(1, d_model // 2 // n), "expand_k": max(0.5, n / d_model)}


@cache
def points(artefact: str) -> dict[Row, Variant]:
    """The runs of figure1a, by model and n or window, or of table7, by model and printed megabytes."""
    if artefact == "figure1a":
        return {
            (model, str(amount)): _point(_base(model, "wikitext103", "wikitext-103"), amount, amount)
            for model, amounts in FIGURE_1A.items()
            for amount in amounts
        }
    return {
        (model, printed): _point(_base(model, "125m", "125m"), amount, amount - SINKS * (model == "streaming_llm"))
        for model, amounts in TABLE_7.items()
        for printed, amount in amounts.items()
    }


def _base(model: str, size: str, setting: str) -> Variant:
    label = slug(model)
    if setting == "wikitext-103":
        return Variant(label, model, size, setting, SIZES[size].num_layers, "wikitext103")
    return Variant(f"{label}-{size}", model, size, setting, SIZES[size].num_layers, MEMORY_PPL)


def _point(base: Variant, named: int, amount: int) -> Variant:
    """The base itself where it has this size already."""
    label = f"window{amount}" if base.model == "streaming_llm" else f"n{named}"
    varied = base.varied(MEMORY_PPL, label, sized(base.model, amount))
    return base if varied.config(smoke=False) == base.config(smoke=False) else varied


def cache_bytes(config: LanguageModelConfig, context: int) -> int:
    """Bytes of the real states of one sequence in bfloat16: recurrent states, keys and values."""
    return real_memory(config, 1, context).remembered


@experiment(MEMORY_PPL, reports=("table1", "table7", "figure01a"))
def memory_ppl(
    artefact: Annotated[
        Literal["figure1a", "table7"], Field(description="Figure 1a on WikiText-103 or Table 7 on the Pile.")
    ] = "figure1a",
    model: Annotated[list[str] | None, Field(description="Only these models.")] = None,
    amount: Annotated[
        list[str] | None, Field(description="Only these n or windows; of table7, only these megabytes.")
    ] = None,
    budget: BudgetName | None = None,
    corpus: str | None = None,
    steps: Annotated[int | None, Field(ge=1)] = None,
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> Sequence[Recipe]:
    """Train models with caches of several sizes and set perplexity against bytes (Figure 1a, Table 7).

    Values of an option may be joined by commas. Points at a model's own size are Table 1's runs.
    """
    found = points(artefact)
    for index, (option, asked) in enumerate((("model", model), ("amount", amount))):
        if asked is not None:
            values = listed(option, asked, dict.fromkeys(row[index] for row in found))
            found = {row: variant for row, variant in found.items() if row[index] in values}
    name, _ = choose_budget(budget)
    return distinct(
        variant.recipe(name, corpus=corpus, steps=steps, dropout=dropout, seed=seed) for variant in found.values()
    )


@report("figure01a", experiments=(MEMORY_PPL, "wikitext103"))
def figure01a(records: Sequence[Record], paper: PaperResults) -> Table:
    """The points of Figure 1a: the axis as printed, the elements and the bytes that it stands for, and perplexity."""
    variants = points("figure1a")
    printed = [{**row, "size": row["expansion"] or row["window"]} for row in paper.figure("01a")]
    shown = {_row(row): row["cache_m_elements"] for row in printed}
    context = SIZES["wikitext103"].context
    held = {row: cache_bytes(variant.config(smoke=False), context) for row, variant in variants.items()}
    given = {
        "Axis (M Bytes)": lambda row: Cell(shown[_plain(row)], source="paper"),
        "Elements (M)": lambda row: Cell(held[_plain(row)] / HALF.itemsize / MILLION, digits=3, source="computed"),
        "Cache (MB)": lambda row: Cell(held[_plain(row)] / MILLION, digits=3, source="computed"),
    }
    table = _measured(
        "figure1a",
        records,
        printed,
        "Figure 1a. Perplexity on WikiText-103 against the cache",
        (Metric("Best valid PPL", BEST, "valid_ppl"), Metric("Best test PPL", "best_test_ppl", None)),
        ("model", "size"),
        ("Model", "n or window"),
        corpus=CORPUS,
        given=given,
        notes=[
            'The paper\'s axis says "M Bytes" but shows millions of elements; in bfloat16 the bytes are twice as many. '
            f"The cache is read off real states of one sequence of {context} tokens, without the windows of short "
            f"convolutions. StreamingLLM's is its window and {SINKS} sinks, and at a window of 512 no more than the "
            "512 tokens that there are. The paper's perplexities are read by eye.",
        ],
    )
    return with_order(table, "Best valid PPL", ("Model", "n or window"))


@report("table7", experiments=(MEMORY_PPL,))
def table7(records: Sequence[Record], paper: PaperResults) -> Table:
    """Table 7: perplexity on the Pile at 125M against the cache."""
    variants = points("table7")
    context = SIZES["125m"].context
    held = {row: cache_bytes(variant.config(smoke=False), context) for row, variant in variants.items()}
    given = {
        "n, or keys of the cache": lambda row: Cell(str(TABLE_7[row[0]][row[1]])),
        "Cache (MB)": lambda row: Cell(held[row] / MILLION, digits=3, source="computed"),
    }
    table = _measured(
        "table7",
        records,
        paper.table(7),
        "Table 7. Perplexity on the Pile at 125M against the cache",
        (Metric("Valid PPL", "valid_ppl", "valid_ppl"),),
        ("model", "cache_mb"),
        ("Model", "M Bytes"),
        corpus="pile",
        given=given,
        notes=[
            f"The cache is read off real states of one sequence of {context:,} tokens in bfloat16, without the windows "
            "of short convolutions. Here the paper's axis is of bytes; its 2.3 is 2.359, cut.",
        ],
    )
    return with_order(table, "Valid PPL", ("Model", "M Bytes"))


def _measured(
    artefact: str,
    records: Sequence[Record],
    printed: Sequence[PaperRow],
    title: str,
    metrics: Sequence[Metric],
    key: Sequence[str],
    headings: Sequence[str],
    *,
    corpus: str,
    **options: Any,
) -> Table:
    rows = {record.path: row for record, row in rows_of(points(artefact), records)}
    return paper_vs_measured(
        printed,
        [record for record in records if record.path in rows],
        title=title,
        metrics=metrics,
        key=key,
        headings=headings,
        record_key=lambda record: rows[record.path],
        paper_corpus=corpus,
        computed=COMPUTED,
        **options,
    )


@FIGURES.register("figure01a")
def draw_figure_1a(records: Sequence[Record], paper: PaperResults) -> Panels:
    """Perplexity against true bytes, the printed axis above; the paper's points, then a panel for every setting run."""
    variants, context = points("figure1a"), SIZES["wikitext103"].context
    held = {row: cache_bytes(variant.config(smoke=False), context) for row, variant in variants.items()}
    quoted = {_row({**row, "size": row["expansion"] or row["window"]}): row["valid_ppl"] for row in paper.figure("01a")}
    panels = [_panel("The paper, WikiText-103 (read by eye)", _quoted_lines(held, quoted))]
    own = [record for record in records if record.experiment in (MEMORY_PPL, "wikitext103")]
    settings: dict[str, dict[Row, list[Record]]] = {}
    for record, row in rows_of(variants, own):
        if record.metrics.get(BEST) is not None:
            settings.setdefault(_setting(record), {}).setdefault(row, []).append(record)
    panels += [_panel(title, _measured_lines(settings[title])) for title in sorted(settings)]
    if not settings:
        panels.append(_panel("Ours", [], missing=[(model, size) for (model, _), size in held.items()]))
    remark = "" if not settings else f"points of ours that are not drawn have not been run ({COMMAND})"
    return Panels("Figure 1a. Best validation perplexity against the cache", panels, remark=remark)


def _setting(record: Record) -> str:
    stand_in = "" if record.corpus == CORPUS else " standing in"
    return f"Ours, {record.corpus}{stand_in}, {record.budget['steps']:,} steps ({record.budget['name']})"


def _quoted_lines(held: Mapping[Row, int], ppls: Mapping[Row, Any]) -> list[Line]:
    lines = []
    for model in FIGURE_1A:
        points = sorted((size, float(ppls[row])) for row, size in held.items() if row[0] == model)
        sizes, perplexities = zip(*points, strict=True)
        lines.append(Line(model, sizes, perplexities, ["paper, read by eye"] * len(points)))
    return lines


def _measured_lines(found: Mapping[Row, Sequence[Record]]) -> list[Line]:
    """Points are means over the seeds of one row, at the bytes of the model that was trained."""
    lines = []
    for model in FIGURE_1A:
        groups = {_trained_bytes(runs[0]): runs for (name, _), runs in found.items() if name == model}
        if groups:
            sizes, runs = zip(*sorted(groups.items()), strict=True)
            ppls = [[run.metrics[BEST] for run in some] for some in runs]
            stds = [statistics.stdev(some) if len(some) > 1 else 0.0 for some in ppls]
            lines.append(Line(model, sizes, [*map(statistics.fmean, ppls)], stds=stds, runs=runs))
    return lines


def _trained_bytes(record: Record) -> int:
    return cache_bytes(LanguageModelConfig.from_dict(record.recipe["model"]), record.recipe["data"]["seq_len"])


def _panel(title: str, lines: Sequence[Line], missing: Sequence[tuple[str, float]] = ()) -> Figure:
    also = (PRINTED_AXIS, 1 / HALF.itemsize / MILLION)
    x, y = Axis(AXIS, unit="B", also=also), Axis("Best validation perplexity", "linear")
    return Figure(title, x, y, lines, missing, size=(6.5, 5.2), command=COMMAND, paper_corpus=CORPUS)


def _row(row: PaperRow) -> Row:
    size = row["size"]
    assert isinstance(size, Printed)
    return str(row["model"]), size.text


def _plain(row: Row) -> Row:
    return plain_spelling(row[0]), row[1]
