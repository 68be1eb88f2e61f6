"""The task `needle`: documents with one sentence hidden in them, then a question and its answer.

A document is the text before the haystack, a piece of a corpus with the needle at a random token, the question, the
answer and an end-of-document token. In training a row holds documents of random lengths end to end, short ones more
often, so that answers are dense and what is far is learned after what is near; in evaluation it is one document, and
its needle is one that training never hides.

Shapes: B batch, T time.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import product
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from rodimus_lab.config import Config
from rodimus_lab.data.loader import IGNORED, Batch, rng
from rodimus_lab.data.prepared import PreparedData
from rodimus_lab.errors import UserError

Positive = Annotated[int, Field(ge=1)]
Words = Annotated[tuple[str, ...], Field(min_length=1)]
HELD_OUT = {"valid": 8, "test": 9}  # Tenths of all needles, by a hash.
REJECTIONS = 10_000
SAMPLE = 500_000  # Tokens of the train split, out of which words are drawn.
MOST_TOKENS = 3  # Of a word that is drawn.
JOINS = (" ", " ", " ", " ", " ", " ", " of ", " of the ")  # Between two words of a key or value.
WORD = re.compile(r"\{(word\d)\}")


class Relation(Config):
    """A sentence to hide, the question about it and the answer, with `{key}` and, but for the question, `{value}`.
    `{word0}` to `{word9}` are words of the corpus, drawn anew for each document, common ones more often."""

    needle: str
    question: str
    answer: str

    @model_validator(mode="after")
    def _whole(self) -> Relation:
        for field, text in (("needle", self.needle), ("answer", self.answer)):
            if "{value}" not in text:
                raise ValueError(f"{field!r} has no {{value}}")
        if "{value}" in self.question:
            raise ValueError("'question' gives the {value} away")
        return self


class NeedleConfig(Config):
    """The data of a run. A key is one of `keys`, a value one word out of each tuple of `values`, joined by spaces. A
    number in the place of either stands for from one up to so many of the corpus's words with a capital letter, now and
    then with "of" or "of the" between them.

    `before` stands before the haystack and `after` between it and the question. `hold_out`: valid and test hide values,
    or of every value as many keys, that training does not. `answers_only` counts the answers' tokens in the loss, else
    all tokens. `shortest` is the least length of a document in training, in tokens.
    """

    task: Literal["needle"] = "needle"
    corpus: str
    tokenizer: str
    seq_len: Positive
    shortest: Positive
    before: str
    after: str
    relations: Annotated[tuple[Relation, ...], Field(min_length=1)]
    keys: Words | Positive
    values: Annotated[tuple[Words, ...], Field(min_length=1)] | Positive
    hold_out: Literal["value", "pair"] = "value"
    answers_only: bool = True
    eval_documents: Positive = 256

    @model_validator(mode="after")
    def _possible(self) -> NeedleConfig:
        if self.shortest > self.seq_len:
            raise ValueError(f"'shortest' is {self.shortest}, more than the row's {self.seq_len} tokens")
        if self.hold_out == "pair" and isinstance(self.keys, int):
            raise ValueError("'hold_out' is 'pair', which takes keys that are listed")
        return self

    @property
    def all_values(self) -> list[str]:
        """Where they are listed; where words of the vocabulary make them up, none."""
        return [] if isinstance(self.values, int) else [" ".join(words) for words in product(*self.values)]

    def split_of(self, key: str, value: str) -> str:
        """train, valid or test."""
        if self.hold_out == "value":
            tenth = _hash(value) % 10
        else:
            assert not isinstance(self.keys, int)
            tenth = 9 - _shuffled(self.keys, value).index(key) // math.ceil(len(self.keys) / 10)
        return next((split for split, held in HELD_OUT.items() if held == tenth), "train")


def _words(prepared: PreparedData, *, capitalised: bool) -> list[str]:
    """Words of the corpus that are few tokens each, the commonest first. Raises `UserError` where there are none."""
    tokenizer = prepared.tokenizer()
    text = tokenizer.decode(prepared.shards("train")[0][:SAMPLE].tolist())
    counts = Counter(re.findall(r" ([A-Z][a-z]{2,})\b" if capitalised else r" ([a-z]{2,})\b", text))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    found = [word for word in words if len(tokenizer.encode(f" {word}")) <= MOST_TOKENS]
    if not found:
        kind = "capitalised words" if capitalised else "words"
        raise UserError(
            f"the train split of {prepared.manifest.corpus!r} has no {kind}; list the keys, values and words"
        )
    return found


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@lru_cache(maxsize=1 << 16)
def _shuffled(keys: Words, value: str) -> Words:
    return tuple(sorted(keys, key=lambda key: _hash(f"{key} {value}")))


class NeedleDocuments:
    """Draws documents over a prepared corpus. Raises `UserError` where they are longer than the data's lengths or no
    needle is left to a split."""

    def __init__(self, data: NeedleConfig, prepared: PreparedData):
        self.data, self.tokenizer = data, prepared.tokenizer()
        self._haystacks = {split: prepared.shards(split) for split in ("train", *HELD_OUT)}
        self._encode = lru_cache(maxsize=1 << 18)(lambda text: tuple(self.tokenizer.encode(text)))
        drawn = isinstance(data.values, int) or isinstance(data.keys, int)
        self._names = _words(prepared, capitalised=True) if drawn else []
        self._asked = [sorted(set(WORD.findall("".join(relation.to_dict().values())))) for relation in data.relations]
        self._words = _words(prepared, capitalised=False) if any(self._asked) else []
        keys = self._names[:1] if isinstance(data.keys, int) else data.keys
        values = self._names if isinstance(data.values, int) else data.all_values
        present = {data.split_of(key, value) for key in keys for value in values}
        for split in ("train", *HELD_OUT):
            if split not in present:
                raise UserError(f"no needle is left to the {split} split; give more keys or values")
        if data.shortest <= self.longest_frame:
            raise UserError(
                f"a document takes up to {self.longest_frame} tokens without its haystack; lengthen the shortest, "
                f"{data.shortest}"
            )

    @cached_property
    def longest_frame(self) -> int:
        """No document has more tokens beside its haystack."""
        data = self.data
        longest = self._most_tokens(self._names)
        join = max(JOINS, key=len)
        keys = [join.join([longest] * data.keys)] if isinstance(data.keys, int) else data.keys
        if isinstance(data.values, int):
            value = join.join([longest] * data.values)
        else:
            value = max(data.all_values, key=lambda text: len(self.tokenizer.encode(f" {text}")))
        words = dict.fromkeys((f"word{digit}" for digit in range(10)), self._most_tokens(self._words))
        frames = (sum(map(len, self._frame(*pair, value, words))) for pair in product(data.relations, keys))
        return max(frames) + 2  # A word may be cut otherwise beside another one.

    def _most_tokens(self, words: Sequence[str]) -> str:
        return max(words, key=lambda word: len(self.tokenizer.encode(f" {word}")), default="")

    def document(self, random: np.random.Generator, split: str, length: int) -> tuple[np.ndarray, int]:
        """Exactly `length` token ids, and where the answer begins."""
        data = self.data
        which = random.integers(len(data.relations))
        words = {name: self._word(random) for name in self._asked[which]}
        for _ in range(REJECTIONS):
            key, value = self._key(random), self._value(random)
            if data.split_of(key, value) == split:
                break
        else:
            raise UserError(f"hardly any needle is left to the {split} split; give more keys or values")
        before, needle, question, answer = self._frame(data.relations[which], key, value, words)
        room = length - len(before) - len(needle) - len(question) - len(answer)
        shards = self._haystacks[split]
        shard = shards[random.integers(len(shards))]
        if len(shard) < room:
            raise UserError(f"the {split} split of {data.corpus} has no {room} tokens in a shard; shorten the sequence")
        start = random.integers(len(shard) - room + 1)
        haystack = shard[start : start + room]
        point = random.integers(room + 1)
        ids = np.concatenate([before, haystack[:point], needle, haystack[point:], question, answer]).astype(np.int64)
        return ids, length - len(answer)

    def _key(self, random: np.random.Generator) -> str:
        keys = self.data.keys
        return self._several(random, keys) if isinstance(keys, int) else keys[random.integers(len(keys))]

    def _value(self, random: np.random.Generator) -> str:
        values = self.data.values
        if isinstance(values, int):
            return self._several(random, values)
        return " ".join(words[random.integers(len(words))] for words in values)

    def _several(self, random: np.random.Generator, most: int) -> str:
        text = self._names[random.integers(len(self._names))]
        for _ in range(random.integers(most)):
            text += JOINS[random.integers(len(JOINS))] + self._names[random.integers(len(self._names))]
        return text

    def _word(self, random: np.random.Generator) -> str:
        """As likely one of the ten commonest as one of the ninety after them."""
        return self._words[int(len(self._words) ** random.random()) - 1]

    def row(self, random: np.random.Generator, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """inputs_T and targets_T; in training of several documents, else of one."""
        data = self.data
        whole = data.seq_len + 1
        ids = np.empty(whole, np.int64)
        counted = np.zeros(whole, bool)
        done = 0
        while done < whole:
            left = whole - done
            length = left if split != "train" else self._length(random, left)
            ids[done : done + length], answer = self.document(random, split, length)
            counted[done + answer : done + length] = True
            done += length
        if split == "train" and not data.answers_only:
            counted[:] = True
        return ids[:-1], np.where(counted[1:], ids[1:], IGNORED)

    def _length(self, random: np.random.Generator, left: int) -> int:
        """Log-uniform from the shortest up to what is left, and all of it where no further document would fit."""
        shortest = self.data.shortest
        length = int(math.exp(random.uniform(math.log(shortest), math.log(left + 1))))
        return left if left - length < shortest else min(max(length, shortest), left)

    def _frame(self, relation: Relation, key: str, value: str, words: Mapping[str, str]) -> tuple[tuple[int, ...], ...]:
        question = self.data.after + relation.question.format(key=key, **words)
        answer = relation.answer.format(key=key, value=value, **words)
        needle = relation.needle.format(key=key, value=value, **words)
        return (
            self._encode(self.data.before),
            self._encode(f"\n{needle}\n"),
            self._encode(question),
            (*self._encode(answer), self.tokenizer.eos_id),
        )


class NeedleLoader:
    """Endless training batches: row i of a run is drawn from (seed, i), whatever the number of ranks."""

    def __init__(self, documents: NeedleDocuments, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.documents, self.batch_size, self.seed = documents, batch_size, seed
        self._share = batch_size // world_size
        self._first = rank * self._share
        self._taken = 0

    def __next__(self) -> Batch:
        start = self._taken + self._first
        self._taken += self.batch_size
        return batch(self.documents.row(rng(self.seed, index)) for index in range(start, start + self._share))

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self._taken, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises `UserError` where the seed is another."""
        if state.get("seed") != self.seed:
            raise UserError(f"the loader state was taken with seed {state.get('seed')}, and now it is {self.seed}")
        self._taken = state["taken"]


def needle_batches(
    documents: NeedleDocuments, split: str, rows: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """This rank's part of a split's documents, the same in every run; what a rank lacks is filled with rows that count
    nothing."""
    total = documents.data.eval_documents
    rounds = -(-total // world_size)
    seed = sum(split.encode()) << 32
    for start in range(0, rounds, rows):
        drawn = []
        for index in range(start, min(start + rows, rounds)):
            number = rank + world_size * index
            inputs_T, targets_T = documents.row(rng(seed, number), split)
            drawn.append((inputs_T, targets_T if number < total else np.full_like(targets_T, IGNORED)))
        yield batch(iter(drawn))


def batch(rows: Iterator[tuple[np.ndarray, np.ndarray]]) -> Batch:
    """Rows as int64 inputs_BT and targets_BT."""
    inputs, targets = zip(*rows, strict=True)
    return torch.from_numpy(np.stack(inputs)), torch.from_numpy(np.stack(targets))
