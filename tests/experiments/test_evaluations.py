"""Tables 2, 10 and 11 from made-up records: rows, averages with their errors, marks, and what was not run."""

from __future__ import annotations

import pytest
from eval_records import evaluation

from evals.open_models import OPEN_MODELS
from experiments.evaluations import DOWNSTREAM, RECALL, table2, table10, table11
from rodimus_lab.records import PUBLISHED
from rodimus_lab.report import PaperResults, overlaps, to_csv, to_latex, to_markdown

PAPER = PaperResults()
ACCURACIES = [name for _, name, _ in DOWNSTREAM if name != "lambada_openai.perplexity"]
FULL = {name: 0.1 * (number + 1) for number, name in enumerate(ACCURACIES)} | {"lambada_openai.perplexity": 12.5}
ERRORS = {f"{name}_stderr": 0.01 * (number + 1) for number, name in enumerate(FULL)}


def record(metrics, *, id="run-1", model=None, label="rodimus", scored="all items", facts=(134.5e6, 100e9), **changes):
    own = {"source": "run", "name": "downstream/rodimus-1"}
    metrics = dict(metrics) | (dict(zip(("params", "trained_tokens"), facts, strict=True)) if facts else {})
    recipe = {"model": model or own, "data": {"source": "local files", "files": {id: "0"}}}
    return evaluation(id, metrics, scored, recipe, label=label, **changes)


def published(hub, metrics, **options):
    return record(
        metrics,
        model={"source": "hub", "name": hub},
        facts=None,
        corpus=PUBLISHED,
        tokenizer="",
        budget={"name": "published", "steps": 0, "scored": "all items"},
        label=hub.partition("/")[2].lower(),
        **options,
    )


def shown(table, header, row):
    """The cell under a heading; a heading with an open bracket may go on."""
    found = [name == header or ("(" in header and name.startswith(header)) for name in table.headers]
    (column,) = [index for index, same in enumerate(found) if same]
    return table.rows[row][column].text


@pytest.mark.parametrize(("make", "number"), [(table2, 2), (table10, 10), (table11, 11)])
def test_without_records_everything_is_not_run(make, number):
    table = make([], PAPER)
    printed = PAPER.table(number)
    assert len(table.rows) == len(printed)
    ours = [index for index, cell in enumerate(table.rows[0]) if cell.source == "measured"]
    assert len(ours) == (7 if number == 11 else 9)
    assert {row[index].text for row in table.rows for index in ours} == {"not run"}
    for column in set(printed[0]) - {"same_setup", "group"}:
        quoted = [row[column].text if hasattr(row[column], "text") else row[column] for row in printed]
        texts = [[row[index].text for row in table.rows] for index in range(len(table.columns))]
        assert quoted in texts, column


def test_a_run_at_the_papers_size_is_in_the_papers_row():
    table = table10([record(FULL | ERRORS)], PAPER)
    assert len(table.rows) == 5
    assert shown(table, "ARC-c acc_norm (pile", 2) == "10.00 ± 1.00"
    assert shown(table, "LAMBADA ppl (pile", 2) == "12.50 ± 0.08"
    assert shown(table, "ARC-c acc_norm (pile", 0) == "not run"
    assert table.rows[2][0].text == "rodimus"


def test_the_average_is_that_of_the_seven_accuracies():
    table = table2([record(FULL | ERRORS)], PAPER)
    error = 100 * sum((0.01 * number) ** 2 for number in range(1, 8)) ** 0.5 / 7
    assert shown(table, "AVG (pile", 2) == f"40.00 ± {error:.2f}"


def test_no_average_where_a_task_is_missing():
    part = {name: value for name, value in FULL.items() if name != "piqa.acc"}
    table = table2([record(part)], PAPER)
    assert shown(table, "AVG", 2) == "not run"
    assert shown(table, "OBQA acc_norm (pile", 2) != "not run"


def test_records_of_different_tasks_are_one_row():
    """Asked in the same way; a limit is another way, and another column."""
    first, *others = FULL
    parts = [record({first: FULL[first]}, id="run-1"), record({name: FULL[name] for name in others}, id="run-22")]
    table = table2(parts, PAPER)
    assert shown(table, "AVG (pile", 2) == "40.00"
    assert "run run-1; run-22" in "".join(table.footnotes) or "runs run-1; run-22" in "".join(table.footnotes)
    parts[1] = record({name: FULL[name] for name in others}, id="run-22", scored="the first 2 items of each task")
    table = table2(parts, PAPER)
    assert shown(table, "AVG", 2) == "not run"
    assert len(table.settings) == 2


def test_open_models_are_in_their_rows_and_no_stand_ins():
    records = [published(model.hub, {"piqa.acc": 0.5}, id=f"run-{n}") for n, model in enumerate(OPEN_MODELS)]
    table = table2(records, PAPER)
    printed = PAPER.table(2)
    assert len(table.rows) == len(printed)
    ran = {
        (row[0].text, row[1].text, row[2].text)
        for row in table.rows
        if any(c.source == "measured" and c.value for c in row)
    }
    assert ran == {(model.model, model.params_b, model.tokens_b) for model in OPEN_MODELS}
    assert "stand-in" not in to_markdown(table)
    assert len(table10(records, PAPER).rows) == 5
    without = {(str(row["model"]), row["params_b"].text) for row in printed} - {
        (m.model, m.params_b) for m in OPEN_MODELS
    }
    assert {model for model, _ in without} == {"rodimus", "rodimus+"}


def test_a_stand_in_corpus_is_told():
    table = table2([record(FULL, corpus="enwiki-25k", facts=(134.5e6, 0.2e9))], PAPER)
    assert len(table.rows) == len(PAPER.table(2)) + 1
    assert [cell.text for cell in table.rows[-1][:3]] == ["rodimus", "0.13", "0.20"]
    assert "ARC-e acc (enwiki-25k stand-in, paper budget #1)" in table.headers


def test_best_and_second_best_within_an_experiment():
    """As printed: 52.17 and 51.85 in experiment i, 62.51 second in iv."""
    table = table2([], PAPER)
    column = table.headers.index("WinoGrande acc (paper)")
    marks = [(row[column].text, mark[column]) for row, mark in zip(table.rows, table.marks, strict=True)]
    assert marks[:3] == [("52.17", "best"), ("51.85", "second"), ("51.46", "")]
    assert {("65.27", "best"), ("62.51", "second"), ("52.17", "")} <= set(marks[20:])
    assert to_latex(table).count(r"\midrule") == 4


def test_recall_rows_and_average():
    metrics = {name: 0.1 * (number + 1) for number, (_, name, _) in enumerate(RECALL)}
    errors = {f"{name}_stderr": 0.03 for name in metrics}
    recalled = published("EleutherAI/pythia-1.4b", metrics | errors)
    table = table11([recalled, record(FULL, id="run-333")], PAPER)
    assert len(table.rows) == 5
    assert shown(table, "SWDE (published weights", 0) == "10.00 ± 3.00"
    assert shown(table, "AVG (published weights", 0) == f"35.00 ± {100 * 0.03 * 6**0.5 / 6:.2f}"
    assert shown(table, "AVG (published weights", 1) == "not run"
    assert ": stderr" in to_csv(table)


SQUAD = {"recall_squad.contains": 0.25}


@pytest.mark.parametrize("corpus", ["enwiki-25k", "enwiki-25k:50m"])
def test_squad_of_a_model_that_was_trained_on_its_articles_says_so(corpus):
    for form in (to_markdown, to_latex):
        assert "at least 24 of the 48 articles" in form(table11([record(SQUAD, corpus=corpus)], PAPER))


@pytest.mark.parametrize(
    ("metrics", "corpus"),
    [
        (SQUAD, "pile"),
        (SQUAD, "no corpus"),
        ({"recall_nq.contains": 0.25}, "enwiki-25k"),
        ({"piqa.acc": 1}, "enwiki-25k"),
    ],
)
def test_other_scores_need_no_such_words(metrics, corpus):
    assert "SQuAD's dev set" not in to_markdown(table11([record(metrics, corpus=corpus)], PAPER))


def test_any_form_of_the_benchmark_counts_where_it_is_shown():
    found = record({"recall_squad_questions.contains": 0.5, "piqa.acc": 1}, corpus="enwiki-25k")
    (sentence,) = overlaps([found, found])
    assert sentence.startswith("Scores on SQuAD of models trained on enwiki-25k are not of unseen texts")
    assert overlaps([found], ["piqa.acc"]) == []
    assert overlaps([found], ["recall_squad_questions.contains"]) == [sentence]
