"""The docs: links lead somewhere, commands are there, the tour can be walked, generated pages are up to date."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from committed_runs import copy_three

from experiments import reproducing
from rodimus_lab.records import PROJECT_ROOT
from rodimus_lab.report.artefacts import PAPER

TEXTS = [PROJECT_ROOT / "README.md", *sorted((PROJECT_ROOT / "docs").glob("*.md"))]


def commands(path: Path) -> list[list[str]]:
    """The lines of its shell blocks that call the command line."""
    blocks = re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").replace(" && ", "\n").splitlines()
    stripped = [line.strip() for line in lines]
    return [shlex.split(line, comments=True) for line in stripped if line.startswith("rodimus-lab ")]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    inside = [target for target in targets if "://" not in target]
    assert not [target for target in inside if not (path.parent / target).exists()]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_tables_have_a_head_and_as_many_cells_in_every_row(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        _, rule, *_ = rows = [re.sub(r"`[^`]*`|\\\|", "", row) for row in table.splitlines()]
        assert re.fullmatch(r"\|[-:| ]+\|", rule), table
        assert {row.count("|") for row in rows} == {rule.count("|")}, table


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_commands_are_there_with_their_options(cli, path: Path) -> None:
    """The examples' own commands aside, which tests/docs/test_docs_examples.py runs."""
    for _, *words in commands(path):
        if words[0] in ("learning-rates", "bits-per-byte"):
            continue
        names = (
            words[:2] if words[0] in ("runs", "data", "bench") and len(words) > 1 and words[1][0] != "-" else words[:1]
        )
        result = cli(*names, "--help")
        assert result.code == 0, f"{path.name}: rodimus-lab {' '.join(words)}"
        for option in (word.split("=")[0] for word in words if word.startswith("--")):
            assert option in result.out, f"{path.name}: rodimus-lab {' '.join(words)}"


@pytest.mark.slow
def test_the_tour_can_be_walked(cli, smoke_run) -> None:
    """Every command of it, but for the training, which the smoke run has behind it, beside committed runs."""
    copy_three(smoke_run.root / "runs")
    walked = []
    for _, *words in commands(PROJECT_ROOT / "docs" / "tour.md"):
        if words[0] == "wikitext103":
            assert words[words.index("--budget") + 1] == "smoke"
            continue
        words = [smoke_run.id if word == "RUN" else word for word in words]
        result = cli(*words)
        assert (result.code, result.err) == (0, ""), words
        walked.append(words[0])
    assert set(walked) == {"runs", "report", "generate"}
    page = (smoke_run.root / "site" / "runs" / "wikitext103" / f"{smoke_run.id}.html").read_text()
    assert "The built-in function" in page, "the sample"


def test_the_cost_of_reproducing_is_up_to_date() -> None:
    assert reproducing.PAGE.read_text() == reproducing.page(), "run `make reproducing` and commit"
    assert all(f"| {artefact.label}. " in reproducing.page() for artefact in PAPER)


def test_the_campaign_has_the_same_hours() -> None:
    text = (PROJECT_ROOT / "docs" / "campaign.md").read_text()
    rows = re.findall(r"^\| ((?:Table|Figure) \d+[ab]?) \| .* \| ([\d.]+) \|$", text, re.MULTILINE)
    assert len(rows) == 10
    for label, hours in rows:
        row = rf"^\| {label}\. (?:[^|]*\|){{3}} {re.escape(hours)} \|"
        assert re.search(row, reproducing.page(), re.MULTILINE), label


def test_hours_follow_from_flops() -> None:
    """By hand, Rodimus at Table 1's size: three times its 95.4 M forward FLOPs, for each of 3.28e9 tokens."""
    one = reproducing.trainings()["table15"]
    assert one.runs == 6
    assert one.flops / 6 / reproducing.WIKITEXT == pytest.approx(3 * 95.4e6, rel=0.02)


def test_every_open_question_says_how_it_is_treated() -> None:
    text = (PROJECT_ROOT / "docs" / "open-questions.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| question")]
    assert len(rows) > 30
    for row in rows:
        question, status, treatment = (part.strip() for part in row.strip("|").split(" | "))
        assert question
        assert status in ("slip", "[I]", "[U]", "-", "slip of names", "slip by omission")
        assert treatment
