"""The recall tasks: prompts, windows and the metric, by what stands in the documents."""

from __future__ import annotations

import pytest

from evals.lmeval.recall import RECALL, RecallConfig, contains, recall_items, window
from rodimus_lab.config import ConfigError


class Words:
    """A tokenizer whose tokens are words, each with the spaces before it."""

    def tok_encode(self, string):
        self.words = getattr(self, "words", [])
        ids = []
        for part in string.split(" "):
            if part not in self.words:
                self.words.append(part)
            ids.append(self.words.index(part))
        return ids

    def tok_decode(self, tokens):
        return " ".join(self.words[token] for token in tokens)


def item(name, doc, **options):
    (made,) = recall_items(name, [doc], RecallConfig(**options), Words())
    return made


@pytest.mark.parametrize("name", ["recall_fda", "recall_swde"])
def test_cue_of_a_key(name):
    doc = {"text": "The device is a pump. device name: ", "key": "device name", "value": " pump "}
    assert item(name, doc) == {"prompt": "The device is a pump. Device name:", "answers": ["pump"]}
    doc["text"] = "The device is a pump.\nSummary of information above... device name:"
    assert item(name, doc)["prompt"] == "The device is a pump. Device name:"
    doc["text"] = "The device is a pump. Device Name:device name:"
    assert item(name, doc)["prompt"] == "The device is a pump. Device name:"


@pytest.mark.parametrize("name", ["recall_drop", "recall_nq", "recall_triviaqa"])
def test_a_question_after_its_passage(name):
    doc = {"context": " Ann won in 1999. The winner was ", "question": "the winner was", "answers": ["Ann", "Ann Lee"]}
    assert item(name, doc) == {"prompt": "Ann won in 1999. the winner was", "answers": ["Ann", "Ann Lee"]}


def test_markers_of_triviaqa():
    doc = {"context": "[DOC] [TLE] Ann [PAR] won.", "question": "the winner was", "answers": ["Ann"]}
    assert item("recall_triviaqa", doc)["prompt"].split() == ["Ann", "won.", "the", "winner", "was"]
    assert "[PAR]" in item("recall_nq", doc)["prompt"]


def test_white_space_is_an_option():
    """Stripped, a prompt ends with its last word and answers are bare; kept, both are as the data have them."""
    doc = {"text": "Ann won. The winner was ", "value": "Ann "}
    assert item("recall_squad", doc) == {"prompt": "Ann won. The winner was", "answers": ["Ann"]}
    assert item("recall_squad", doc, whitespace="keep") == {"prompt": "Ann won. The winner was ", "answers": ["Ann "]}


def test_answers_of_one_character_are_left_out():
    docs = [
        {"context": "a b", "question": "q", "answers": answers} for answers in (["7"], [" 7 "], ["17"], [], ["ab", "7"])
    ]
    kept = recall_items("recall_drop", docs, RecallConfig(), Words())
    assert [made["answers"] for made in kept] == [["17"], ["ab", "7"]]


TEXT = " ".join(f"w{number}" for number in range(100))


@pytest.mark.parametrize(
    ("anchors", "start"),
    [(["w50"], 45), (["w70", "W50"], 45), (["w2"], 0), (["w99"], 90), (["nowhere"], 0), ([], 0)],
)
def test_a_window_lies_around_the_first_anchor(anchors, start):
    codec = Words()
    cut = window(TEXT, anchors, 10, codec)
    assert cut.split() == [f"w{number}" for number in range(start, start + 10)]


def test_short_texts_are_left_alone():
    assert window(TEXT, ["w50"], 100, Words()) == TEXT


def test_prompts_keep_to_the_context():
    """50 tokens of it are left for the question; a text that ends with its own keeps its end."""
    long = " ".join(f"w{number}" for number in range(500))
    nq = item("recall_nq", {"context": long, "question": "the one is", "answers": ["w300"]}, context=100)[
        "prompt"
    ].split()
    assert "w300" in nq
    assert len(nq) == 50 + 3
    drop = item("recall_drop", {"context": long, "question": "it is", "answers": ["w300"]}, context=100)[
        "prompt"
    ].split()
    assert drop[0] == "w0"
    squad = item("recall_squad", {"text": long, "value": "w3"}, context=100)["prompt"].split()
    assert squad == [f"w{number}" for number in range(450, 500)]
    question = " ".join(f"q{number}" for number in range(200))
    both = item("recall_nq", {"context": long, "question": question, "answers": ["w300"]}, context=100)[
        "prompt"
    ].split()
    assert both == [f"q{number}" for number in range(100, 200)]


@pytest.mark.parametrize(
    ("text", "answers", "found"),
    [
        (" It was ANN Lee.", ["bea", "Ann"], True),
        ("It was Ann", ["Anne"], False),
        ("costs $3.50 (net)", ["$3.50 (net)"], True),
        ("costs $3x50", ["$3.50"], False),
        ("Ann", ["Ann "], False),
        ("", ["Ann"], False),
    ],
)
def test_contains(text, answers, found):
    assert contains(text, answers) == found


def test_the_papers_numbers_are_the_defaults():
    config = RecallConfig()
    assert (config.context, config.generation) == (1024, 512)
    assert {name for name, task in RECALL.items() if task.hub} == {
        f"recall_{name}" for name in ("swde", "fda", "squad", "drop", "nq", "triviaqa")
    }
    with pytest.raises(ConfigError, match="context"):
        RecallConfig(context=50)
