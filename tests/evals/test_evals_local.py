"""Test items in local files: the requests that lm-eval's own task definitions make of them."""

from __future__ import annotations

import json

import pytest

from rodimus_lab.errors import UserError

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra eval)")

from evals.lmeval.local import LOCAL, local_file, read_rows
from evals.lmeval.tasks import SUITES, Tasks

FOUNDRY = {
    "arc_easy.jsonl": {"query": "Question: What do cats drink?", "choices": ["milk", "sand", "ink"], "gold": 0},
    "arc_challenge.jsonl": {"query": "Question: Where is up?", "choices": ["down", "above"], "gold": 1},
    "openbook_qa.jsonl": {"query": "Predators eat", "choices": ["lions", "humans", "bunnies", "grass"], "gold": 2},
    "piqa.jsonl": {"query": "Question: To cut bread\n", "choices": ["use a knife", "use a spoon"], "gold": 0},
    "hellaswag.jsonl": {"query": "Bread: A man cuts. He", "choices": ["eats", "flies", "is", "was"], "gold": 0},
    "winogrande.jsonl": {
        "context_options": ["Ann asked Bea because Ann", "Ann asked Bea because Bea"],
        "continuation": "did not know.",
        "gold": 0,
    },
    "lambada_openai.jsonl": {"context": "He looked at the cat, and the cat looked at", "continuation": "him"},
}
# Context, continuation and whether it is the right one, as lm-eval asks for them with the Hub's data.
ASKED = {
    "arc_easy": [
        ("Question: What do cats drink?\nAnswer:", f" {word}", word == "milk") for word in ("milk", "sand", "ink")
    ],
    "arc_challenge": [
        ("Question: Where is up?\nAnswer:", " down", False),
        ("Question: Where is up?\nAnswer:", " above", True),
    ],
    "openbookqa": [("Predators eat", f" {w}", w == "bunnies") for w in ("lions", "humans", "bunnies", "grass")],
    "piqa": [
        ("Question: To cut bread\nAnswer:", " use a knife", True),
        ("Question: To cut bread\nAnswer:", " use a spoon", False),
    ],
    "hellaswag": [("Bread: A man cuts. He", f" {word}", word == "eats") for word in ("eats", "flies", "is", "was")],
    "winogrande": [
        ("Ann asked Bea because Ann", " did not know.", True),
        ("Ann asked Bea because Bea", " did not know.", False),
    ],
    "lambada_openai": [("He looked at the cat, and the cat looked at", " him", True)],
}
HUB_ROWS = {
    "arc_easy": {
        "question": "What do cats drink?",
        "choices": {"text": ["milk", "sand", "ink"], "label": ["1", "2", "3"]},
        "answerKey": "1",
    },
    "piqa": {"goal": "To cut bread", "sol1": "use a knife", "sol2": "use a spoon", "label": 0},
    "winogrande": {
        "sentence": "Ann asked Bea because _ did not know.",
        "option1": "Ann",
        "option2": "Bea",
        "answer": "1",
    },
    "lambada_openai": {"text": "He looked at the cat, and the cat looked at him"},
    "hellaswag": {
        "activity_label": "Bread",
        "ctx_a": "A man cuts.",
        "ctx_b": "he",
        "endings": ["eats", "flies", "is", "was"],
        "label": "0",
    },
}


@pytest.fixture
def folder(tmp_path):
    for file, row in FOUNDRY.items():
        (tmp_path / file).write_text(json.dumps(row) + "\n\n")
    return tmp_path


def asked_by(task):
    """The requests; the right one is named by the target, or, where contexts differ, by the text."""
    task.build_all_requests()
    doc = task.eval_docs[0]
    gold = next((said for said in (task.doc_to_text(doc), task.doc_to_target(doc)) if isinstance(said, int)), 0)
    return [(*instance.args, index == gold) for index, instance in enumerate(task.instances)]


def test_requests_are_those_of_the_hubs_rows(folder):
    """The same from either form; everything but the source of the items is lm-eval's own definition."""
    tasks = Tasks("downstream", folder)
    assert set(tasks.names) == set(ASKED)
    for name, expected in ASKED.items():
        (task,) = tasks.load(name, None)
        assert asked_by(task) == expected
        if name in HUB_ROWS:
            (folder / LOCAL[name].file).write_text(json.dumps(HUB_ROWS[name]))
            (task,) = tasks.load(name, None)
            assert asked_by(task) == expected


def test_closed_books(tmp_path):
    rows = {
        "nq_open_dev.jsonl": {"question": "who sat on the mat", "answer": ["the cat", "a cat"]},
        "triviaqa_sm_sub.jsonl": {"context": "Question: Who ran?\nAnswer:", "answer": "Cat", "aliases": ["A cat"]},
    }
    for file, row in rows.items():
        (tmp_path / file).write_text(json.dumps(row))
    tasks = Tasks("nq_open,triviaqa", tmp_path)
    asked = {
        "nq_open": ("Answer these questions:\n\nQ: who sat on the mat?\nA:", "the cat"),
        "triviaqa": ("Question: Who ran??\nAnswer:", "a cat"),
    }
    for name, (prompt, answer) in asked.items():
        (task,) = tasks.load(name, None)
        task.build_all_requests()
        (request,) = task.instances
        assert request.args[0] == prompt
        assert task.process_results(task.eval_docs[0], [answer])["exact_match"] == 1


def test_every_downstream_and_recall_task_has_a_file():
    assert {*SUITES["downstream"], *SUITES["recall"]} <= set(LOCAL)


def test_the_source_is_told(folder):
    source = Tasks("piqa,arc_easy", folder).source
    assert source["source"] == "local files"
    assert set(source["files"]) == {"piqa.jsonl", "arc_easy.jsonl"}
    (folder / "piqa.jsonl").write_text(json.dumps(HUB_ROWS["piqa"]))
    other = Tasks("piqa,arc_easy", folder).source
    assert other["files"]["piqa.jsonl"] != source["files"]["piqa.jsonl"]
    assert other["files"]["arc_easy.jsonl"] == source["files"]["arc_easy.jsonl"]
    assert Tasks("piqa").source == {"source": "the Hugging Face Hub"}


def test_squad_as_published(tmp_path):
    asked = {"question": "Who?", "answers": [{"text": "Ann", "answer_start": 0}, "Bea", "Ann"]}
    (tmp_path / "squad_dev_v1.1.json").write_text(
        json.dumps({"data": [{"paragraphs": [{"context": "Ann and Bea.", "qas": [asked]}]}]})
    )
    assert read_rows("recall_squad_questions", tmp_path) == [
        {"context": "Ann and Bea.", "question": "Who?", "answers": ["Ann", "Bea"]}
    ]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("{", ["piqa.jsonl", "cannot be read"]),
        ("[]", ["line 1 is no JSON object"]),
        ("", ["holds no items"]),
        (json.dumps(HUB_ROWS["piqa"]) + '\n{"query": "b"}', ["item 2", "choices"]),
        ('{"goal": "a"}', ["item 1", "not one of piqa", "it has no 'sol1'"]),
        ('{"query": "b", "choices": ["one"], "gold": 0}', ["item 1", "not one of piqa"]),
    ],
)
def test_a_bad_file(folder, text, names):
    (folder / "piqa.jsonl").write_text(text)
    with pytest.raises(UserError) as error:
        read_rows("piqa", folder)
    assert all(name in str(error.value) for name in names)


SWDE = {"text": "a", "key": "b", "value": "c"}
PASSAGE = {"context": "a", "question": "b", "answers": ["c"]}


@pytest.mark.parametrize(
    ("task", "row", "named"),
    [
        ("recall_swde", {"text": "a", "value": "c"}, "it has no 'key'"),
        ("recall_swde", SWDE | {"key": " "}, "its 'key' is \" \", not text that is not blank"),
        ("recall_fda", SWDE | {"text": 3}, "its 'text' is 3, not text"),
        ("recall_squad", {"text": "a", "value": 5}, "its 'value' is 5, not text"),
        ("recall_nq", PASSAGE | {"answers": None}, "its 'answers' is null, not a list of texts"),
        ("recall_nq", PASSAGE | {"answers": ["a", 1]}, "its 'answers' is [\"a\", 1], not a list of texts"),
        ("recall_drop", {"context": "a", "question": "b"}, "it has no 'answers'"),
        ("recall_triviaqa", PASSAGE | {"context": None}, "its 'context' is null, not text"),
        ("triviaqa", {"question": "a", "answer": "b"}, "it has no 'answer.aliases'"),
        ("arc_easy", HUB_ROWS["arc_easy"] | {"choices": {"text": ["a"]}}, "it has no 'choices.label'"),
        ("arc_easy", {"query": "a", "choices": [1, 2], "gold": 0}, "its 'choices.text' is [1, 2], not a list of texts"),
        ("winogrande", HUB_ROWS["winogrande"] | {"answer": 1}, "its 'answer' is 1, not text"),
        ("hellaswag", HUB_ROWS["hellaswag"] | {"label": None}, "its 'label' is null, not a label"),
    ],
)
def test_a_bad_row(tmp_path, task, row, named):
    path = tmp_path / LOCAL[task].file
    path.write_text(json.dumps(row))
    with pytest.raises(UserError) as error:
        read_rows(task, tmp_path)
    assert f"item 1 of {path} is not one of {task} ({named}" in str(error.value)


def test_a_missing_file_and_a_task_without_one(folder):
    (folder / "piqa.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"piqa\.jsonl is missing, which piqa reads; tasks with their file there: arc_ch"
    ):
        local_file("piqa", folder)
    with pytest.raises(UserError, match="the task 'mmlu' has no local form"):
        local_file("mmlu", folder)
