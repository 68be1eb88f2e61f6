"""What is asked: the words of the prompts, where needles stand by tokens, buffers, and cells that cannot be."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from needle_fakes import EN_NEEDLES, SOURCE, ZH_NEEDLES, byte_tokenizer

from evals.needlebench.ancestry import LETTERS, ORDERS, ancestry_examples, worked_examples
from evals.needlebench.prompts import Impossible, Prompts, guided, insert, insert_chain, joint_question
from evals.needlebench.source import Source
from evals.needlebench.spec import DEPTHS, PRESETS, Cell, Spec
from rodimus_lab.config import ConfigError

BYTES = byte_tokenizer()
HINT = "Before answering, please consider what in the document is most relevant to this question."


def prompts(source: Source = SOURCE, **spec: object) -> Prompts:
    given = {"lengths": (700,), "depths": (0, 50, 100), "buffer": 100, "repeats": 3}
    return Prompts(Spec(**given | spec), source, BYTES)


def document(prompt: str, start: str, end: str) -> str:
    assert prompt.startswith(start)
    inside, found, rest = prompt[len(start) :].partition(end)
    assert found
    assert rest.endswith("\n\n")
    return inside


START = (
    "You are an intelligent AI assistant skilled in answering user questions.\n"
    "Please keep your answers concise and clear. Do not talk about irrelevant topics or repeat your answers.\n"
    "The document given to you by the user is "
)


def test_single_retrieval_word_for_word() -> None:
    cell = Cell("single_retrieval", "en", 700, 1, 0)
    for number, example in enumerate(prompts().examples(cell)):
        needle = Random(number).choice(EN_NEEDLES)
        assert example.keywords == (needle.keyword,)
        assert example.reference == f"\n{needle.text}\n"
        asked = f"What did the baker of {needle.subject} hide? {HINT} Please answer in the format "
        asked += f"'The baker of {needle.subject} hid the ________.'"
        text = document(example.prompt, START, f"\n\nNow, the question is: {asked}")
        assert text.startswith(example.reference)
        assert len(text) == 700 - 100


def test_single_retrieval_in_chinese_word_for_word() -> None:
    cell = Cell("single_retrieval", "zh", 1000, 1, 100)
    example = prompts(lengths=(1000,)).examples(cell)[0]
    needle = Random(0).choice(ZH_NEEDLES)
    start = "你是一个善于回答用户问题的智能AI助手\n请保持你的回答简洁清楚。"
    start += "不要说和下面文档中的无关的话，或重复你的回答\n用户现在给你的文档是"
    asked = f"{needle.subject}的面包师藏了什么？在回答之前，请思考文档中与此问题最相关的内容是什么。"
    asked += "请按照'面包师藏了________。'的格式回答。"
    text = document(example.prompt, start, f"\n\n现在请问：{asked}")
    assert text.endswith(example.reference)
    assert example.keywords == (needle.keyword,)


def test_multi_retrieval_word_for_word() -> None:
    cell = Cell("multi_retrieval", "en", 700, 3)
    for example in prompts().examples(cell):
        order = [next(one for one in EN_NEEDLES if one.keyword == keyword) for keyword in example.keywords]
        assert sorted(order) == sorted(EN_NEEDLES)
        questions = "、".join(f"What did the baker of {one.subject} hide?" for one in order)
        formats = "、".join(f"The baker of {one.subject} hid the ________" for one in order)
        asked = f"{questions}{HINT} Please answer in the format of '{formats}'\n"
        text = document(example.prompt, START, f"\n\nNow, the questions are: {asked}")
        hidden = [f"\n{one.text}\n" for one in order]
        bare = 600 - sum(map(len, hidden))
        points = [text.index(one) for one in hidden]
        assert points == [0, bare // 2 + len(hidden[0]), bare + len(hidden[0] + hidden[1])]
        assert len(text) == 600


def test_multi_retrieval_in_chinese() -> None:
    example = prompts().examples(Cell("multi_retrieval", "zh", 700, 3))[0]
    assert "重复你的回答\n请先仔细阅读下面的文档再依次回答最后提出的问题\n用户现在给你的文档是" in example.prompt
    order = [next(one for one in ZH_NEEDLES if one.keyword == keyword) for keyword in example.keywords]
    questions = "、".join(f"{one.subject}的面包师藏了什么？" for one in order)
    formats = "、".join(["面包师藏了________"] * 3)
    hint = "在回答之前，请思考文档中与此问题最相关的内容是什么。"
    assert example.prompt.endswith(f"\n\n现在请问：{questions}{hint}请按照'{formats}'的格式回答。\n\n\n")


def test_multi_reasoning_word_for_word() -> None:
    example = prompts().examples(Cell("multi_reasoning", "en", 700, 3, 50))[0]
    text = document(example.prompt, START, f"\n\nNow, the question is: Where does it end?{HINT}")
    assert example.keywords == ("far", "away")
    assert len(text) == 600
    hidden = [f"\nStep {step} of 3.\n" for step in (1, 2, 3)]
    bare = 600 - sum(map(len, hidden))
    first, second, third = (text.index(one) for one in hidden)
    assert first == bare // 2
    assert second - first == 2 * len(hidden[0]) + bare // 10
    assert third > second


def test_haystacks_are_shuffled_by_the_repeat_each_out_of_the_one_before() -> None:
    asked = prompts(lengths=(3000,))
    order = list(range(4))
    for number, example in enumerate(asked.examples(Cell("single_retrieval", "en", 3000, 1, 100))):
        Random(number).shuffle(order)
        hay = "".join(SOURCE.haystacks["en"][index] for index in order)
        assert hay[:500] in example.prompt


@given(
    st.lists(st.integers(0, 9), max_size=40),
    st.lists(st.tuples(st.integers(0, 100), st.lists(st.integers(10, 99), min_size=1, max_size=4)), max_size=5),
)
def test_needles_are_at_their_depth_and_the_haystack_is_whole(context, needles) -> None:
    """By depth in tokens of the bare haystack, in one pass or as OpenCompass does it, one after another."""
    needles = sorted(needles, key=lambda one: one[0])
    points = [int(len(context) * (depth / 100)) for depth, _ in needles]
    together = insert(context, [(point, hidden) for point, (_, hidden) in zip(points, needles, strict=True)])
    assert [token for token in together if token < 10] == context
    one_by_one, before = list(context), 0
    for point, (_, hidden) in zip(points, needles, strict=True):
        at = min(point + before, len(one_by_one))
        one_by_one = one_by_one[:at] + hidden + one_by_one[at:]
        before += len(hidden)
    assert together == one_by_one


@given(
    st.lists(st.integers(0, 9), max_size=60),
    st.lists(st.lists(st.integers(10, 99), min_size=1, max_size=4), min_size=1, max_size=5),
    st.sampled_from(DEPTHS),
)
def test_chained_needles_keep_their_order_and_the_haystack(context, needles, depth) -> None:
    together = insert_chain(context, needles, depth)
    assert [token for token in together if token < 10] == context
    assert [token for token in together if token >= 10] == [token for needle in needles for token in needle]
    assert together[int(len(context) * (depth / 100)) :][: len(needles[0])] == needles[0]


@pytest.mark.parametrize(
    ("task", "language", "buffers"),
    [
        ("single_retrieval", "en", (600, 800, 3000)),
        ("multi_retrieval", "en", (1000, 1300, 3000)),
        ("multi_reasoning", "en", (600, 1000, 3000)),
        ("single_retrieval", "zh", (200, 200, 200)),
        ("multi_retrieval", "zh", (200, 200, 200)),
    ],
)
def test_buffers_are_those_of_the_set_that_a_length_is_of(task, language, buffers) -> None:
    spec = Spec(lengths=PRESETS["16k"])
    for lengths, buffer in zip(((1000, 4000), (5000, 8000), (9000, 32000)), buffers, strict=True):
        assert [spec.buffer_of(Cell(task, language, length, 1)) for length in lengths] == [buffer, buffer]


def test_the_grid() -> None:
    assert (DEPTHS[0], DEPTHS[1], DEPTHS[4], DEPTHS[-1], len(DEPTHS)) == (0, 5, 21, 100, 20)
    assert PRESETS["16k"] == tuple(range(1000, 16001, 1000))
    cells = Spec(lengths=PRESETS["4k"], tasks=("single_retrieval", "multi_retrieval", "multi_reasoning")).cells()
    assert len(cells) == 4 * (2 * 20 + 2 + 8 * 20)
    assert len({cell.key for cell in cells}) == len(cells)
    assert [cell.length for cell in cells] == sorted(cell.length for cell in cells)
    assert len({cell.dataset for cell in cells}) == 2 + 2 + 8


def test_many_needles_at_1k_leave_no_haystack() -> None:
    asked = Prompts(Spec(lengths=(1000,), depths=(0, 50, 100)), SOURCE, BYTES)
    with pytest.raises(Impossible, match=r"1,000 tokens less a buffer of 1,000 and \d+ of needles leave no haystack"):
        asked.examples(Cell("multi_retrieval", "en", 1000, 3))
    scored = Prompts(Spec(lengths=(1000,), depths=(0, 50, 100), score_empty=True), SOURCE, BYTES)
    example = scored.examples(Cell("multi_retrieval", "en", 1000, 3))[0]
    assert "rain" not in example.prompt
    assert all(needle.text in example.prompt for needle in EN_NEEDLES)


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (Cell("single_retrieval", "en", 90_000, 1, 0), "the whole haystack has"),
        (Cell("multi_retrieval", "en", 2000, 4), "only 3 needles"),
        (Cell("multi_reasoning", "en", 2000, 7, 0), "no chain of 7"),
    ],
)
def test_what_the_data_does_not_have_is_impossible(cell, reason) -> None:
    with pytest.raises(Impossible, match=reason):
        prompts(depths=(0, 20, 50, 100)).examples(cell)
    with pytest.raises(Impossible, match="no needle in this language"):
        prompts(Source(SOURCE.haystacks, EN_NEEDLES)).examples(Cell("single_retrieval", "zh", 700, 1, 0))


def test_the_hint_stands_before_the_words_on_the_format() -> None:
    assert guided("Who? Please answer in the format 'X'", "en") == f"Who? {HINT} Please answer in the format 'X'"
    assert joint_question(EN_NEEDLES[:1], "en").endswith(
        "hide?Please answer in the format of 'The baker of Ulm hid the ________'"
    )


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("lengths", (0,)),
        ("lengths", ()),
        ("depths", (50, 0)),
        ("depths", (101,)),
        ("lengths", (5, 5)),
        ("tasks", ("x",)),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(field, values) -> None:
    with pytest.raises(ConfigError, match=field):
        Spec(**{"lengths": (1000,)} | {field: values})


@pytest.mark.parametrize("people", [2, 3, 6])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_ancestry_asks_each_question_in_four_orders(language, people) -> None:
    names = SOURCE.names[language]
    examples = ancestry_examples(names, language, people, repeats=2)
    assert len(examples) == 2 * len(ORDERS)
    for repeat in range(2):
        family = Random(repeat).sample(list(names), people)
        for order, example in zip(ORDERS, examples[4 * repeat : 4 * repeat + 4], strict=True):
            asked = example.prompt.removeprefix(worked_examples(language))
            assert asked != example.prompt
            options = dict(line.split(". ", 1) for line in asked.rstrip("\n").split("\n")[-4:])
            assert list(options) == list(LETTERS)
            assert options[example.keywords[0]] == family[0]
            assert [options[letter] for letter in LETTERS].index(family[0]) == order.index("A")
            assert f"'{family[-1]}'" in asked
            assert asked.endswith("\n")


def test_ancestry_word_for_word() -> None:
    first = "Question: Jasmine Lane plays the role of James Hill's father in James Hill's life. \nGiven the scrambled "
    first += "family relationships described above, who is the eldest relative that 'James Hill' can trace back to in "
    first += "the context?\nA. Jasmine Lane\nB. James Hill\nC. Christopher Flores\nD. Paula Reeves\n\nAnswer: A\n"
    assert worked_examples("en").startswith(first + "Question: For Michael Goodwin, ")
    chinese = "问题: 毕东作为刘红的爸爸，对刘红的成长有重要影响。 \n在上面提供的打乱的家族关系文本中，"
    chinese += '"刘红"的能够向上追溯到的最年长的亲人是谁？\nA. 毕东\nB. 刘红\nC. 李清亮\nD. 王展\n\n回答: A\n问题: '
    assert worked_examples("zh").startswith(chinese)
    with pytest.raises(Impossible, match="only 8 names"):
        ancestry_examples(SOURCE.names["en"], "en", 9, 1)
