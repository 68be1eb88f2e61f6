"""Cost at 1.3B, batch 1: FLOPs, speed and memory (Tables 19 and 20, Appendix E.1).

FLOPs and memory are computed from the models' configs and read off real states, by the paper's rule and by the true one
(`rodimus_lab/accounting.py`). Speeds come from records of the experiment `bench`, which `rodimus-lab bench record`
writes; docs/benchmarks.md says which command makes each. What was not measured says "not run".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

from rodimus_lab.accounting import Architecture, Cost, Mamba2, paper_accounting, true_accounting
from rodimus_lab.experiment import report
from rodimus_lab.nn.heads import HeadSharing
from rodimus_lab.nn.zoo import SIZES, model_config
from rodimus_lab.records import Record
from rodimus_lab.report import NOT_RUN, Cell, Column, PaperResults, PaperRow, Printed, Table

KILO = 1024
SIZE = SIZES["1.3b"]._replace(context=4 * KILO)  # The context that Tables 19 and 20 name, and Rodimus+'s window halves.
PAPER_HEAD_WIDTH = 64  # of Rodimus+'s attention: the width that Table 20's 207.8 MB imply
LABELS = {"transformer": "transformer", "mamba-ssm-mamba2": "mamba2", "rodimus": "rodimus", "rodimus_plus": "rodimus+"}
PAPER_RULE = (
    "By the paper's rule the embedding counts as a product beside the head, attention is full, and value gates, state "
    "updates and convolutions are left out. By the true one attention is causal, and all of these count but the "
    "embedding."
)
COMPUTED = "the models' configs, by each rule, and for true memory the real states that they make"
REAL_MEMORY = (
    "True memory is that of real states in bfloat16; the whole state has the windows of the short convolutions and the "
    "counters of tokens as well."
)
MAMBA2_NOTE = (
    "Mamba2 is counted from its shape (48 blocks, state 128, 64 heads of 64) and timed as mamba-ssm's model, with its "
    "Triton SSD."
)


class Row(NamedTuple):
    """What names a row of Tables 19 and 20. `attention` is the paper's: torch (all scores in memory), F.A. or none."""

    model: str
    attention: str
    context: int

    @classmethod
    def of(cls, row: PaperRow) -> Row:
        return cls(str(row["model"]), str(row["implementation"] or ""), int(_number(row, "context_k")) * KILO)


def architecture(model: str) -> Architecture:
    """The model at 1.3B in the shape that the paper's numbers imply."""
    if model == "mamba2":
        return Mamba2.of(SIZE)
    if model == "rodimus+":
        heads = HeadSharing.of("ska", SIZE.d_model // PAPER_HEAD_WIDTH)
        return model_config(model, size=SIZE, attention={"heads": heads, "head_width": PAPER_HEAD_WIDTH})
    return model_config(model, size=SIZE)


def _costs(rows: Sequence[Row]) -> tuple[list[Cost], list[Cost]]:
    """Row by row, by the paper's rule and truly."""
    costs = [_cost(row.model, row.context) for row in rows]
    return [rule for rule, _ in costs], [true for _, true in costs]


@cache
def _cost(model: str, context: int) -> tuple[Cost, Cost]:
    shape = architecture(model)
    return paper_accounting(shape, context, one_head=True), true_accounting(shape, context)


@report("table19", experiments=("bench",))
def table19(records: Sequence[Record], paper: PaperResults) -> Table:
    """Table 19: FLOPs and throughput of training at 1.3B and 4k."""
    printed = paper.table(19)
    rows = [Row.of(row) for row in printed]
    rule, true = _costs(rows)
    columns = [
        *_names(rows),
        (Column("FLOPs (1e13)"), [Cell(row["flops_1e13"], source="paper") for row in printed]),
        (Column("FLOPs, paper's rule (1e13)"), _ruled(printed, "flops_1e13", [c.training_flops / 1e13 for c in rule])),
        (Column("FLOPs, true (1e13)"), [_computed(cost.training_flops / 1e13) for cost in true]),
        (Column("Words/s", "higher"), [Cell(row["throughput_wps"], source="paper") for row in printed]),
        *_speeds(rows, [(record, _training_row(record)) for record in records], digits=0),
    ]
    return Table.of(
        "Table 19. Training at 1.3B: FLOPs of one sequence, and throughput",
        columns,
        [PAPER_RULE, MAMBA2_NOTE, _timed_note()],
        computed=COMPUTED,
    )


@report("table20", experiments=("bench",))
def table20(records: Sequence[Record], paper: PaperResults) -> Table:
    """Table 20: FLOPs, throughput and memory of decoding at 1.3B, 4k and 24k."""
    printed = paper.table(20)
    rows = [Row.of(row) for row in printed]
    rule, true = _costs(rows)
    columns = [
        *_names(rows),
        (Column("FLOPs (1e9)"), [Cell(row["flops_1e9"], source="paper") for row in printed]),
        (Column("FLOPs, paper's rule (1e9)"), _ruled(printed, "flops_1e9", [cost.decode_flops / 1e9 for cost in rule])),
        (Column("FLOPs, true (1e9)"), [_computed(cost.decode_flops / 1e9) for cost in true]),
        (Column("Words/s", "higher"), [Cell(row["throughput_wps"] or row["note"], source="paper") for row in printed]),
        *_speeds(rows, [(record, _decoding_row(record)) for record in records], digits=1),
        *_memory(printed, rule, true),
    ]
    return Table.of(
        "Table 20. Decoding at 1.3B: FLOPs of one token, throughput, and memory beside the weights",
        columns,
        [
            PAPER_RULE,
            "Of each recurrent state the paper's rule counts one head of 64 columns, which leaves out the number of "
            f"heads, 64. {REAL_MEMORY}",
            MAMBA2_NOTE,
            _timed_note(),
        ],
        computed=COMPUTED,
    )


def _names(rows: Sequence[Row]) -> Iterator[tuple[Column, Sequence[Cell]]]:
    yield Column("Model"), [Cell(row.model) for row in rows]
    yield Column("Attention"), [Cell(row.attention or None, missing="") for row in rows]
    yield Column("Context"), [Cell(f"{row.context // KILO}k") for row in rows]


def _memory(
    printed: Sequence[PaperRow], rule: Sequence[Cost], true: Sequence[Cost]
) -> Iterator[tuple[Column, Sequence[Cell]]]:
    yield Column("Memory (MB)"), [Cell(row["cache_mb"], source="paper") for row in printed]
    values = [cost.memory.remembered / 1e6 for cost in rule]
    yield Column("Memory, paper's rule (MB)"), _ruled(printed, "cache_mb", values)
    yield Column("Memory, true (MB)"), [_computed(cost.memory.remembered / 1e6) for cost in true]
    yield Column("Whole state (MB)"), [_computed(cost.memory.whole / 1e6) for cost in true]


def _ruled(printed: Sequence[PaperRow], column: str, values: Sequence[float]) -> list[Cell]:
    """What the paper's rule gives, with a note where it is not what the paper prints."""
    return [
        _computed(value, _misfit(row[column], value)) if row[column] is not None else _computed(value)
        for row, value in zip(printed, values, strict=True)
    ]


def _misfit(printed: object, value: float) -> str:
    assert isinstance(printed, Printed)
    digits = len(printed.text.partition(".")[2])
    if f"{value:.{digits}f}" == printed.text:
        return ""
    return f"does not close: {value / printed - 1:+.1%} from the {printed.text} printed"


def _computed(value: float, note: str = "") -> Cell:
    return Cell(value, digits=3, source="computed", note=note)


def _number(row: Mapping[str, object], name: str) -> float:
    value = row[name]
    assert isinstance(value, float), f"{name} is {value!r}"
    return value


def _timed_note() -> str:
    timed = true_accounting(model_config("rodimus+", size=SIZE), SIZE.context)
    return (
        f"FLOPs and memory of Rodimus+ are those of heads of {PAPER_HEAD_WIDTH} and a window of {SIZE.context // 2:,}, "
        f"which the printed memory implies. It is timed with heads of 128 (Appendix D.5), whose true figures at 4k are "
        f"{timed.training_flops / 1e13:.3f}e13 and {timed.decode_flops / 1e9:.3f}e9 FLOPs and "
        f"{timed.memory.remembered / 1e6:.1f} MB, and in decoding with the 1.3B size's own window of "
        f"{SIZES['1.3b'].context // 2:,}."
    )


def _training_row(record: Record) -> Row | None:
    return _row(record, "train", "seq_len")


def _decoding_row(record: Record) -> Row | None:
    return _row(record, "decode", "context")


def _row(record: Record, bench: str, length: str) -> Row | None:
    """Which row a benchmark's record belongs to, or None."""
    recipe, model = record.recipe, LABELS.get(record.label)
    if model is None or recipe["bench"] != bench or recipe["size"] != SIZE.name:
        return None
    backends = recipe.get("backends", {})
    by = backends.get("attention") or backends.get("attention_step")
    attention = "" if model != "transformer" else "torch" if by == "naive" else "F.A."
    return Row(model, attention, recipe[length])


def _speeds(
    rows: Sequence[Row], given: Sequence[tuple[Record, Row | None]], digits: int
) -> Iterator[tuple[Column, Sequence[Cell]]]:
    """A column of tokens a second for every device, budget and precision; one that says "not run" where there is none.
    Of several records for one cell the last counts."""
    groups: dict[tuple[str, ...], dict[Row, Record]] = {}
    for record, row in sorted(given, key=lambda pair: (pair[0].finished, pair[0].id)):
        if row in rows and row is not None:
            precision = str(record.recipe.get("precision") or record.recipe.get("dtype"))
            groups.setdefault((record.device, record.budget_text, precision), {})[row] = record
    for (*_, precision), found in sorted(groups.items()):
        column = Column(f"Tokens/s, {precision}", "higher", per_device=True)
        yield column, [_speed(found[row], digits) if row in found else NOT_RUN for row in rows]
    if not groups:
        yield Column("Tokens/s", "higher"), [NOT_RUN] * len(rows)


def _speed(record: Record, digits: int) -> Cell:
    speed = record.metrics.get("tokens_per_second")
    return Cell(
        "OOM" if speed is None else speed,
        digits=digits,
        source="measured",
        run_id=record.id,
        corpus=record.corpus,
        budget=record.budget_text,
        device=record.device,
    )
