"""How predictions are scored in both languages, and what the cells come to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.needlebench.prompts import Example
from evals.needlebench.scores import (
    WEIGHTS,
    average,
    choice,
    levenshtein,
    of_cell,
    score,
    settled,
    single_retrieval,
    summarize,
)
from evals.needlebench.spec import Spec

TEXT = st.text(alphabet="ab 桥", max_size=12)


@pytest.mark.parametrize(
    ("prediction", "needle", "keyword", "expected"),
    [
        ("It is the brass key!", "\nThe baker hid the brass key.\n", "brass key", 100),
        ("It is the Brass Key!", "\nX\n", "brass key", pytest.approx(0.2 * 100 * (1 - 16 / 16), abs=1e-9)),
        ("", "\nabc\n", "key", 0),
        ("a b\nc", "\nabc\n", "key", 20),
        ("abd", "\nabc\n", "key", pytest.approx(20 * 2 / 3)),
        ("是铜钥匙。", "\n面包师藏了铜钥匙。\n", "铜钥匙", 100),
        ("面包师藏了钥匙", "\n面包师藏了铜钥匙\n", "铜钥匙", pytest.approx(20 * 7 / 8)),
        ("", "", "key", 20),
    ],
)
def test_single_retrieval(prediction, needle, keyword, expected) -> None:
    assert single_retrieval(prediction, needle, keyword) == expected


def test_the_keyword_is_searched_in_the_answer_as_it_stands() -> None:
    assert single_retrieval("brass\nkey", "\nbrass key\n", "brass key") == 20


@given(TEXT, TEXT, TEXT)
def test_levenshtein_is_a_distance(a, b, c) -> None:
    assert levenshtein(a, b) == levenshtein(b, a)
    assert (levenshtein(a, b) == 0) == (a == b)
    assert abs(len(a) - len(b)) <= levenshtein(a, b) <= max(len(a), len(b))
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)


@given(TEXT, TEXT)
def test_without_the_keyword_no_more_than_a_fifth(prediction, needle) -> None:
    assert 0 <= single_retrieval(prediction, needle, "keyword") <= 20


def test_multi_retrieval_is_scored_by_depth() -> None:
    example = Example("", ("red door", "蓝地图", "coin"))
    assert score("multi_retrieval", "coin; 蓝地图; Red Door", example) == [0, 100, 100]
    cell = of_cell("multi_retrieval", [[0, 100, 100], [100, 100, 0]])
    assert cell == {"scores": [50, 100, 50]}


def test_multi_reasoning_counts_words_as_parts_of_the_answer_whatever_their_case() -> None:
    example = Example("", ("hillary", "rodham", "clinton"))
    assert score("multi_reasoning", "It was HILLARY clintons.", example) == [pytest.approx(200 / 3)]
    assert score("multi_reasoning", "是希拉里·克林顿。", Example("", ("希拉里·克林顿",))) == [100]


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("Answer: B\nQuestion: A", "B"),
        ("回答: C", "C"),
        ("All of them. The answer is D.", "D"),
        ("A comes first, 所以答案是：B", "B"),
        ("D", "D"),
        ("Answers", "A"),
        ("none", ""),
    ],
)
def test_choice(prediction, letter) -> None:
    assert choice(prediction) == letter


def test_ancestry_counts_all_orders_and_those_right_in_every_one() -> None:
    right, wrong = [100.0], [0.0]
    assert of_cell("ancestry", [right] * 4 + [right, wrong, right, right]) == {"scores": [87.5], "circular": 50}


@given(st.text(alphabet="key ABCD答案是:", max_size=20), st.text(alphabet="key ABCD", max_size=10))
def test_what_is_settled_stays_so(prediction, more) -> None:
    cases = (
        ("single_retrieval", Example("", ("key",), "\nkey\n")),
        ("multi_retrieval", Example("", ("key", "A"))),
        ("multi_reasoning", Example("", ("key",))),
        ("ancestry", Example("", ("B",))),
    )
    for task, example in cases:
        if settled(task, prediction, example):
            assert score(task, prediction + more, example) == score(task, prediction, example)


def results(spec: Spec, values: dict[str, float]) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = {}
    for cell in spec.cells():
        scores = [values[cell.dataset]] * (len(spec.depths) if cell.depth is None else 1)
        found[cell.key] = {"scores": scores}
    return found


VALUES = {
    "single_retrieval_en": 30.0,
    "single_retrieval_zh": 10.0,
    "multi_retrieval_en": 40.0,
    "multi_retrieval_zh": 0.0,
} | {f"multi_reasoning_{n}_{language}": 10.0 * n for n in (2, 3, 4, 5) for language in ("en", "zh")}


def test_the_overall_score_weighs_the_subtasks() -> None:
    spec = Spec(lengths=(1000, 2000), depths=(0, 100))
    metrics = summarize(spec, results(spec, VALUES))
    assert (metrics["single_retrieval"], metrics["multi_retrieval"], metrics["multi_reasoning"]) == (20, 20, 35)
    assert metrics["overall"] == pytest.approx(0.4 * 20 + 0.3 * 20 + 0.3 * 35)
    assert metrics["multi_reasoning_5_zh"] == 50
    assert metrics["impossible"] == {}


def test_the_weights_give_the_published_overall_score() -> None:
    """Of Rodimus+-1.6B, from the printed means of its subtasks."""
    means = {"single_retrieval": 21.69, "multi_retrieval": 13.21, "multi_reasoning": 21.56}
    assert sum(WEIGHTS.values()) == pytest.approx(1)
    assert sum(WEIGHTS[task] * mean for task, mean in means.items()) == pytest.approx(19.11, abs=0.005)


def test_an_impossible_cell_is_no_score() -> None:
    spec = Spec(lengths=(1000, 2000), depths=(0, 100))
    found = results(spec, VALUES)
    found["multi_retrieval_en/1000"] = {"impossible": "no room"}
    metrics = summarize(spec, found)
    assert metrics["grids"]["multi_retrieval_en"] == [[None, None], [40, 40]]
    assert metrics["grids"]["multi_retrieval_zh"] == [[0, 0], [0, 0]]
    assert metrics["grids"]["multi_retrieval"] == [[None, None], [20, 20]]
    assert metrics["grids"]["overall"][0] == [None, None]
    assert metrics["multi_retrieval"] == 20
    assert metrics["impossible"] == {"multi_retrieval_en/1000": "no room"}


def test_without_all_subtasks_there_is_no_overall_score() -> None:
    spec = Spec(lengths=(1000,), depths=(0, 100), tasks=("single_retrieval",), languages=("zh",))
    metrics = summarize(spec, results(spec, VALUES))
    assert metrics["single_retrieval"] == 10
    assert "overall" not in metrics
    assert "overall" not in metrics["grids"]


@given(st.lists(st.lists(st.none() | st.floats(0, 100), min_size=1, max_size=4), min_size=1, max_size=4))
def test_the_mean_of_a_grid_lies_among_its_cells(grid) -> None:
    there = [value for row in grid for value in row if value is not None]
    mean = average(grid)
    if not there:
        assert mean is None
    else:
        assert min(there) - 1e-9 <= mean <= max(there) + 1e-9
