"""Table 4, the functional forms of the recurrences, beside what the code has; the rest of the zoo and what came after
the paper; and every state's size against the context.

Nothing is trained: states are real ones on the meta device, operators are those that the mixers' code calls, and
formulas are the docstrings'. `docs/zoo.md` is `page()`, which `make zoo` writes.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from rodimus_lab.experiment import report
from rodimus_lab.nn.mixer import TokenMixer, state_nbytes
from rodimus_lab.nn.zoo import MODELS, SIZES, model_config
from rodimus_lab.records import PROJECT_ROOT, Record, write_atomic
from rodimus_lab.registry import load_plugins
from rodimus_lab.report import FIGURES, Axis, Cell, Column, Figure, Line, PaperResults, Table, to_markdown

PAGE = PROJECT_ROOT / "docs" / "zoo.md"
SIZE = SIZES["1.3b"]
SMALL = SIZES["wikitext103"]
CONTEXTS = (2048, 16384)
GROWING = tuple(2**power for power in range(9, 17))
# Not in the paper in any form; in the order in which they were published.
BEYOND = ("gated_deltanet", "rwkv7", "kda", "mamba3")
OPERATORS = ("gated_linear", "ssd", "delta_rule", "selective_scan", "diagonal_scan", "attention")
PAPER_COLUMNS = {
    "gate_dim": "Gate",
    "state_size": "State, n × m",
    "parallel_like_linear_attention": "Parallel like linear attention",
    "recurrent_type": "Recurrent type",
    "a_t": "A_t",
    "b_t": "B_t",
}
NOT_YET = "not in the zoo"
# Plain text for the LaTeX of the paper's CSV, in the order in which it is to be replaced.
GLYPHS = {
    r"\hat{\beta}": "β_hat",
    r"^\top": "ᵀ",
    r"\cdot": "·",
    r"\odot": "⊙",
    r"\times": "×",
    r"\sigma": "σ",
    r"\zeta": "ζ",
    r"\tau": "τ",
    r"\exp": "exp",
    r"\sqrt": "√",
    "{": "(",
    "}": ")",
}
INTRODUCTION = """\
# The zoo

Written by `make zoo` from the code and the paper's Table 4; a test holds it to both. A file holds a family: its mixer,
its config and its presets. All models are rows of `rodimus-lab params` and are held to one contract
(`tests/nn/test_nn_contract.py`).
"""
COMPUTED = "the models as the code builds them, without weights"
STATES = """\
## States against the context

![State of one sequence against the context](../results/figures/state_bytes.svg)

Drawn by `make figures`; the numbers are in [state_bytes.csv](../results/figures/state_bytes.csv).
"""


class Recurrence(NamedTuple):
    """The mixer of a registered model that carries its recurrence: where it is, what it keeps, what it calls."""

    mixer: TokenMixer
    operator: str

    @property
    def module(self) -> ModuleType | None:
        return inspect.getmodule(type(self.mixer))

    @property
    def path(self) -> Path:
        return Path(inspect.getfile(type(self.mixer)))

    @property
    def shape(self) -> tuple[int, int]:
        """n and m of the real state, all heads together."""
        memory = next(part for name, part in self.mixer.init_state(1)._asdict().items() if name.startswith("memory"))
        match tuple(memory.shape[1:]):
            case heads, n, values:  # memory_BHKV
                return n, heads * values
            case m, n:  # memory_BMN
                return n, m
            case (m,):
                return 1, m
        raise ValueError(f"{self.path.name}: no n × m in a memory of {tuple(memory.shape)}")


@report("table4", experiments=())
def table4(records: Sequence[Record], paper: PaperResults) -> Table:
    """Table 4: gates, states and forms as the paper gives them, and the files, states and operators that we have."""
    load_plugins()
    printed = paper.table(4)
    names = [str(row["model"]) for row in printed]
    found = [recurrence(name) if name in MODELS else None for name in names]
    columns: list[tuple[Column, list[Cell]]] = [(Column("Model"), [Cell(name) for name in names])]
    for key, heading in PAPER_COLUMNS.items():
        columns.append((Column(heading), [Cell(plain(row[key]), source="paper") for row in printed]))
    columns += [
        (Column("State, n × m"), [_ours(ours and _state(ours)) for ours in found]),
        (Column("Operator"), [_ours(ours and ours.operator) for ours in found]),
        (Column("File"), [Cell(ours and _relative(ours.path), missing=NOT_YET) for ours in found]),
    ]
    return Table.of(
        "Table 4. Functional forms: S_t = A_t * S_{t-1} + B_t * (k_tᵀ v_t)",
        columns,
        [
            f"States are read from the real ones at the {SIZE.name} size (d = {SIZE.d_model:,}), all heads together. "
            "The operator gated_linear, of which ssd is the case of one gate a head, is the one with a form in chunks "
            "of matrix products, as linear attention has; "
            "diagonal_scan and selective_scan go step by step or by a parallel scan.",
            "Hawk's A_t and B_t stand as the paper prints them, the other way round than in the RG-LRU, where "
            "a^(c · σ(g_t)) is the decay; its width is Griffin's 4d/3, rounded up, and not d.",
        ],
        computed=COMPUTED,
    )


def others() -> Table:
    """What is registered, no row of Table 4 and not beyond the paper."""
    load_plugins()
    elsewhere = {row["model"] for row in PaperResults().table(4)} | set(BEYOND)
    names = [name for name in MODELS if name not in elsewhere]
    return Table.of("The rest of the zoo", _columns(names), [_at_size()], computed=COMPUTED)


def beyond() -> Table:
    """What came after the paper."""
    load_plugins()
    found = [recurrence(name) for name in BEYOND]
    columns = _columns(BEYOND)
    columns[3:3] = [
        (Column("State, n × m"), [_ours(_state(one)) for one in found]),
        (Column("Operator"), [_ours(one.operator) for one in found]),
    ]
    return Table.of(
        "Beyond the paper",
        columns,
        [
            "These came after what the paper compares Rodimus with, in this order: none is in its Table 4 or in any "
            "other of its tables.",
            f"{_at_size()} n × m is read from the real memory at the {SIZE.name} size (d = {SIZE.d_model:,}), all "
            "heads together.",
        ],
        computed=COMPUTED,
    )


def _columns(names: Sequence[str]) -> list[tuple[Column, Sequence[Cell]]]:
    columns: list[tuple[Column, Sequence[Cell]]] = [
        (Column("Model"), [Cell(name) for name in names]),
        (Column("Sublayers"), [Cell(", ".join(kinds(name))) for name in names]),
        (Column("What it is"), [Cell(summary(name)) for name in names]),
        (
            Column("Parameters"),
            [Cell(model_config(name, size=SMALL).num_params(), source="computed") for name in names],
        ),
    ]
    states = [state_sizes(name, CONTEXTS, size=SMALL.name) for name in names]
    for index, context in enumerate(CONTEXTS):
        heading = f"State at {context // 1024}k (bytes)"
        columns.append((Column(heading), [Cell(sizes[index], source="computed") for sizes in states]))
    columns.append((Column("File"), [Cell(_relative(inspect.getfile(MODELS[name]))) for name in names]))
    return columns


def _at_size() -> str:
    return (
        f"At Table 1's size (d = {SMALL.d_model}, {SMALL.num_layers} layers, a vocabulary of {SMALL.vocab_size:,}). "
        "States are real ones of one sequence in bfloat16, with everything that is kept."
    )


@FIGURES.register("state_bytes")
def state_bytes(records: Sequence[Record], paper: PaperResults) -> Figure:
    """Every model's state against the context: constant, full from some context on, or growing."""
    load_plugins()
    told = ["computed"] * len(GROWING)
    lines = [Line(name, GROWING, state_sizes(name, GROWING, size=SIZE.name), told) for name in MODELS]
    return Figure(
        f"State of one sequence at the {SIZE.name} size, in bfloat16",
        Axis("Context (tokens)", "log2"),
        Axis("State (bytes)", unit="B"),
        lines,
        remark="computed from the states that each model makes, without weights; nothing was trained",
    )


def page() -> str:
    """The text of docs/zoo.md."""
    in_table_4 = [str(row["model"]) for row in PaperResults().table(4)]
    parts = [INTRODUCTION, _section(table4([], PaperResults())), "## As the code has them\n", *formulas(in_table_4)]
    return "\n".join([*parts, _section(others()), _section(beyond()), *formulas(BEYOND), STATES])


def write_page() -> None:
    write_atomic(PAGE, page())


def formulas(names: Sequence[str]) -> Iterator[str]:
    """The formulas in the docstring of every file that holds one of these models, each file once and in their order."""
    rows: dict[Path, list[str]] = {}
    for name in names:
        if name in MODELS:
            rows.setdefault(recurrence(name).path, []).append(name)
    for path, held in rows.items():
        text = inspect.getdoc(recurrence(held[0]).module) or ""
        blocks = re.findall(r"(?:^ {4}.*\n)+", text, flags=re.MULTILINE)
        block = textwrap.dedent("\n".join(blocks))
        yield f"**{', '.join(held)}**, `{_relative(path)}`\n\n```\n{block}```\n"


def recurrence(name: str) -> Recurrence:
    """What carries the recurrence of a registered model, at the standard size and without weights."""
    with torch.device("meta"):
        mixers = [sublayer.build(SIZE.d_model) for sublayer in model_config(name, size=SIZE).pattern[0].sublayers]
    found = (Recurrence(mixer, operator) for mixer in mixers if (operator := operator_of(type(mixer))))
    return next(found, Recurrence(mixers[0], "its own"))


def operator_of(mixer: type[TokenMixer]) -> str:
    """The first of `OPERATORS` that is named in the code of a mixer's methods or of what they call in their files;
    empty where there is none."""
    names: set[str] = set()
    functions = [member for cls in mixer.__mro__ for member in vars(cls).values() if inspect.isfunction(member)]
    while functions:
        function = functions.pop()
        fresh = set(function.__code__.co_names) - names
        names |= fresh
        called = (function.__globals__.get(name) for name in fresh)
        functions += [one for one in called if inspect.isfunction(one) and one.__module__ == function.__module__]
    return next((operator for operator in OPERATORS if operator in names), "")


def state_sizes(name: str, contexts: Sequence[int], *, size: str) -> list[int]:
    """Bytes of a model's real states for one sequence in bfloat16."""
    with torch.device("meta"):
        model = model_config(name, size=size).build()
        states = [model.init_state(1, context=context, dtype=torch.bfloat16) for context in contexts]
    return [state_nbytes(state) for state in states]


def kinds(name: str) -> list[str]:
    """The kinds of a model's sublayers, each once."""
    config = model_config(name, size=SMALL)
    return list(dict.fromkeys(sublayer.kind for block in config.pattern for sublayer in block.sublayers))


def summary(name: str) -> str:
    """The first sentence on a model: of its file, or of its own where it shares the file."""
    family = MODELS[name]
    module = inspect.getmodule(family)
    shared = sum(MODELS[other].__module__ == family.__module__ for other in MODELS) > 1
    text = inspect.getdoc(family if shared else module) or inspect.getdoc(recurrence(name).module) or ""
    return re.split(r"\.\s+(?=[A-Z])|\.?\n\n|\.$", text, maxsplit=1)[0].replace("\n", " ") + "."


def plain(value: object) -> str:
    """The paper's LaTeX as text."""
    text = str(value)
    for latex, glyph in GLYPHS.items():
        text = text.replace(latex, glyph)
    return text


def _state(ours: Recurrence) -> str:
    n, m = ours.shape
    multiple = m / SIZE.d_model
    return f"{n} × {'' if multiple == 1 else f'{multiple:.4g}'}d"


def _ours(text: str | None) -> Cell:
    return Cell(text, source="computed", missing=NOT_YET)


def _relative(path: Path | str) -> str:
    return str(Path(path).relative_to(PROJECT_ROOT))


def _section(table: Table) -> str:
    return f"#{to_markdown(table)}"
