"""Tables: what may stand in one column, what is marked, and that every writer says where a number is from."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rodimus_lab import report
from rodimus_lab.errors import UserError
from rodimus_lab.report import Cell, Column, Printed, Table, to_csv, to_latex, to_markdown, write


def measured(value: float | None, run: str = "rodimus-1a2b3c4d", **changes) -> Cell:
    fields = {
        "digits": 2,
        "source": "measured",
        "run_id": run,
        "corpus": "enwiki-25k",
        "budget": "short budget 1,500 of 25,000 steps",
        "device": "NVIDIA H200",
    }
    return Cell(value, **(fields | changes))


def test_latex_keeps_the_hyphens_of_an_option():
    table = Table.of("T", [(Column("a"), [Cell("b — c")])], ["run it with --dry-run"])
    assert "run it with -{}-dry-run" in to_latex(table)
    assert "b --- c" in to_latex(table)


def quoted(text: str | None) -> Cell:
    return Cell(None if text is None else Printed(text), source="paper")


COLUMNS = (Column("Model"), Column("Test PPL", better="lower"), Column("Test PPL", better="lower"))


def example() -> Table:
    return Table(
        "WikiText-103",
        COLUMNS,
        (
            (Cell("rodimus"), quoted("21.90"), measured(23.1049)),
            (Cell("rodimus+"), quoted("21.56"), measured(23.0951, "rodimus_plus-5e6f7a8b")),
            (Cell("a_b & c|d"), quoted("22.0"), measured(None)),
            (Cell("gla"), quoted(None), measured(24.5, "gla-00000000", std=0.0321, count=3, run_id="gla-1; gla-2")),
        ),
        caption="Lower is better.",
        notes=("Seeds 0 to 2.",),
        paper_corpus="wikitext-103",
    )


def test_markdown_in_full():
    condition = "enwiki-25k standing in for wikitext-103, short budget 1,500 of 25,000 steps"
    assert to_markdown(example()).splitlines() == [
        "# WikiText-103",
        "",
        "Lower is better.",
        "",
        "| Model | Test PPL (paper) | Test PPL (enwiki-25k stand-in, short #1) |",
        "|---|---:|---:|",
        "| rodimus | <ins>21.90</ins> | **23.10** [a] |",
        "| rodimus+ | **21.56** | **23.10** [b] |",
        "| a_b &amp; c\\|d | 22.0 | — |",
        "| gla | — | <ins>24.50 ± 0.03 (3 seeds)</ins> [c] |",
        "",
        "Seeds 0 to 2.",
        "",
        "Columns marked (paper) are quoted from the paper.",
        "",
        f"#1: {condition}.",
        "",
        "- [a] NVIDIA H200, run rodimus-1a2b3c4d",
        "- [b] NVIDIA H200, run rodimus_plus-5e6f7a8b",
        "- [c] NVIDIA H200, runs gla-1; gla-2",
    ]


def test_every_writer_labels_stand_in_and_budget():
    for text in (to_markdown(example()), to_latex(example())):
        assert text.count("enwiki-25k stand-in, short") == 1
        assert text.count("1: enwiki-25k standing in for wikitext-103, short budget 1,500 of 25,000 steps") == 1
        for run in ("rodimus-1a2b3c4d", "5e6f7a8b", "gla-1; gla-2"):
            assert text.count(run) == 1
        assert "(paper)" in text
    genuine = to_markdown(Table("t", COLUMNS, example().rows, paper_corpus="enwiki-25k"))
    assert "standing in" not in genuine
    assert "stand-in" not in genuine


def test_csv_holds_every_digit_and_its_provenance():
    rows = list(csv.DictReader(io.StringIO(to_csv(example()))))
    paper, ours = "Test PPL (paper)", example().headers[2]
    assert "enwiki-25k stand-in" in ours
    assert rows[0][paper] == "21.90"
    assert rows[0][f"{paper}: source"] == "paper"
    assert rows[0][ours] == "23.1049"
    assert rows[0][f"{ours}: source"] == "measured"
    assert rows[0][f"{ours}: run_id"] == "rodimus-1a2b3c4d"
    assert rows[0][f"{ours}: corpus"] == "enwiki-25k"
    assert rows[0][f"{ours}: budget"] == "short budget 1,500 of 25,000 steps"
    assert rows[0][f"{ours}: device"] == "NVIDIA H200"
    assert (rows[3][f"{ours}: std"], rows[3][f"{ours}: count"]) == ("0.0321", "3")
    assert rows[2]["Model"] == "a_b & c|d"
    assert [rows[2][name] for name in rows[2] if name.startswith(ours)] == [""] * 8
    assert rows[3][paper] == rows[3][f"{paper}: source"] == ""


def test_latex_is_escaped_and_balanced():
    text = to_latex(example(), "wikitext103")
    assert r"a\_b \& c|d & 22.0 & ---" in text
    assert r"\textbf{21.56}" in text
    assert r"\underline{24.50 $\pm$ 0.03 (3 seeds)}\textsuperscript{c}" in text
    assert r"\label{tab:wikitext103}" in text
    assert text.count("{") == text.count("}")
    lines = text.splitlines()
    body = lines[lines.index(r"\toprule") : lines.index(r"\end{tabular}")]
    assert all(line.replace(r"\&", "").count("&") == 2 for line in body if line.endswith(r"\\"))
    assert to_latex(Table("50% of a_b^c {x}~y", (), ())).count(r"50\% of a\_b\textasciicircum{}c \{x\}") == 1


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs LaTeX")
def test_latex_compiles(tmp_path):
    body = to_latex(example(), "t")
    source = rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{body}\end{{document}}"
    (tmp_path / "t.tex").write_text(source)
    subprocess.run(["pdflatex", "-halt-on-error", "t.tex"], cwd=tmp_path, check=True, capture_output=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"corpus": "wikitext-103"},
        {"budget": "paper budget 25,000 steps"},
        {"tokenizer": "gpt2"},
        {"source": "computed"},
        {"source": "paper"},
        {"source": ""},
    ],
)
def test_a_column_never_mixes_what_cannot_be_compared(changes):
    rows = [[measured(1.0)], [measured(2.0, **changes)]]
    with pytest.raises(ValueError, match="mixes what cannot be compared"):
        Table("t", [Column("PPL")], rows, computed="a rule")
    Table("t", [Column("PPL"), Column("PPL")], [[rows[0][0], rows[1][0]]], computed="a rule")


def test_devices_mix_in_perplexities_and_not_in_speeds():
    rows = [[measured(1.0)], [measured(2.0, device="cpu")]]
    Table("t", [Column("PPL")], rows)
    with pytest.raises(ValueError, match="mixes"):
        Table("t", [Column("tokens/s", per_device=True)], rows)
    speeds = Table("t", [Column("tokens/s", per_device=True)], rows[:1])
    assert any(setting.endswith("NVIDIA H200") for setting in speeds.settings)


@pytest.mark.parametrize("field", ["run_id", "corpus", "budget", "device"])
def test_a_measured_number_without_provenance_is_refused(field):
    with pytest.raises(ValueError, match="needs its run, corpus, budget and device"):
        measured(1.0, **{field: None})


def test_computed_numbers_say_what_they_are_computed_from():
    rows = [[Cell(1.5, source="computed")]]
    with pytest.raises(ValueError, match="does not say what they are computed from"):
        Table("t", [Column("FLOPs")], rows)
    table = Table("t", [Column("FLOPs")], rows, computed="the models' configs")
    said = "Columns marked (computed): the models' configs."
    assert said in to_markdown(table)
    assert said in to_latex(table)
    assert not Table("t", [Column("FLOPs")], [[Cell(None, source="computed")]], computed="a rule").closing_notes


def test_what_is_not_a_result_is_refused():
    with pytest.raises(ValueError, match="missing value is None"):
        measured(float("nan"))
    with pytest.raises(ValueError, match="a row of 1 cells"):
        Table("t", COLUMNS, [[Cell("x")]])


@pytest.mark.parametrize(
    ("better", "values", "marks"),
    [
        ("lower", [3.0, 1.0, 2.0, None], ["", "best", "second", ""]),
        ("higher", [3.0, 1.0, 2.0, None], ["best", "", "second", ""]),
        ("lower", [1.001, 1.004, 2.0, 2.001], ["best", "best", "second", "second"]),
        ("lower", [1.0, None], ["", ""]),
        ("lower", [1.0, 1.0], ["", ""]),
        ("lower", [10_000.0, 9_000.0], ["second", "best"]),
        (None, [1.0, 2.0], ["", ""]),
    ],
)
def test_marks_follow_the_digits_shown(better, values, marks):
    table = Table("t", [Column("x", better)], [[measured(value)] for value in values])
    assert [row[0] for row in table.marks] == marks


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (Cell(None), "—"),
        (Cell(0.0, digits=1), "0.0"),
        (Cell(1234567), "1,234,567"),
        (Cell(10147.1, digits=0), "10,147"),
        (Cell(0.1), "0.1"),
        (Cell(Printed("6.9")), "6.9"),
        (Cell(Printed("29.80")), "29.80"),
        (Cell(Printed("29.80"), digits=1), "29.8"),
        (Cell("OOM"), "OOM"),
    ],
)
def test_shown_values(cell, text):
    assert cell.text == text


def test_footnotes_go_on_past_z():
    rows = [[Cell(1.0, note=f"note {number}")] for number in range(28)]
    letters = list(Table("t", [Column("x")], rows).footnotes.values())
    assert letters[0] == "a"
    assert letters[25:] == ["z", "aa", "ab"]


def test_equal_footnotes_share_a_letter():
    rows = [[Cell(1.0, note="by eye")], [Cell(2.0, note="by eye")]]
    assert to_markdown(Table("t", [Column("x")], rows)).count("[a]") == 3


def test_write_is_reproducible_and_whole(tmp_path):
    paths = write(example(), tmp_path / "tables", "table01")
    assert [path.name for path in paths] == ["table01.md", "table01.tex", "table01.csv"]
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write(example(), tmp_path / "tables", "table01")] == first
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == sorted(path.name for path in paths)
    with pytest.raises(ValueError, match="plain file name"):
        write(example(), tmp_path, "../table01")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write(example(), tmp_path / "file", "table01")


def test_reports_need_no_torch():
    """Held for what the module itself imports, whatever the package above it hands on."""
    code = (
        "import sys, types; package = types.ModuleType('rodimus_lab'); package.__path__ = [sys.argv[1]];"
        "sys.modules['rodimus_lab'] = package; import rodimus_lab.report; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(report.__file__).parents[1])], check=True)
