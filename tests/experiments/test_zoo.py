"""Table 4 and docs/zoo.md: read from the code, complete, and as committed."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import zoo
from rodimus_lab.nn.zoo import MODELS
from rodimus_lab.records import PROJECT_ROOT
from rodimus_lab.registry import load_plugins
from rodimus_lab.report import PaperResults, Table, to_latex, write

SCANS = {"selective_scan", "diagonal_scan"}


@pytest.fixture(scope="module")
def table() -> Table:
    return zoo.table4([], PaperResults())


def rows(table: Table) -> dict[str, dict[str, str]]:
    """Row by row, what stands under each header."""
    return {row[0].text: dict(zip(table.headers, (cell.text for cell in row), strict=True)) for row in table.rows}


def test_the_rows_are_the_papers_in_its_order(table: Table) -> None:
    assert [row[0].text for row in table.rows] == [row["model"] for row in PaperResults().table(4)]
    assert "\\" not in "".join(cell.text for row in table.rows for cell in row)


def test_states_and_operators_are_what_the_paper_says(table: Table) -> None:
    """Hawk alone is wider, as Griffin's paper has it."""
    for name, row in rows(table).items():
        if name not in MODELS:
            continue
        parallel = row["Parallel like linear attention (paper)"] == "yes"
        assert row["Operator (computed)"] in ({"gated_linear", "ssd"} if parallel else SCANS), name
        assert (PROJECT_ROOT / row["File"]).is_file()
        if name != "hawk":
            assert row["State, n × m (computed)"] == row["State, n × m (paper)"], name


def test_a_model_that_is_not_registered_is_shown_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    load_plugins()
    monkeypatch.delitem(MODELS._things, "gla")
    row = rows(zoo.table4([], PaperResults()))["gla"]
    assert row["Operator (computed)"] == row["File"] == "not in the zoo"
    assert row["Gate (paper)"] == "1 × n"


def test_every_model_is_on_the_page() -> None:
    load_plugins()
    table_4 = {row["model"] for row in PaperResults().table(4)}
    others, beyond = rows(zoo.others()).keys(), rows(zoo.beyond()).keys()
    assert set(MODELS) <= table_4 | others | beyond
    assert not table_4 & others | table_4 & beyond | others & beyond


def test_what_is_beyond_the_paper_is_said_to_be() -> None:
    table = zoo.beyond()
    assert "none is in its Table 4" in table.closing_notes[0]
    printed = "".join(path.read_text(encoding="utf-8") for path in (PROJECT_ROOT / "results" / "paper").glob("*.csv"))
    assert not [word for word in ("delta", "kimi", "rwkv7", "rwkv-7", "mamba3", "mamba-3") if word in printed.lower()]
    operators = {name: row["Operator (computed)"] for name, row in rows(table).items()}
    assert operators == dict.fromkeys(zoo.BEYOND[:3], "delta_rule") | {"mamba3": "gated_linear"}
    text = zoo.page()
    assert text.index("## The rest of the zoo") < text.index("## Beyond the paper") < text.index("**mamba3**")


def test_states_are_constant_or_grow() -> None:
    for name, kilobytes in {"hgrn": (6, 6), "transformer++": (24576, 196608), "streaming_llm": (3072, 3072)}.items():
        assert tuple(size // 1024 for size in zoo.state_sizes(name, zoo.CONTEXTS, size="wikitext103")) == kilobytes


def test_latex_needs_no_other_glyphs(table: Table) -> None:
    assert to_latex(table).isascii()


def test_the_committed_files_are_those_of_the_code(table: Table, tmp_path: Path) -> None:
    assert zoo.PAGE.read_text(encoding="utf-8") == zoo.page(), "run `make zoo` and commit docs/zoo.md"
    for path in write(table, tmp_path, "table4"):
        committed = PROJECT_ROOT / "results" / "tables" / path.name
        assert path.read_bytes() == committed.read_bytes(), f"run `make tables` and commit {path.name}"
