"""Tables 21 and 22 from made-up records: what stands beside the paper's numbers, and what does not."""

from __future__ import annotations

import pytest
from eval_records import evaluation

from evals.coder import BENCHMARKS, SHOTS
from experiments.coder import table21, table22
from rodimus_lab.report import PaperResults, to_markdown

PAPER = PaperResults()


def record(metrics, *, id="run-1", chat=False, shots=None, scored="all items", **changes):
    tasks = {name.partition(".")[0] for name in metrics}
    asked = {task: SHOTS[task] for task in tasks if task in SHOTS} if shots is None else shots
    code = {"seconds": 10} if "humaneval" in tasks else None
    recipe = {"model": {"source": "folder", "name": "coder"}, "shots": asked, "chat": chat, "code": code}
    published = {"label": "coder", "corpus": "unknown", "tokenizer": ""}
    budget = {"name": "published", "steps": 0, "scored": scored}
    return evaluation(id, metrics, scored, recipe, **(published | {"budget": budget} | changes))


def ours(table, benchmark):
    (row,) = [row for row in table.rows if row[0].text == benchmark]
    return [cell.text for cell in row if cell.source == "measured"]


@pytest.mark.parametrize(("make", "number"), [(table21, 21), (table22, 22)])
def test_without_records(make, number):
    table = make([], PAPER)
    printed = PAPER.table(number)
    assert [row[0].text for row in table.rows] == list(dict.fromkeys(row["benchmark"] for row in printed))
    quoted = [cell.text for row in table.rows for cell in row if cell.source == "paper" and cell.value is not None]
    assert sorted(quoted) == sorted(row["score"].text for row in printed if getattr(row["score"], "text", ""))
    assert {cell.text for row in table.rows for cell in row if cell.source == "measured"} == {"not run"}
    text = to_markdown(table)
    for benchmark in BENCHMARKS:
        if benchmark.table == number:
            assert benchmark.config in text
            assert benchmark.note in text
    assert text.count("nobody packages it") == (4 if number == 22 else 0)


def test_scores_with_their_errors():
    table = table21(
        [record({"humaneval.pass@1.create_test": 0.25, "humaneval.pass@1.create_test_stderr": 0.034})], PAPER
    )
    assert ours(table, "HumanEval") == ["25.0 ± 3.4"]
    assert ours(table, "MBPP") == ["not run"]
    assert ours(table, "Coding Avg.") == ["not run"]


def test_a_benchmark_of_two_tasks_is_their_mean():
    both = {"cruxeval_input.pass@1.create_test": 0.2, "cruxeval_output.pass@1.create_test": 0.5}
    assert ours(table21([record(both)], PAPER), "CRUXEval") == ["35.0"]
    half = {"cruxeval_input.pass@1.create_test": 0.2, "mbpp.pass_at_1": 0.1}
    assert ours(table21([record(half)], PAPER), "CRUXEval") == ["not run"]


def test_averages_where_every_benchmark_was_run():
    """General and mathematical; the coding ones need what lm-eval does not have."""
    found = {b.measured[0]: 0.1 * n for n, b in enumerate(BENCHMARKS[:13]) if b.category != "coding"}
    table = table21([record(found)], PAPER)
    general = [100 * found[name] for name in list(found)[:4]]
    assert ours(table, "General Avg.") == [f"{sum(general) / 4:.1f}"]
    assert ours(table, "Mathematics Avg.") == [f"{50 * sum(list(found.values())[4:]):.1f}"]
    assert ours(table, "Overall") == ["not run"]


def test_records_of_one_model_are_one_column():
    parts = [record({"humaneval.pass@1.create_test": 0.25}), record({"mmlu.acc": 0.3}, id="run-22")]
    table = table21(parts, PAPER)
    assert (ours(table, "HumanEval"), ours(table, "MMLU")) == (["25.0"], ["30.0"])
    assert table21([*parts, record({"mmlu.acc": 0.9}, id="run-333", scored="the first 2")], PAPER).rows[-1][-1].text
    assert len(ours(table21([*parts, record({"mmlu.acc": 0.9}, id="run-333", scored="2 of them")], PAPER), "MMLU")) == 2


def test_other_shots_than_the_papers_are_left_out():
    table = table21([record({"mmlu.acc": 0.9, "mbpp.pass_at_1": 0.2}, shots={"mmlu": 0})], PAPER)
    assert (ours(table, "MMLU"), ours(table, "MBPP")) == (["not run"], ["20.0"])


def test_base_and_chat_are_apart():
    chat = record({"humaneval_instruct.pass@1.create_test": 0.5, "mmlu.acc": 0.4}, chat=True)
    base = record({"humaneval.pass@1.create_test": 0.25, "mmlu.acc": 0.3}, id="run-22")
    assert ours(table22([chat, base], PAPER), "HumanEval") == ["50.0"]
    assert ours(table22([chat, base], PAPER), "MMLU") == ["40.0"]
    assert ours(table21([chat, base], PAPER), "MMLU") == ["30.0"]
