"""A part of a corpus by the number of its tokens: `pile:7b` is 7 x 10^9 tokens, `pile:7b@1` others, by another seed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from rodimus_lab.data.corpus import Corpus, Part
from rodimus_lab.errors import UserError

NAME = re.compile(r"(?P<corpus>.+):(?P<count>\d+(\.\d+)?)(?P<unit>[kmb])(@(?P<seed>\d+))?", re.IGNORECASE)
UNITS = {"k": 10**3, "m": 10**6, "b": 10**9}
HELD_OUT_TOKENS = 10_000_000
MOST_TOKENS, MOST_SEED = 10**15, 2**63 - 1


class Subset(Corpus):
    """Whole documents of `corpus`, until they have `tokens` tokens: of train in the order of its parts that `seed`
    draws, so that a smaller subset is the beginning of a larger one; of valid and test from their start, at most ten
    million tokens each. A corpus of one part has the same subset for every seed."""

    def __init__(self, corpus: Corpus, tokens: int, seed: int, name: str):
        self.corpus, self.tokens, self.seed, self.name = corpus, tokens, seed, name
        self.note = f"{tokens:,} tokens of it, seed {seed}. {corpus.note}"
        self.unit, self.splits = corpus.unit, corpus.splits

    def source(self, split: str) -> str:
        return f"{self.corpus.source(split)}, the first {self.limit(split):,} tokens, seed {self.seed}"

    def fingerprint(self, split: str) -> str | None:
        return self.corpus.fingerprint(split)

    def limit(self, split: str) -> int:
        return self.tokens if split == "train" else min(self.tokens, HELD_OUT_TOKENS)

    def exhausted(self, split: str, tokens: int) -> None:
        if split == "train":
            raise UserError(
                f"the train split of {self.corpus.name} has only {tokens:,} tokens, not the {self.tokens:,} asked for; "
                "ask for fewer"
            )

    def parts(self, split: str) -> Sequence[Part]:
        parts = self.corpus.parts(split)
        if split != "train":
            return parts
        order = np.random.Generator(np.random.PCG64(self.seed)).permutation(len(parts))
        return [parts[index] for index in order]

    def documents(self, split: str) -> Iterator[str]:
        for part in self.parts(split):
            yield from part()


def parse(name: str) -> tuple[str, int, int, str] | None:
    """(corpus, tokens, seed, suffix of the name) of `corpus:COUNT[@SEED]`; None where `name` is no such thing."""
    match = NAME.fullmatch(name)
    if match is None:
        return None
    count = float(match["count"]) * UNITS[match["unit"].lower()]
    if count > MOST_TOKENS:
        raise UserError(f"{name[:60]!r} asks for more than {MOST_TOKENS:,} tokens; give fewer")
    tokens = round(count)
    if tokens < 1:
        raise UserError(f"{name!r} asks for no tokens at all; give a number above 0")
    if len(match["seed"] or "") > len(str(MOST_SEED)) or (seed := int(match["seed"] or 0)) > MOST_SEED:
        raise UserError(f"the seed of {name[:60]!r} is more than {MOST_SEED}; give a smaller one")
    return match["corpus"], tokens, seed, f"-{match['count']}{match['unit'].lower()}" + (f"-seed{seed}" if seed else "")
