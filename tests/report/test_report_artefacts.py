"""The paper's tables and figures in order, and the tables that no report covers."""

from __future__ import annotations

import pytest

from rodimus_lab.errors import UserError
from rodimus_lab.experiment import REPORTS
from rodimus_lab.records import PROJECT_ROOT
from rodimus_lab.registry import load_plugins
from rodimus_lab.report import FIGURES, PaperResults, quoted_tables, to_csv, to_latex, to_markdown
from rodimus_lab.report.artefacts import PAPER, belongs, beyond, find


def test_every_table_and_figure_of_the_paper_is_there_once() -> None:
    labels = [artefact.label for artefact in PAPER]
    assert sorted(labels) == sorted(
        [f"Table {number}" for number in range(1, 23)]
        + ["Figure 1a", "Figure 1b", *(f"Figure {number}" for number in range(2, 15))]
    )


@pytest.mark.parametrize(
    ("name", "of", "yes"),
    [
        ("table1", "table1", True),
        ("table12", "table1", False),
        ("figure06-128", "figure6", True),
        ("figure01b", "figure1b", True),
        ("figure01b", "figure1a", False),
        ("figure06", "table6", False),
        ("state_bytes", "figure1a", False),
    ],
)
def test_names_belong_to_artefacts(name: str, of: str, yes: bool) -> None:
    assert belongs(name, find(of)) is yes


def test_an_unknown_artefact_is_named() -> None:
    with pytest.raises(UserError, match="no 'table99'"):
        find("table99")


def test_what_the_paper_has_not_is_beyond_it() -> None:
    assert beyond(["table1", "state_bytes", "figure06-512"]) == ["state_bytes"]


def test_tables_without_a_report_say_that_they_were_not_run() -> None:
    quoted = quoted_tables(["table1", "table02-some"], PaperResults())
    assert "table1" not in quoted
    assert "table2" not in quoted
    assert len(quoted) == 20
    lines = to_markdown(quoted["table6"]).splitlines()
    assert lines[0] == "# Table 6. Perplexity on the Pile, 350M"
    assert lines[2] == "| Model | Valid ppl (paper) | Ours |"
    assert lines[4] == "| transformer++ | 6.04 | not run |"
    assert "Ours" not in to_markdown(quoted["table8"]), "settings are not run"


def test_the_committed_tables_are_those_of_the_code() -> None:
    """Every table of the paper has its three files, and those that are only quoted are up to date."""
    load_plugins()
    folder = PROJECT_ROOT / "results" / "tables"
    quoted = quoted_tables(list(REPORTS), PaperResults())
    expected = {*quoted, *REPORTS}
    other = {path.stem for path in folder.iterdir()} ^ expected
    assert not other, f"run `make tables` and commit, or remove: {', '.join(sorted(other))}"
    for name, table in quoted.items():
        made = {"md": to_markdown(table), "tex": to_latex(table, name), "csv": to_csv(table)}
        for suffix, text in made.items():
            assert (folder / f"{name}.{suffix}").read_text() == text, "run `make tables` and commit"
    numbers = {int(name.removeprefix("table")) for name in expected if name.startswith("table")}
    assert numbers == set(range(1, 23))


@pytest.mark.parametrize("suffix", ["svg", "pdf", "png", "csv"])
def test_every_figure_of_the_paper_is_drawn(suffix: str) -> None:
    drawn = [path.stem for path in (PROJECT_ROOT / "results" / "figures").glob(f"*.{suffix}")]
    figures = [artefact for artefact in PAPER if not artefact.is_table]
    assert len(figures) == 15
    assert not [artefact.label for artefact in figures if not any(belongs(name, artefact) for name in drawn)]


def test_every_registered_figure_is_on_some_page() -> None:
    load_plugins()
    names = list(FIGURES)
    ours = {name for name in names if any(belongs(name, artefact) for artefact in PAPER)}
    assert ours | set(beyond(names)) == set(names)
