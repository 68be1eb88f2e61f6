"""The prompts of NeedleBench's retrieval and reasoning tasks, word for word, and the haystacks with needles in them.

A base model reads the prompt and, as OpenCompass joins the parts of a dialogue without a chat template, two line ends.
What a repeat draws is drawn by Python's `random` seeded with its number, in the order in which OpenCompass draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from random import Random
from typing import Any, NamedTuple

from evals.needlebench.source import Chain, Needle, Source
from evals.needlebench.spec import SPACING, Cell, Language, Spec
from rodimus_lab.data import Tokenizer

END = "\n\n"
INTRODUCTION: dict[Language, str] = {
    "en": "You are an intelligent AI assistant skilled in answering user questions.\n"
    "Please keep your answers concise and clear. Do not talk about irrelevant topics or repeat your answers.\n",
    "zh": "你是一个善于回答用户问题的智能AI助手\n"
    "请保持你的回答简洁清楚。不要说和下面文档中的无关的话，或重复你的回答\n",
}
DOCUMENT: dict[Language, str] = {"en": "The document given to you by the user is ", "zh": "用户现在给你的文档是"}
QUESTION: dict[Language, str] = {"en": "\n\nNow, the question is: ", "zh": "\n\n现在请问："}
QUESTIONS: dict[Language, str] = {"en": "\n\nNow, the questions are: ", "zh": "\n\n现在请问："}
IN_TURN: dict[Language, str] = {"en": "", "zh": "请先仔细阅读下面的文档再依次回答最后提出的问题\n"}
FORMAT: dict[Language, str] = {"en": "Please answer in the format", "zh": "请按照"}
GUIDE: dict[Language, str] = {
    "en": "Before answering, please consider what in the document is most relevant to this question.",
    "zh": "在回答之前，请思考文档中与此问题最相关的内容是什么。",
}
QUESTION_MARK: dict[Language, str] = {"en": "?", "zh": "？"}
FULL_STOP: dict[Language, str] = {"en": ".", "zh": "。"}
NEEDLE_SEED = 0  # OpenCompass draws the needles of multi-needle retrieval without a seed.


class Impossible(Exception):
    """A cell that cannot be asked; the message says why."""


class Example(NamedTuple):
    """`keywords` are what an answer is searched for, one a depth in multi-needle retrieval; `reference` is the needle
    that a single-needle answer is compared with."""

    prompt: str
    keywords: tuple[str, ...]
    reference: str = ""


class Prompts:
    """The examples of every cell of `spec`. `tokenizer` measures lengths and depths."""

    def __init__(self, spec: Spec, source: Source, tokenizer: Tokenizer):
        self.spec, self.source, self.tokenizer = spec, source, tokenizer
        self._documents: dict[tuple[Language, int], list[int]] = {}
        self._contexts: dict[tuple[Language, int], list[int]] = {}
        self._orders: dict[tuple[Language, int], tuple[list[int], Any]] = {}

    def examples(self, cell: Cell) -> list[Example]:
        """Raises `Impossible` where the length has no room for a haystack or the data does not have enough."""
        make = {
            "single_retrieval": self._single,
            "multi_retrieval": self._several,
            "multi_reasoning": self._chained,
        }[cell.task]
        return [make(cell, number) for number in range(self.spec.repeats_of(cell.task))]

    def _single(self, cell: Cell, number: int) -> Example:
        needles = [needle for needle in self.source.needles if needle.language == cell.language]
        if not needles:
            raise Impossible("there is no needle in this language")
        needle = Random(number).choice(needles)
        text = f"\n{needle.text}\n"
        hidden = self.tokenizer.encode(text)
        context = self._haystack(cell, number, len(hidden))
        assert cell.depth is not None
        document = insert(context, [(int(len(context) * (cell.depth / 100)), hidden)])
        prompt = self._prompt(cell.language, document, guided(needle.question, cell.language))
        return Example(prompt, (needle.keyword,), text)

    def _several(self, cell: Cell, number: int) -> Example:
        needles = list(self._needles[cell.language])
        if len(needles) < cell.needles:
            raise Impossible(f"there are only {len(needles)} needles of different subjects and keywords")
        self._drawn(cell.language, number)[1].shuffle(needles)
        hidden = [self.tokenizer.encode(f"\n{needle.text}\n") for needle in needles]
        context = self._haystack(cell, number, sum(map(len, hidden)))
        points = [int(len(context) * (depth / 100)) for depth in self.spec.depths]
        document = insert(context, list(zip(points, hidden, strict=True)))
        question = guided(joint_question(needles, cell.language), cell.language)
        prompt = self._prompt(cell.language, document, question, several=True)
        return Example(prompt, tuple(needle.keyword for needle in needles))

    def _chained(self, cell: Cell, number: int) -> Example:
        chains = [chain for chain in self.source.chains.get(cell.language, ()) if chain.size == cell.needles]
        if not chains:
            raise Impossible(f"there is no chain of {cell.needles} needles")
        chain: Chain = self._drawn(cell.language, number)[1].choice(chains)
        hidden = [self.tokenizer.encode(f"\n{text}\n") for text in chain.needles]
        context = self._haystack(cell, number, sum(map(len, hidden)))
        assert cell.depth is not None
        document = insert_chain(context, hidden, cell.depth)
        prompt = self._prompt(cell.language, document, chain.question + GUIDE[cell.language])
        return Example(prompt, tuple(chain.answer.lower().split()))

    def _prompt(self, language: Language, document: Sequence[int], question: str, *, several: bool = False) -> str:
        text = self.tokenizer.decode(document)
        start = INTRODUCTION[language] + (IN_TURN[language] if several else "") + DOCUMENT[language]
        end = f"{QUESTIONS[language]}{question}\n" if several else QUESTION[language] + question
        return start + text + end + END

    @cached_property
    def _needles(self) -> dict[Language, list[Needle]]:
        """The needles of multi-needle retrieval, no two of one subject or with one keyword."""
        chosen: dict[Language, list[Needle]] = {}
        for language in self.spec.languages:
            lines = list(self.source.needles)
            Random(NEEDLE_SEED).shuffle(lines)
            found: list[Needle] = []
            for needle in lines:
                apart = all(needle.subject != one.subject and needle.keyword != one.keyword for one in found)
                if needle.language == language and apart and len(found) < len(self.spec.depths):
                    found.append(needle)
            chosen[language] = found
        return chosen

    def _haystack(self, cell: Cell, number: int, needle_tokens: int) -> list[int]:
        buffer = self.spec.buffer_of(cell)
        wanted = cell.length - buffer - needle_tokens
        if wanted <= 0 and not self.spec.score_empty:
            raise Impossible(
                f"{cell.length:,} tokens less a buffer of {buffer:,} and {needle_tokens:,} of needles leave no haystack"
            )
        context = self._context(cell.language, number, wanted)
        if len(context) < wanted:
            raise Impossible(f"the whole haystack has {len(context):,} tokens, not {wanted:,}")
        return context[: max(0, wanted)]

    def _context(self, language: Language, number: int, wanted: int) -> list[int]:
        """The documents in the order of a repeat, as far as `wanted` tokens need them."""
        tokens = self._contexts.get((language, number), [])
        if len(tokens) < wanted:
            tokens = []
            for index in self._drawn(language, number)[0]:
                tokens += self._document(language, index)
                if len(tokens) >= wanted:
                    break
            self._contexts[language, number] = tokens
        return tokens

    def _document(self, language: Language, index: int) -> list[int]:
        if (language, index) not in self._documents:
            self._documents[language, index] = self.tokenizer.encode(self.source.haystacks[language][index])
        return self._documents[language, index]

    def _drawn(self, language: Language, number: int) -> tuple[list[int], Random]:
        """The order of the haystack's documents in a repeat, each shuffled out of the one before; and the generator as
        that shuffle leaves it."""
        if (language, number) not in self._orders:
            count = len(self.source.haystacks[language])
            order = list(self._drawn(language, number - 1)[0]) if number else list(range(count))
            random = Random(number)
            random.shuffle(order)
            self._orders[language, number] = order, random.getstate()
        order, state = self._orders[language, number]
        random = Random()
        random.setstate(state)
        return order, random


def guided(question: str, language: Language) -> str:
    """The question with NeedleBench's hint to think first, before the words on the format of the answer."""
    asked, format_words, rest = question.partition(FORMAT[language])
    return f"{asked}{GUIDE[language]}{' ' if language == 'en' else ''}{format_words}{rest}"


def joint_question(needles: Sequence[Needle], language: Language) -> str:
    """All questions in a row, and one format for all of the answers."""
    mark, stop = QUESTION_MARK[language], FULL_STOP[language]
    questions = "、".join(needle.question.split(mark)[0] + mark for needle in needles)
    answers = "、".join(needle.question.split("'")[1].split(stop)[0] for needle in needles)
    if language == "en":
        return f"{questions}Please answer in the format of '{answers}'"
    return f"{questions}请按照'{answers}'的格式回答。"


def insert(context: Sequence[int], needles: Sequence[tuple[int, Sequence[int]]]) -> list[int]:
    """The context with each needle's tokens put in at a point of the bare context; the points must not fall."""
    parts: list[int] = []
    before = 0
    for point, needle in needles:
        parts += [*context[before:point], *needle]
        before = point
    return parts + list(context[before:])


def insert_chain(context: Sequence[int], needles: Sequence[Sequence[int]], depth: int) -> list[int]:
    """The context with the first needle at `depth` percent and each further one behind it by `SPACING` percent.

    As in OpenCompass, a needle's point counts those before it twice: once for where the one before begins, and once
    more as they are put in. Past the end it is the end.
    """
    points: list[int] = []
    for index in range(len(needles)):
        if index == 0:
            point = int(len(context) * (depth / 100))
        else:
            point = int(points[-1] + len(needles[index - 1]) + len(context) * (SPACING / 100))
        points.append(min(point, len(context) + sum(map(len, needles[:index]))))
    document = list(context)
    shift = 0
    for point, needle in zip(points, needles, strict=True):
        document[point + shift : point + shift] = needle
        shift += len(needle)
    return document
