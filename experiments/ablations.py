"""The ablations of Appendix D.10 (Tables 12 to 18), and a few beyond them: each run is one change to one base recipe.

Bases are Table 1's Rodimus and Rodimus+ on WikiText-103, and on the Pile what the tables' own numbers imply: Tables 12
to 14 fit Table 5's second column (7.0 B tokens), Table 18 fits Table 8's 350M row. In Table 15 the first gate is
beta_hat; Table 16's two runs have beta_hat and neither g nor tau.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Annotated, Any

from pydantic import Field

from rodimus_lab.accounting import paper_accounting, true_accounting
from rodimus_lab.errors import UserError
from rodimus_lab.experiment import BudgetName, choose_budget, experiment, report
from rodimus_lab.nn.block import BlockConfig
from rodimus_lab.nn.heads import HeadKind, HeadSharing
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.nn.rodimus import SelectionGate, TemperatureGate, ValueDecay, ValueGate
from rodimus_lab.nn.zoo import SIZES, slug, with_sublayers
from rodimus_lab.recipe import Recipe
from rodimus_lab.records import Record
from rodimus_lab.registry import plain_spelling
from rodimus_lab.report import Cell, Metric, PaperResults, PaperRow, Table, paper_vs_measured, with_order
from rodimus_lab.variant import Change, Row, Variant, distinct, listed, rows_of

ABLATE = "ablate"
RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
EXPANSIONS = (16, 32, 64, 128, 256)
WINDOWS = (32, 64, 128, 256, 512)
MODELS_OF_14 = ("transformer++", "rodimus+")
KINDS: tuple[HeadKind, ...] = ("mha", "gqa", "mqa", "ska")
HOPS = {"two": "yes", "one": "no"}
ORDERS = {"rodimus-first": "Rodimus + X", "attention-first": "X + Rodimus"}
FIXED_TAU = 0.5
HEAD_WIDTH = 128  # of the attention of Table 14, whose memory says so
GROUPS = 2


RODIMUS = Variant("rodimus", "rodimus", "wikitext103", "wikitext-103", 6, "wikitext103")
PLUS = Variant("rodimus_plus", "rodimus+", "wikitext103", "wikitext-103", 6, "wikitext103")
PLUS_PILE = Variant("rodimus_plus-350m", "rodimus+", "350m", "350m", 24, ABLATE)


def rodimus(**fields: Any) -> Change:
    """Fields of every Rodimus sublayer."""
    return lambda config: with_sublayers(config, "rodimus", fields)


def heads(kind: HeadKind) -> Change:
    """The sharing of attention heads: 128 wide, or four of them where the model is narrow."""

    def change(config: LanguageModelConfig) -> LanguageModelConfig:
        count = max(config.d_model // HEAD_WIDTH, 4)
        sharing = HeadSharing.of(kind, count, GROUPS)
        return with_sublayers(config, "attention", {"heads": sharing, "head_width": config.d_model // count})

    return change


def blocks(arrange: Callable[[BlockConfig], Any]) -> Change:
    """The hops of every block."""
    return lambda config: config.replace(
        pattern=tuple(block.replace(hops=arrange(block)) for block in config.pattern),
    )


def one_hop(block: BlockConfig) -> Any:
    """Without the two-hop residual every sublayer is a hop of its own."""
    return tuple((sublayer,) for sublayer in block.sublayers)


def attention_first(block: BlockConfig) -> Any:
    """The two hops of Eq. 13 the other way round."""
    return tuple(reversed(block.hops))


def gates(beta_hat: bool, g: bool, tau: bool, beta: bool = False) -> Variant:
    """Table 1's Rodimus with these gates, a row of Table 15 or 16."""
    if (beta_hat, g, tau, beta) == (True, True, True, False):
        return RODIMUS
    kept = {"beta_hat": beta_hat, "g": g, "tau": tau, "beta": beta}
    fields = {
        "beta_hat": ValueGate() if beta_hat else None,
        "g": SelectionGate() if g else None,
        "tau": TemperatureGate() if tau else None,
        "beta": ValueDecay() if beta else None,
    }
    return RODIMUS.varied(
        ABLATE, f"gates-{'-'.join(name for name, on in kept.items() if on) or 'none'}", rodimus(**fields)
    )


def state(size: str, expansion: int = 16, rank: int = 16) -> Variant:
    """A point of Tables 12 and 13, which share n = 16, ell = 16."""
    base = Variant(
        f"rodimus-{size}",
        "rodimus",
        size,
        "pile-7b",
        SIZES[size].num_layers,
        ABLATE,
        rodimus(n=16, beta_hat=ValueGate()),
    )
    if (expansion, rank) == (16, 16):
        return base
    label = f"rank{rank}" if expansion == 16 else f"n{expansion}" if rank == 16 else f"n{expansion}-rank{rank}"
    return base.varied(ABLATE, label, rodimus(n=expansion, beta_hat=ValueGate(rank=rank)))


def sharing(model: str, kind: HeadKind) -> Variant:
    """A row of Table 14: the base is MHA in Transformer++, the paper's SKA in Rodimus+."""
    own: HeadKind = "mha" if model == "transformer++" else "ska"
    base = Variant(f"{slug(model)}-125m", model, "125m", "pile-7b", 12, ABLATE, heads(own))
    return base if kind == own else base.varied(ABLATE, kind, heads(kind))


def hops(kind: str, layers: int) -> Variant:
    """A row of Table 17."""
    deep = PLUS if layers == 6 else PLUS.varied(ABLATE, f"{layers}-layers", layers=layers)
    return deep if kind == "two" else deep.varied(ABLATE, "one-hop", blocks(one_hop))


def order(kind: str, on_pile: bool) -> Variant:
    """A cell of Table 18."""
    base = PLUS_PILE if on_pile else PLUS
    return base if kind == "rodimus-first" else base.varied(ABLATE, kind, blocks(attention_first))


@cache
def tables() -> dict[int, dict[Row, Variant]]:
    """Every run of Tables 12 to 18, by the words that name its row in the paper's CSV."""
    yes_no = {True: "yes", False: "no"}
    sizes = {"125M": "125m", "350M": "350m"}
    rows15 = [(False, False, False), (True, False, False), (False, True, False)]
    rows15 += [(False, True, True), (True, True, False), (True, True, True)]
    return {
        12: {(name, str(rank)): state(size, rank=rank) for name, size in sizes.items() for rank in RANKS},
        13: {(name, str(n)): state(size, expansion=n) for name, size in sizes.items() for n in EXPANSIONS},
        14: {(model, kind): sharing(model, kind) for model in MODELS_OF_14 for kind in KINDS if kind != "mqa"},
        15: {tuple(yes_no[on] for on in row): gates(*row) for row in rows15},
        16: {("yes",): gates(True, False, False, beta=True), ("no",): gates(True, False, False)},
        17: {(str(layers), word): hops(kind, layers) for layers in (6, 24) for kind, word in HOPS.items()},
        18: {
            (word, corpus, str(layers)): order(kind, corpus == "Pile")
            for kind, word in ORDERS.items()
            for corpus, layers in (("WikiText-103", 6), ("Pile", 24))
        },
    }


@cache
def axes() -> dict[str, dict[str, list[Variant]]]:
    """What can be asked for by name: option -> value -> runs."""
    on_off = {"on": True, "off": False}
    sizes = ("125m", "350m")
    switches: dict[str, dict[str, Any]] = {
        "key_norm": {"key_norm": False},
        "feedthrough": {"feedthrough": False},
        "short_conv": {"conv_width": 0},
    }
    return {
        "gate": {
            "g": [RODIMUS, gates(True, False, False)],
            "tau": [RODIMUS, gates(True, True, False)],
            "beta-hat": [RODIMUS, gates(False, True, True)],
            "beta": [gates(True, False, False), gates(True, False, False, beta=True)],
        },
        "rank": {str(rank): [state(size, rank=rank) for size in sizes] for rank in RANKS},
        "expansion": {str(n): [state(size, expansion=n) for size in sizes] for n in EXPANSIONS},
        "heads": {kind: [sharing(model, kind) for model in MODELS_OF_14] for kind in KINDS},
        "hops": {kind: [hops(kind, layers) for layers in (6, 24)] for kind in HOPS},
        "order": {kind: [order(kind, on_pile) for on_pile in (False, True)] for kind in ORDERS},
        "gate_temperature": {
            "learned": [RODIMUS],
            "fixed": [RODIMUS.varied(ABLATE, "fixed-tau", rodimus(tau=TemperatureGate(fixed=FIXED_TAU)))],
        },
        **{
            option: {
                word: [RODIMUS if on else RODIMUS.varied(ABLATE, f"no-{option}", rodimus(**fields))]
                for word, on in on_off.items()
            }
            for option, fields in switches.items()
        },
        "window": {str(window): [windowed(window)] for window in WINDOWS},
    }


def windowed(window: int) -> Variant:
    """Table 1's Rodimus+ whose attention sees so many keys; 256, half of the training context, is its own."""

    def change(config: LanguageModelConfig) -> LanguageModelConfig:
        return with_sublayers(config, "attention", {"window": window})

    return PLUS if window == 256 else PLUS.varied(ABLATE, f"window{window}", change)


Values = list[str] | None


def _about(text: str) -> Any:
    return Field(description=text)


@experiment(ABLATE, reports=("table1", *(f"table{number}" for number in range(12, 19))))
def ablate(
    table: Annotated[Values, _about("All runs of a table, 12 to 18.")] = None,
    gate: Annotated[Values, _about("g, tau, beta-hat, beta: with it and without (Tables 15 and 16).")] = None,
    rank: Annotated[Values, _about("Of the value gate: 1, 2, 4 up to 128 (Table 12).")] = None,
    expansion: Annotated[Values, _about("The n of the state: 16, 32 up to 256 (Table 13).")] = None,
    heads: Annotated[Values, _about("mha, gqa, mqa, ska, in Transformer++ and Rodimus+ (Table 14).")] = None,
    hops: Annotated[
        Values, _about("two, one: with the two-hop residual or without, 6 and 24 layers (Table 17).")
    ] = None,
    order: Annotated[Values, _about("rodimus-first, attention-first (Table 18).")] = None,
    gate_temperature: Annotated[Values, _about("learned, fixed: tau from the text, or 0.5.")] = None,
    key_norm: Annotated[bool, _about("With keys of unit length and without.")] = False,
    feedthrough: Annotated[bool, _about("With d * x' and without.")] = False,
    short_conv: Annotated[bool, _about("With the short convolution and without.")] = False,
    window: Annotated[Values, _about("32, 64 up to 512 keys of Rodimus+'s attention.")] = None,
    layers: Annotated[Values, _about("Of these runs, only those of so many layers.")] = None,
    budget: BudgetName | None = None,
    corpus: str | None = None,
    steps: Annotated[int | None, Field(ge=1)] = None,
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> Sequence[Recipe]:
    """Train the runs of Tables 12 to 18 and others like them, each one change to a base recipe.

    Values of an option may be joined by commas, and options given together add up. The full models on WikiText-103 are
    Table 1's own runs.
    """
    both = ["on", "off"]
    asked = {
        "gate": gate,
        "rank": rank,
        "expansion": expansion,
        "heads": heads,
        "hops": hops,
        "order": order,
        "gate_temperature": gate_temperature,
        "key_norm": both if key_norm else None,
        "feedthrough": both if feedthrough else None,
        "short_conv": both if short_conv else None,
        "window": window,
    }
    found = [variant for number in listed("table", table, tables()) for variant in tables()[int(number)].values()]
    for option, values in asked.items():
        known = axes()[option]
        found += [variant for value in listed(option, values, known) for variant in known[value]]
    if not found:
        options = ", ".join(f"--{option.replace('_', '-')}" for option in asked)
        raise UserError(f"nothing to ablate was named; give --table 12 to 18, or one of {options}")
    if layers is not None:
        kept = listed("layers", layers, sorted({variant.layers for variant in found}))
        found = [variant for variant in found if str(variant.layers) in kept]
    name, _ = choose_budget(budget)
    return distinct(variant.recipe(name, corpus=corpus, steps=steps, dropout=dropout, seed=seed) for variant in found)


def _table(
    number: int,
    records: Iterable[Record],
    printed: Sequence[PaperRow],
    title: str,
    metrics: Sequence[Metric],
    key: Sequence[str],
    headings: Sequence[str],
    *,
    corpus: str | tuple[str, ...],
    within: Sequence[str] = (),
    more: dict[Row, Variant] | None = None,
    **options: Any,
) -> Table:
    """The paper's rows beside the runs of the same models; the order is that of the first metric."""
    found = rows_of(tables()[number] | (more or {}), records)
    rows = {record.path: row for record, row in found}
    runs = [record for record, _ in found]
    notes = [*options.pop("notes", ())]
    if any(record.budget["name"] == "smoke" for record in runs):
        notes.append("Smoke runs are of models 128 wide with a third of the layers.")
    table = paper_vs_measured(
        printed,
        runs,
        title=f"Table {number}. {title}",
        metrics=metrics,
        key=key,
        headings=headings,
        record_key=lambda record: rows[record.path],
        paper_corpus=corpus,
        notes=notes,
        **options,
    )
    return with_order(table, metrics[0].name, headings, within)


TEST = (Metric("Test PPL", "test_ppl", "test_ppl"), Metric("Best test PPL", "best_test_ppl", "best_test_ppl"))
VALID = Metric("Valid PPL", "valid_ppl", "valid_ppl")
PARAMS = Metric("Params (M)", "params", "params_m", better=None, digits=1, scale=1e-6)
WIKITEXT = (ABLATE, "wikitext103")


@report("table12", experiments=(ABLATE,))
def table12(records: Sequence[Record], paper: PaperResults) -> Table:
    """Table 12: the rank of the value gate."""
    title, key, headings = "The rank of the value gate, at n = 16", ("size", "rank"), ("Size", "Rank")
    return _table(
        12, records, paper.table(12), title, (VALID, PARAMS), key, headings, corpus="pile", within=headings[:1]
    )


@report("table13", experiments=(ABLATE,))
def table13(records: Sequence[Record], paper: PaperResults) -> Table:
    """Table 13: the expansion factor."""
    title, key, headings = "The expansion factor n, at rank 16", ("size", "expansion"), ("Size", "n")
    return _table(
        13, records, paper.table(13), title, (VALID, PARAMS), key, headings, corpus="pile", within=headings[:1]
    )


@report("table14", experiments=(ABLATE,))
def table14(records: Sequence[Record], paper: PaperResults) -> Table:
    """Table 14: head sharing at 125M, and the caches, computed and read off real states."""
    printed, context = paper.table(14), SIZES["125m"].context
    memory: dict[Row, Any] = {(str(row["model"]), str(row["head_sharing"])): row["cache_mb"] for row in printed}
    more: dict[Row, Variant] = {(model, "mqa"): sharing(model, "mqa") for model in MODELS_OF_14}
    shapes = {row: variant.config(smoke=False) for row, variant in (tables()[14] | more).items()}
    rule = {row: paper_accounting(config, context).memory.remembered for row, config in shapes.items()}
    true = {row: true_accounting(config, context).memory for row, config in shapes.items()}
    given = {
        "Memory (MB)": lambda row: Cell(memory.get(named(row)), source="paper"),
        "Memory, paper's rule (MB)": lambda row: _megabytes(rule[named(row)]),
        "Memory, true (MB)": lambda row: _megabytes(true[named(row)].remembered),
        "Whole state (MB)": lambda row: _megabytes(true[named(row)].whole),
    }

    def named(row: Row) -> Row:
        return (plain_spelling(row[0]), row[1])

    return _table(
        14,
        records,
        printed,
        "Head sharing at 125M: perplexity on the Pile, and memory beside the weights",
        (VALID,),
        ("model", "head_sharing"),
        ("Model", "Heads"),
        corpus="pile",
        within=("Model",),
        more=more,
        given=given,
        computed="each model's config, by the paper's rule, and its real states, made and measured in bytes",
        notes=[
            f"Memory of one sequence of {context:,} tokens; six heads of 128, two groups for GQA, and in Rodimus+ a "
            f"window of {context // 2:,}. True memory is that of real states in bfloat16; the whole state has the "
            "windows of the short convolutions and the counters of tokens as well.",
        ],
    )


@report("table15", experiments=WIKITEXT)
def table15(records: Sequence[Record], paper: PaperResults) -> Table:
    """Table 15: the gates of Rodimus."""
    key = ("beta_hat", "g", "tau")
    return _table(15, records, paper.table(15), "The gates of Rodimus", TEST, key, key, corpus="wikitext-103")


@report("table16", experiments=WIKITEXT)
def table16(records: Sequence[Record], paper: PaperResults) -> Table:
    """Table 16: the transition gate beta, of which the paper gives no form."""
    printed = [{**row, "beta": "no" if row["beta"] == "1_m" else "yes"} for row in paper.table(16)]
    notes = [
        "Both rows have the gate beta_hat and neither g nor tau. The paper does not give the form of beta: here it is "
        "sigmoid(x W1 W2 + b)^(1/16), as in GLA.",
    ]
    return _table(
        16,
        records,
        printed,
        "The transition gate beta",
        TEST,
        ("beta",),
        ("beta",),
        corpus="wikitext-103",
        notes=notes,
    )


@report("table17", experiments=WIKITEXT)
def table17(records: Sequence[Record], paper: PaperResults) -> Table:
    """Table 17: the two-hop residual of Rodimus+."""
    key, headings = ("n_layers", "two_hop_residual"), ("Layers", "Two-hop residual")
    title = "The two-hop residual of Rodimus+"
    return _table(17, records, paper.table(17), title, TEST, key, headings, corpus="wikitext-103", within=headings[:1])


@report("table18", experiments=WIKITEXT)
def table18(records: Sequence[Record], paper: PaperResults) -> Table:
    """Table 18: the order of the Rodimus block and X, which is SW-SKA and the feed-forward."""
    rows = {record.path: row for record, row in rows_of(tables()[18], records)}
    of_split = {"WikiText-103": "test_ppl", "Pile": "valid_ppl"}
    runs = [
        replace(record, metrics=record.metrics | {"ppl": record.metrics.get(of_split[rows[record.path][1]])})
        for record in records
        if record.path in rows
    ]
    key, headings = ("order", "corpus", "n_layers"), ("Order", "Corpus", "Layers")
    return _table(
        18,
        runs,
        paper.table(18),
        "The order of the Rodimus block and X = SW-SKA + FFN",
        (Metric("PPL", "ppl", "ppl"),),
        key,
        headings,
        corpus=("wikitext-103", "pile"),
        within=headings[1:],
        notes=["PPL is that of the test split on WikiText-103 and of the validation split on the Pile."],
    )


def _megabytes(count: int) -> Cell:
    return Cell(count / 1e6, digits=3, source="computed")
