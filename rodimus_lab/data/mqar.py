"""Multi-query associative recall (MQAR), the synthetic task of Arora et al. 2024 (Zoology), drawn as its code draws it.

An example first names pairs of a key and a value, then asks for the value of every key, once each. With two pairs (A 3)
and (B 7) in sixteen tokens, `0` the filler and `.` what is not counted:

    input    A 3 B 7 0 0 B 0 0 0 0 0 A 0 0 0
    label    . . . . . . 7 . . . . . 3 . . .

Keys are distinct tokens of the lower half of the vocabulary without 0, values distinct tokens of the upper half. The
questions stand at every second place after the pairs. Key by key a place is drawn out of those that are still free, the
i-th of all (from 1) in proportion to i^(power_a - 1): `power_a` 1 is uniform, 0.01 favours the near ones. With
`random_non_queries` any token of the vocabulary stands for a filler.

Shapes: N examples, T tokens, P pairs, which are also the questions of an example.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from rodimus_lab.config import Config
from rodimus_lab.errors import UserError

IGNORE = -100
BLOCK = 4096  # Examples drawn at a time, each block from a generator of its own; part of what a seed means.
MOST_POWER = 8.0  # of the gaps: beyond, the weights of places leave float32, and all but the far ones are never drawn.
MOST_TOKENS = 1 << 31  # of a vocabulary: tokens are int32.
SEEDS = 1 << 31  # Test sets take the seeds from here on, so that no test set is a training set.

Positive = Annotated[int, Field(ge=1)]
Ints = NDArray[np.int32]


class MqarSegment(Config):
    """Examples of one shape."""

    num_examples: Positive
    seq_len: Positive
    num_pairs: Positive


class MqarConfig(Config):
    """The data of a run: training examples of one shape or, in `train`, of several; `seed` draws them all.

    A run ends after the epoch in which the accuracy on `test` is above `enough` (Zoology's rule).
    """

    task: Literal["mqar"] = "mqar"
    train: Annotated[tuple[MqarSegment, ...], Field(min_length=1)]
    test: MqarSegment
    vocab_size: Annotated[int, Field(ge=4)] = 8192
    power_a: Annotated[float, Field(gt=0, le=MOST_POWER)] = 0.01
    random_non_queries: bool = False
    seed: Annotated[int, Field(ge=0, lt=SEEDS)] = 123
    enough: Annotated[float, Field(gt=0, le=1)] = 0.99

    @model_validator(mode="after")
    def _possible(self) -> MqarConfig:
        for segment in (*self.train, self.test):
            problem = _problem(segment.seq_len, segment.num_pairs, self.vocab_size)
            if problem:
                raise ValueError(problem)
        if self.seed + len(self.train) > SEEDS:
            raise ValueError(f"the seed {self.seed} leaves too few for {len(self.train)} segments; give a smaller one")
        return self

    @property
    def corpus(self) -> str:
        """The task and its training shapes in one word, such as `mqar-128x8`, as a record names its data."""
        return "mqar-" + "+".join(f"{segment.seq_len}x{segment.num_pairs}" for segment in self.train)

    @property
    def tokenizer(self) -> str:
        return "none"

    @property
    def seq_len(self) -> int:
        """Tokens of a row in training: those of the longest examples, up to which shorter ones are filled."""
        return max(segment.seq_len for segment in self.train)

    @property
    def num_train(self) -> int:
        return sum(segment.num_examples for segment in self.train)


class Examples(NamedTuple):
    """`inputs_NT`, and for each question its `positions_NP` in the input and its `answers_NP`; a question that is not
    there has the answer -100. All int32. The questions stand in the order of the pairs."""

    inputs_NT: Ints
    positions_NP: Ints
    answers_NP: Ints


def seed_of_test(seed: int) -> int:
    """The seed of the test set that goes with a training set's `seed`; never one of a training set."""
    _check_seed(seed)
    return seed + SEEDS


def generate(
    num_examples: int,
    seq_len: int,
    num_pairs: int,
    vocab_size: int = 8192,
    power_a: float = 0.01,
    random_non_queries: bool = False,
    seed: int = 0,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """inputs_NT and labels_NT, int64, -100 where there is no question; see the module's docstring.

    `seed` is from 0 to 2^32 - 1. Raises `UserError` for sizes that cannot be, or not in this machine's memory.
    """
    num_examples, seq_len = _whole("num_examples", num_examples), _whole("seq_len", seq_len)
    num_pairs, vocab_size = _whole("num_pairs", num_pairs), _whole("vocab_size", vocab_size)
    seed = _whole("seed", seed)
    problem = _problem(seq_len, num_pairs, vocab_size) or _count_problem(num_examples, seq_len, 16)
    if problem:
        raise UserError(problem)
    inputs_NT = np.empty((num_examples, seq_len), np.int64)
    labels_NT = np.full((num_examples, seq_len), IGNORE, np.int64)
    done = 0
    for block in _blocks(num_examples, seq_len, num_pairs, vocab_size, power_a, random_non_queries, seed):
        rows = slice(done, done + len(block.inputs_NT))
        inputs_NT[rows] = block.inputs_NT
        np.put_along_axis(labels_NT[rows], block.positions_NP.astype(np.int64), block.answers_NP, axis=1)
        done = rows.stop
    return inputs_NT, labels_NT


def draw(data: MqarConfig, segments: Sequence[MqarSegment], *, test: bool = False) -> list[Examples]:
    """The examples of each segment: what `generate` gives, without the places where nothing is asked.

    Segment i of the training set has the seed `data.seed + i`, that of the test set `seed_of_test(data.seed)`.
    """
    drawn = []
    for index, segment in enumerate(segments):
        seed = seed_of_test(data.seed + index) if test else data.seed + index
        blocks = _blocks(
            segment.num_examples,
            segment.seq_len,
            segment.num_pairs,
            data.vocab_size,
            data.power_a,
            data.random_non_queries,
            seed,
        )
        drawn.append(Examples(*map(np.concatenate, zip(*blocks, strict=True))))
    return drawn


def _blocks(
    num_examples: int,
    seq_len: int,
    num_pairs: int,
    vocab_size: int,
    power_a: float,
    random_non_queries: bool,
    seed: int,
) -> Iterator[Examples]:
    problem = _problem(seq_len, num_pairs, vocab_size) or _count_problem(num_examples, seq_len, 4)
    if problem:
        raise UserError(problem)
    if not isinstance(power_a, int | float) or not 0 < power_a <= MOST_POWER:
        raise UserError(f"the power of the gaps is {power_a!r}; it must be above 0 and at most {MOST_POWER:g}")
    if not 0 <= seed < 2 * SEEDS:
        raise UserError(f"the data seed is {seed}; it must be from 0 to {2 * SEEDS - 1}")
    starts = range(0, num_examples, BLOCK)
    for start, child in zip(starts, np.random.SeedSequence(seed).spawn(len(starts)), strict=True):
        random = np.random.Generator(np.random.SFC64(child))
        rows = min(BLOCK, num_examples - start)
        yield _block(random, rows, seq_len, num_pairs, vocab_size, power_a, random_non_queries)


def _block(
    random: np.random.Generator,
    rows: int,
    seq_len: int,
    num_pairs: int,
    vocab_size: int,
    power_a: float,
    random_non_queries: bool,
) -> Examples:
    half, context = vocab_size // 2, 2 * num_pairs
    keys_NP = 1 + _distinct(random, rows, num_pairs, half - 1)
    values_NP = half + _distinct(random, rows, num_pairs, vocab_size - half)
    places = np.arange(1, (seq_len - context) // 2 + 1, dtype=np.float64)
    positions_NP = context + 2 * _in_turn(random, rows, num_pairs, places ** (power_a - 1))
    inputs_NT = np.zeros((rows, seq_len), np.int32)
    inputs_NT[:, 0:context:2] = keys_NP
    inputs_NT[:, 1:context:2] = values_NP
    np.put_along_axis(inputs_NT, positions_NP, keys_NP, axis=1)
    if random_non_queries:
        fillers = inputs_NT == 0
        inputs_NT[fillers] = random.integers(vocab_size, size=np.count_nonzero(fillers), dtype=np.int32)
    return Examples(inputs_NT, positions_NP.astype(np.int32), values_NP)


def _distinct(random: np.random.Generator, rows: int, count: int, choices: int) -> Ints:
    """In each row `count` distinct numbers below `choices`, every ordered choice as likely as any other.

    A number that stands before in its row is drawn again until there is none. No step treats one number otherwise than
    another, so no choice is favoured.
    """
    bits = (count - 1).bit_length()
    drawn = random.integers(choices, size=(rows, count), dtype=np.int32)
    wide = np.dtype(np.int32 if choices << bits < 1 << 31 else np.int64)
    places: NDArray[Any] = np.arange(count, dtype=wide)
    unsettled = np.arange(rows)
    while unsettled.size:
        # Number and place in one integer: sorting them brings equal numbers together and keeps their places.
        numbers: NDArray[Any] = drawn[unsettled].astype(wide)
        ordered = np.sort(numbers << bits | places, axis=1)
        row, after = np.nonzero((ordered[:, 1:] ^ ordered[:, :-1]) >> bits == 0)
        place = ordered[row, after + 1] & ((1 << bits) - 1)
        row = unsettled[row]
        drawn[row, place] = random.integers(choices, size=len(row), dtype=np.int32)
        unsettled = np.unique(row)
    return drawn


def _in_turn(random: np.random.Generator, rows: int, count: int, weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """In each row `count` distinct indices of `weights`, one after another, each in proportion to its weight among
    those that are left: the order in which exponential clocks of these rates ring."""
    rings = random.standard_exponential((rows, len(weights)), dtype=np.float32) / weights.astype(np.float32)
    if count == len(weights):
        return np.argsort(rings, axis=1)
    first = np.argpartition(rings, count - 1, axis=1)[:, :count]
    order = np.argsort(np.take_along_axis(rings, first, axis=1), axis=1)
    return np.take_along_axis(first, order, axis=1)


def _whole(name: str, value: Any) -> int:
    try:
        return int(operator.index(value))
    except TypeError:
        raise UserError(f"{name} is {value!r}; give a whole number") from None


def _count_problem(num_examples: int, seq_len: int, token_bytes: int) -> str | None:
    if num_examples < 1:
        return f"{num_examples} examples cannot be drawn; ask for at least 1"
    need, there = num_examples * seq_len * token_bytes, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > there:
        return (
            f"{num_examples:,} examples of {seq_len:,} tokens take {need / 1e9:,.0f} GB, more than this machine's "
            f"{there / 1e9:,.0f} GB of memory; ask for fewer"
        )
    return None


def _problem(seq_len: int, num_pairs: int, vocab_size: int) -> str | None:
    """Why there are no such examples, or None."""
    if num_pairs < 1:
        return f"{num_pairs} pairs leave nothing to recall; give at least 1"
    if seq_len % 2:
        return f"the length {seq_len} is odd; give an even one, for keys and values come in pairs"
    if seq_len < 4:
        return f"the length {seq_len} is too short for a pair and its question; give at least 4"
    if 4 * num_pairs > seq_len:
        return (
            f"{num_pairs} pairs and as many questions take {4 * num_pairs} tokens, more than {seq_len}; "
            f"give at most {seq_len // 4} pairs"
        )
    if vocab_size <= seq_len:
        return f"a vocabulary of {vocab_size} is too small for examples of {seq_len} tokens; give more than {seq_len}"
    if vocab_size > MOST_TOKENS:
        return f"a vocabulary of {vocab_size} is too large for tokens of 32 bits; give at most {MOST_TOKENS}"
    return None


def _check_seed(seed: int) -> None:
    if not 0 <= seed < SEEDS:
        raise UserError(f"the seed of a training set is {seed}; it must be from 0 to {SEEDS - 1}")


def single(seq_len: int, num_pairs: int, *, num_train: int = 100_000, num_test: int = 3_000) -> MqarConfig:
    """Training and test examples of one shape, by default as many as Zoology draws for its Figure 2."""
    return MqarConfig(
        train=(MqarSegment(num_examples=num_train, seq_len=seq_len, num_pairs=num_pairs),),
        test=MqarSegment(num_examples=num_test, seq_len=seq_len, num_pairs=num_pairs),
    )


# Pairs by length: Figure 6 and Figure 1b of the paper (D.7); Zoology's Figure 2.
PAPER_PAIRS = {128: 8, 256: 16, 512: 32, 1024: 256}
ZOOLOGY_PAIRS = {64: 4, 128: 8, 256: 16, 512: 64}
# Short examples of several lengths in training, long ones in the test, as for Figure 2 of Based (Arora et al. 2024b).
BASED = MqarConfig(
    train=tuple(
        MqarSegment(num_examples=count, seq_len=seq_len, num_pairs=pairs)
        for count, seq_len, pairs in (
            (100_000, 64, 4), (20_000, 128, 8), (20_000, 256, 16), (20_000, 256, 32), (20_000, 256, 64),
        )
    ),
    test=MqarSegment(num_examples=1_000, seq_len=1024, num_pairs=256),
    random_non_queries=True,
)  # fmt: skip
