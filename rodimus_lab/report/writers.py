"""A Table as Markdown, LaTeX and CSV: the same numbers, labels and footnotes in each, byte for byte reproducible."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from rodimus_lab.records import write_atomic
from rodimus_lab.report.table import Cell, Mark, Table, check_name

PROVENANCE = ("source", "run_id", "corpus", "tokenizer", "budget", "device", "std", "count", "stderr")

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "—": "---",
    "–": "--",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "ℓ": r"$\ell$",
    "τ": r"$\tau$",
    "β": r"$\beta$",
    "σ": r"$\sigma$",
    "ζ": r"$\zeta$",
    "⊙": r"$\odot$",
    "√": r"$\surd$",
    "ᵀ": r"$^\top$",
}
_MARKDOWN_MARKS = {"best": "**{}**", "second": "<ins>{}</ins>", "": "{}"}
_LATEX_MARKS = {"best": r"\textbf{{{}}}", "second": r"\underline{{{}}}", "": "{}"}


def write(table: Table, out_dir: Path | str, name: str) -> list[Path]:
    """Write `name.md`, `name.tex` and `name.csv` into `out_dir`, each whole or not at all; returns their paths."""
    check_name(name)
    texts = {"md": to_markdown(table), "tex": to_latex(table, name), "csv": to_csv(table)}
    paths = [Path(out_dir) / f"{name}.{suffix}" for suffix in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        write_atomic(path, text)
    return paths


def to_markdown(table: Table) -> str:
    """GitHub Markdown: best in bold, second best underlined, footnotes as `[a]`."""
    lines = [f"# {_markdown(table.title)}", ""]
    if table.caption:
        lines += [_markdown(table.caption), ""]
    lines.append(f"| {' | '.join(map(_markdown, table.headers))} |")
    lines.append(f"|{'|'.join('---:' if right else '---' for right in _numeric(table))}|")
    for row, marks in zip(table.rows, table.marks, strict=True):
        cells = []
        for cell, mark in zip(row, marks, strict=True):
            letter = table.footnotes.get(table.footnote(cell))
            cells.append(_MARKDOWN_MARKS[mark].format(_markdown(cell.text)) + (f" [{letter}]" if letter else ""))
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\n{_markdown(note)}" for note in table.closing_notes]
    if table.footnotes:
        lines += ["", *(f"- [{letter}] {_markdown(text)}" for text, letter in table.footnotes.items())]
    return "\n".join(lines) + "\n"


def to_latex(table: Table, label: str = "") -> str:
    """A `table` environment for the booktabs package; footnotes stand below the rule."""
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(' '.join(filter(None, _headline(table))))}}}"]
    if label:
        lines.append(rf"\label{{tab:{label}}}")
    lines.append(rf"\begin{{tabular}}{{{''.join('r' if right else 'l' for right in _numeric(table))}}}")
    lines += [r"\toprule", " & ".join(map(_latex, table.headers)) + r" \\", r"\midrule"]
    for number, (row, marks) in enumerate(zip(table.rows, table.marks, strict=True)):
        if number and table.sections and table.sections[number] != table.sections[number - 1]:
            lines.append(r"\midrule")
        lines.append(" & ".join(_latex_cell(table, *pair) for pair in zip(row, marks, strict=True)) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    notes = [*map(_latex, table.closing_notes)]
    notes += [rf"\textsuperscript{{{letter}}} {_latex(text)}" for text, letter in table.footnotes.items()]
    lines += [rf"\par{{\footnotesize {note}}}" for note in notes]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def to_csv(table: Table) -> str:
    """Every value with all its digits, missing ones empty. Beside a column with a source stand its provenance columns,
    named after it; notes and caption are left to the other writers."""
    header: list[str] = []
    rows: list[list[str]] = [[] for _ in table.rows]
    for index, name in enumerate(table.headers):
        cells = [row[index] for row in table.rows]
        fields = [field for field in (*PROVENANCE, "note") if any(_provenance(cell, field) for cell in cells)]
        header += [name, *(f"{name}: {field}" for field in fields)]
        for row, cell in zip(rows, cells, strict=True):
            row += [_raw(cell), *(_provenance(cell, field) for field in fields)]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def _raw(cell: Cell) -> str:
    if cell.value is None:
        return ""
    return str(getattr(cell.value, "text", cell.value))


def _provenance(cell: Cell, field: str) -> str:
    if field != "note" and (cell.value is None or not cell.source):
        return ""
    if field in ("std", "count", "stderr") and cell.source != "measured":
        return ""
    value = getattr(cell, field)
    return "" if value is None else str(value)


def _numeric(table: Table) -> list[bool]:
    """Which columns are set flush right: those that hold numbers."""
    return [any(row[index].is_number for row in table.rows) for index in range(len(table.columns))]


def _headline(table: Table) -> list[str]:
    title = table.title if not table.caption or table.title.endswith(".") else f"{table.title}."
    return [title, table.caption]


def _latex_cell(table: Table, cell: Cell, mark: Mark) -> str:
    letter = table.footnotes.get(table.footnote(cell))
    return _LATEX_MARKS[mark].format(_latex(cell.text)) + (rf"\textsuperscript{{{letter}}}" if letter else "")


def _markdown(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"\s+", " ", re.sub(r"([\\`*|\[\]])", r"\\\1", text)).strip()


def _latex(text: str) -> str:
    spelled = "".join(_LATEX.get(letter, letter) for letter in text.replace("--", "\0"))
    return re.sub(r"\s+", " ", spelled.replace("\0", "-{}-")).strip()  # Two hyphens would become a dash.
