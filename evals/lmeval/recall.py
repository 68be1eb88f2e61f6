"""The recall tasks of Table 11: find in the context what the question asks for.

The paper names no harness. These follow the format of Based and prefix-linear-attention, whose data sets they read: the
prompt ends with a cue or a cloze question, generation ends at a line break, and an answer counts where the text that
was generated contains it, whatever its case.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Protocol

from pydantic import Field

from rodimus_lab.config import Config

Doc = dict[str, Any]
ANSWER_ROOM = 50
SUMMARY = "Summary of information above..."
MARKERS = re.compile(r"\[PAR\]|\[DOC\]|\[TLE\]")


class RecallConfig(Config):
    """`context` tokens in and `generation` tokens out: 1,024 and 512 in the paper, 1,000 and 48 upstream.

    `whitespace` says what becomes of white space around prompts and answers. Under `keep`, as in early versions of
    these tasks, a prompt may end with a space and an answer has to be found with its own, which costs most scores.
    """

    context: Annotated[int, Field(gt=ANSWER_ROOM)] = 1024
    generation: Annotated[int, Field(ge=1)] = 512
    whitespace: Literal["strip", "keep"] = "strip"


class Codec(Protocol):
    """The tokenizer of the model that is asked."""

    def tok_encode(self, string: str) -> list[int]: ...

    def tok_decode(self, tokens: Sequence[int]) -> str: ...


class RecallTask(NamedTuple):
    """Where the documents are on the Hub, and how one is made into a text, what the window is put around, the cue that
    ends the prompt, and the answers."""

    hub: str
    text: Callable[[Doc], str]
    anchors: Callable[[Doc], list[str]]
    cue: Callable[[Doc], str]
    answers: Callable[[Doc], list[str]]


def _key_cue(doc: Doc) -> str:
    return f"{doc['key'][0].upper()}{doc['key'][1:]}:"


def _without_ending(text: str, ending: str) -> str:
    while ending and text.lower().endswith(ending.lower()):
        text = text[: -len(ending)]
    return text


def _keyed(doc: Doc) -> str:
    """The document before its own summary and without the cue at its end."""
    return _without_ending(doc["text"].partition(SUMMARY)[0], f"{doc['key']}:")


def _passage(doc: Doc) -> str:
    return _without_ending(doc["context"].strip(), _question(doc))


def _marked_passage(doc: Doc) -> str:
    return _without_ending(MARKERS.sub("", doc["context"].strip()), _question(doc))


def _question(doc: Doc) -> str:
    return doc["question"].strip()


def _value(doc: Doc) -> list[str]:
    return [doc["value"]]


def _listed(doc: Doc) -> list[str]:
    return list(doc["answers"])


def _nowhere(_: Doc) -> list[str]:
    return []


def _key_and_value(doc: Doc) -> list[str]:
    return [doc["key"], doc["value"]]


RECALL = {
    "recall_swde": RecallTask("hazyresearch/based-swde-v2", _keyed, _key_and_value, _key_cue, _value),
    "recall_fda": RecallTask("hazyresearch/based-fda", _keyed, _key_and_value, _key_cue, _value),
    "recall_squad": RecallTask("hazyresearch/based-squad", lambda doc: doc["text"], _nowhere, lambda _: "", _value),
    "recall_drop": RecallTask("hazyresearch/based_drop", _passage, _nowhere, _question, _listed),
    "recall_nq": RecallTask("hazyresearch/based_nq_1024", _passage, _listed, _question, _listed),
    "recall_triviaqa": RecallTask("hazyresearch/based_triviaqa", _marked_passage, _nowhere, _question, _listed),
    "recall_squad_questions": RecallTask("", _passage, _listed, _question, _listed),
}


def recall_items(name: str, docs: Sequence[Doc], config: RecallConfig, codec: Codec) -> list[Doc]:
    """`prompt` and `answers` of every document, but of those whose first answer is at most one character long."""
    task = RECALL[name]
    items = []
    for doc in docs:
        doc = _stripped(doc) if config.whitespace == "strip" else doc
        answers = [answer for answer in task.answers(doc) if answer]
        if answers and len(answers[0].strip()) > 1:
            items.append({"prompt": _prompt(task, doc, config, codec), "answers": answers})
    return items


def _stripped(value: Any) -> Any:
    """A document without white space around its texts."""
    if isinstance(value, dict):
        return {name: _stripped(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_stripped(item) for item in value]
    return value.strip() if isinstance(value, str) else value


def _prompt(task: RecallTask, doc: Doc, config: RecallConfig, codec: Codec) -> str:
    text, cue = task.text(doc), task.cue(doc)
    room = config.context - ANSWER_ROOM
    if not cue:  # The text ends with its own question, so it is its start that gives way.
        return _last(text, room, codec)
    text = window(text, task.anchors(doc), room, codec)
    return _last(f"{text.strip().strip('.')}. {cue}", config.context, codec)


def window(text: str, anchors: Sequence[str], room: int, codec: Codec) -> str:
    """At most `room` tokens of `text`, around the first place where one of `anchors` is; its start where none is."""
    ids = codec.tok_encode(text)
    if len(ids) <= room:
        return text
    lower = text.lower()
    places = [place for anchor in anchors if (place := lower.find(anchor.strip().lower())) >= 0]
    middle = len(codec.tok_encode(text[: min(places)].rstrip())) if places else 0
    start = min(max(0, middle - room // 2), len(ids) - room)
    return codec.tok_decode(ids[start : start + room])


def contains(text: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers is in `text`, whatever its case."""
    return any(re.search(re.escape(answer), text, re.IGNORECASE) for answer in answers)


def _last(text: str, room: int, codec: Codec) -> str:
    ids = codec.tok_encode(text)
    return text if len(ids) <= room else codec.tok_decode(ids[-room:])
