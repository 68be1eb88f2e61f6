"""The paper's tables and figures in the order in which it has them, and the tables that nobody has measured yet."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Literal, NamedTuple

from rodimus_lab.errors import UserError
from rodimus_lab.report.paper import PaperResults, PaperRow, Printed
from rodimus_lab.report.table import Cell, Column, Table

NAMES = (
    "model",
    "size",
    "group",
    "category",
    "benchmark",
    "implementation",
    "tokenizer",
    "corpus",
    "order",
    "notation",
)
STEM = re.compile(r"(table|figure)0*(\d+)([a-z]?)(?:-.*)?")


class Artefact(NamedTuple):
    """One table or figure. `sort`: its numbers are to be measured or state settings; a drawing has none."""

    name: str
    title: str
    sort: Literal["measured", "settings", "drawing"] = "measured"

    @property
    def label(self) -> str:
        """Such as `Table 7` or `Figure 1a`."""
        kind, number, letter = _parts(self.name)
        return f"{kind.capitalize()} {number}{letter}"

    @property
    def number(self) -> int:
        return _parts(self.name)[1]

    @property
    def is_table(self) -> bool:
        return self.name.startswith("table")


PAPER = (
    Artefact("figure1a", "Perplexity against the size of the cache, WikiText-103"),
    Artefact("figure1b", "Recall (MQAR) against the state expansion"),
    Artefact("figure2", "The blocks of Rodimus and Rodimus+", "drawing"),
    Artefact("figure3", "Head sharing: MHA, GQA, MQA and SKA", "drawing"),
    Artefact("table1", "Perplexity on WikiText-103"),
    Artefact("figure4", "Scaling: perplexity on the Pile against training FLOPs"),
    Artefact("table2", "Downstream tasks, zero-shot"),
    Artefact("figure5", "NeedleBench, the mean over depths"),
    Artefact("table3", "Notation", "settings"),
    Artefact("table4", "Functional forms of the recurrences", "settings"),
    Artefact("table5", "Training settings on WikiText-103 and the Pile", "settings"),
    Artefact("table6", "Perplexity on the Pile, 350M"),
    Artefact("table7", "Perplexity on the Pile against the size of the cache, 125M"),
    Artefact("table8", "Sizes and training settings of the scaling runs", "settings"),
    Artefact("table9", "Settings of the models of the downstream tasks", "settings"),
    Artefact("table10", "Downstream tasks after 100B tokens of the Pile"),
    Artefact("figure6", "Recall (MQAR) against the width"),
    Artefact("figure9", "NeedleBench of Mamba-1.4B, length by depth"),
    Artefact("figure10", "NeedleBench of Mamba2-1.3B, length by depth"),
    Artefact("figure11", "NeedleBench of Rodimus-1.4B, length by depth"),
    Artefact("figure12", "NeedleBench of Pythia-1.4B, length by depth"),
    Artefact("figure13", "NeedleBench of Rodimus+-1.6B, length by depth"),
    Artefact("table11", "Recall tasks, zero-shot"),
    Artefact("table12", "Rank of the value gate"),
    Artefact("table13", "Expansion factor n"),
    Artefact("table14", "Head sharing: perplexity and cache"),
    Artefact("table15", "Gates left out, WikiText-103"),
    Artefact("table16", "The transition gate beta, WikiText-103"),
    Artefact("table17", "The two-hop residual, WikiText-103"),
    Artefact("table18", "The order of Rodimus and attention with feed-forward"),
    Artefact("table19", "Cost of training at 1.3B"),
    Artefact("table20", "Cost of decoding at 1.3B"),
    Artefact("figure7", "The gates against g and the temperature"),
    Artefact("figure8", "The gates of a trained layer over a sentence"),
    Artefact("table21", "Rodimus+-Coder, base models"),
    Artefact("table22", "Rodimus+-Coder, chat models"),
    Artefact("figure14", "NeedleBench of Rodimus+ during training, length by depth"),
)
_NOTES = {
    "measured": "No run of this project stands behind this table yet.",
    "settings": "Settings, not results: recipes carry them (see docs/reproducing.md).",
}
_MISSING = {"measured": "not run"}


def belongs(name: str, artefact: Artefact) -> bool:
    """Whether a registered report or figure is of an artefact: `figure06-128` is of Figure 6."""
    return STEM.fullmatch(name) is not None and _parts(name) == _parts(artefact.name)


def beyond(names: Iterable[str]) -> list[str]:
    """Those registered names that are of none of the paper's tables and figures."""
    return [name for name in names if not any(belongs(name, artefact) for artefact in PAPER)]


def quoted_tables(reported: Collection[str], paper: PaperResults) -> dict[str, Table]:
    """Of every table of the paper that no report in `reported` covers the paper's numbers, and that it was not run."""
    return {
        artefact.name: _quoted(artefact, paper.table(artefact.number))
        for artefact in PAPER
        if artefact.is_table and not any(belongs(name, artefact) for name in reported)
    }


def find(name: str) -> Artefact:
    """The artefact of a name such as `table7`. Raises `UserError` where the paper has none of that name."""
    for artefact in PAPER:
        if artefact.name == name:
            return artefact
    raise UserError(f"the paper has no {name!r}; give one such as table1 or figure1a")


def _quoted(artefact: Artefact, rows: list[PaperRow]) -> Table:
    columns = [(Column(_heading(name)), [_cell(name, row) for row in rows]) for name in rows[0]]
    if artefact.sort in _MISSING:
        absent = Cell(None, source="measured", missing=_MISSING[artefact.sort])
        columns.append((Column("Ours"), [absent] * len(rows)))
    return Table(
        f"{artefact.label}. {artefact.title}",
        [column for column, _ in columns],
        list(zip(*(cells for _, cells in columns), strict=True)),
        notes=[_NOTES[artefact.sort]],
    )


def _cell(name: str, row: PaperRow) -> Cell:
    """Names as they are, in full even where a name is a number; everything else as the paper's."""
    value = row[name]
    if name in NAMES:
        return Cell(value.text if isinstance(value, Printed) else value)
    return Cell(value, source="paper")


def _heading(name: str) -> str:
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]


def _parts(name: str) -> tuple[str, int, str]:
    match = STEM.fullmatch(name)
    assert match is not None, name
    return match[1], int(match[2]), match[3]
