"""Questions and answers on the device, where they stay: MQAR examples as batches of one shape.

Shapes: N examples, T tokens, P questions, B batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rodimus_lab.data.loader import rng
from rodimus_lab.data.mqar import IGNORE, Examples, MqarConfig, draw
from rodimus_lab.errors import UserError
from rodimus_lab.train.distributed import World


class Questions(NamedTuple):
    """Examples of one shape, int32, on the device, and after them an empty one, number N, in which nothing counts.

    Shorter examples are filled up with token 0 at the end, which a causal model cannot see from before it.
    """

    inputs_NT: Tensor
    answers_NP: Tensor
    positions_NP: Tensor

    def take(self, rows_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The int64 batch (inputs_BT, answers_BP, positions_BP)."""
        return (
            self.inputs_NT[rows_B].long(),
            self.answers_NP[rows_B].long(),
            self.positions_NP[rows_B].long(),
        )


class QuestionSets(NamedTuple):
    """`segments` are the numbers of training examples drawn alike, in order; the fingerprints are SHA-256."""

    train: Questions
    test: Questions
    segments: tuple[int, ...]
    fingerprints: dict[str, str]


@lru_cache(maxsize=1)
def question_sets(data: MqarConfig, device: torch.device) -> QuestionSets:
    """Draw the examples of a config and put them on the device; kept for the next run on the same data."""
    train, test = draw(data, data.train), draw(data, [data.test], test=True)
    fingerprints = {"train": _fingerprint(train), "test": _fingerprint(test)}
    segments = tuple(len(examples.inputs_NT) for examples in train)
    return QuestionSets(_place(train, device), _place(test, device), segments, fingerprints)


class QuestionLoader:
    """Endless training batches (inputs_BT, answers_BP, positions_BP) of this rank.

    Each epoch takes every example once, in an order drawn from (seed, epoch). A batch holds examples of one segment;
    the last of a segment is filled up with empty ones.
    """

    def __init__(self, questions: Questions, segments: Sequence[int], batch_size: int, seed: int, world: World):
        self.questions, self.segments = questions, tuple(segments)
        self.batch_size, self.seed, self.world = batch_size, seed, world
        self._epoch, self._batch = 0, 0
        self._plan = self._draw()

    @property
    def batches_per_epoch(self) -> int:
        return len(self._plan)

    def __next__(self) -> tuple[Tensor, Tensor, Tensor]:
        rows_B = self._plan[self._batch]
        self._batch += 1
        if self._batch == len(self._plan):
            self._epoch, self._batch = self._epoch + 1, 0
            self._plan = self._draw()
        return self.questions.take(rows_B)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "batch": self._batch, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises `UserError` where the order is not the same."""
        if state["seed"] != self.seed or not 0 <= state["batch"] < self.batches_per_epoch:
            raise UserError(f"the loader state {state} is not of this run's data order; discard it")
        self._epoch, self._batch = state["epoch"], state["batch"]
        self._plan = self._draw()

    def _draw(self) -> Tensor:
        """The rows of this rank's batches of an epoch, int64 on the device: batches by rows."""
        random = rng(self.seed, self._epoch)
        nobody, batches, start = sum(self.segments), [], 0
        for count in self.segments:
            order = start + random.permutation(count)
            filler = np.full(-count % self.batch_size, nobody)
            batches.append(np.concatenate([order, filler]).reshape(-1, self.batch_size))
            start += count
        plan = random.permutation(np.concatenate(batches))
        share = self.batch_size // self.world.size
        mine = plan[:, self.world.rank * share : (self.world.rank + 1) * share]
        return torch.from_numpy(np.ascontiguousarray(mine)).to(self.world.device)


def question_batches(questions: Questions, world: World) -> Callable[[int], Iterator[tuple[Tensor, ...]]]:
    """This rank's part of a set, at most so many rows a batch; every rank gets as many batches."""
    nobody = len(questions.inputs_NT) - 1
    rounds = -(-nobody // world.size)

    def batches(rows: int) -> Iterator[tuple[Tensor, ...]]:
        for start in range(0, rounds, rows):
            numbers = torch.arange(start, min(start + rows, rounds), device=world.device)
            yield questions.take((world.rank + world.size * numbers).clamp(max=nobody))

    return batches


def _place(segments: Sequence[Examples], device: torch.device) -> Questions:
    length = max(examples.inputs_NT.shape[1] for examples in segments)
    asked = max(examples.answers_NP.shape[1] for examples in segments)
    count = sum(len(examples.inputs_NT) for examples in segments) + 1
    inputs_NT = np.zeros((count, length), np.int32)
    answers_NP = np.full((count, asked), IGNORE, np.int32)
    positions_NP = np.zeros((count, asked), np.int32)
    start = 0
    for examples in segments:
        rows = slice(start, start + len(examples.inputs_NT))
        for whole, part in (
            (inputs_NT, examples.inputs_NT),
            (answers_NP, examples.answers_NP),
            (positions_NP, examples.positions_NP),
        ):
            whole[rows, : part.shape[1]] = part
        start = rows.stop
    return Questions(*(torch.from_numpy(array).to(device) for array in (inputs_NT, answers_NP, positions_NP)))


def _fingerprint(segments: Sequence[Examples]) -> str:
    total = hashlib.sha256()
    for examples in segments:
        for array in examples:
            total.update(np.ascontiguousarray(array, "<i4").data)
    return total.hexdigest()
