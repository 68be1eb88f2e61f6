"""What the trainer asks of data, and nothing more of it.

Shapes: B batch, T time, P questions. Every batch is int64: (inputs_BT, targets_BT; -100: not counted), or
(inputs_BT, answers_BP; -100: not counted, positions_BP) where only some places of a row are asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain, starmap
from typing import Any, Protocol

from torch import Tensor

from rodimus_lab.data import BlockLoader, PreparedData, TokenBlocks, eval_batches, prepare
from rodimus_lab.data.mixture import MixtureConfig, MixtureLoader
from rodimus_lab.data.mqar import MqarConfig
from rodimus_lab.data.needle import NeedleConfig, NeedleDocuments, NeedleLoader, needle_batches
from rodimus_lab.errors import UserError
from rodimus_lab.nn.model import IGNORE
from rodimus_lab.recipe import DataConfig, Recipe
from rodimus_lab.train.distributed import World
from rodimus_lab.train.recall import QuestionLoader, question_batches, question_sets

Batch = tuple[Tensor, ...]


class Loader(Protocol):
    """Endless batches: this rank's rows of one global batch at a time (`World.data_rank`), of whole sequences. The
    state is JSON and the same on all ranks."""

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Feed:
    """`evaluation[split](rows)` gives this rank's part of that split, at most `rows` rows a batch, as many batches on
    every rank and every token of the split once; `words[split]` is its number of words, `facts` what identifies the
    data, in JSON, for the run's environment. With `questions` the batches are those of questions and answers; with
    `answers` those of evaluation are, and a row is one answer of several tokens. A run is at its end where a metric is
    above its value in `enough`. With
    `end_token` documents are packed and end there."""

    train: Loader
    evaluation: Mapping[str, Callable[[int], Iterable[Batch]]]
    words: Mapping[str, int] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    questions: bool = False
    answers: bool = False
    end_token: int | None = None
    enough: Mapping[str, float] = field(default_factory=dict)


OpenFeed = Callable[[Recipe, World], Feed]


def open_feed(recipe: Recipe, world: World) -> Feed:
    """The recipe's data: of text or of a task. All splits but `train` are evaluated.

    Raises `UserError` where the corpus cannot be had, a shard is corrupt, or the data has more tokens than the model's
    vocabulary.
    """
    if isinstance(recipe.data, MqarConfig):
        return _open_questions(recipe, recipe.data, world)
    if isinstance(recipe.data, MixtureConfig):
        return _open_mixture(recipe, recipe.data, world)
    prepared = _open_corpus(recipe, recipe.data.corpus, recipe.data.tokenizer, world)
    if isinstance(recipe.data, NeedleConfig):
        return _open_needles(recipe, recipe.data, prepared, world)
    return _open_text(recipe, recipe.data, prepared, world)


def _open_questions(recipe: Recipe, data: MqarConfig, world: World) -> Feed:
    if data.vocab_size > recipe.model.vocab_size:
        raise UserError(
            f"the task has {data.vocab_size} tokens, but the model's vocabulary only {recipe.model.vocab_size}; "
            "enlarge it"
        )
    sets = question_sets(data, world.device)
    return Feed(
        train=QuestionLoader(sets.train, sets.segments, recipe.budget.batch_size, recipe.seed, world),
        evaluation={"test": question_batches(sets.test, world)},
        facts={"fingerprints": sets.fingerprints},
        questions=True,
        enough={"test_accuracy": data.enough},
    )


def _open_corpus(recipe: Recipe, corpus: str, tokenizer: str, world: World) -> PreparedData:
    """The corpus, tokenised on first use."""
    prepared = prepare(corpus, tokenizer, progress=world.main)
    if world.main:
        prepared.verify()
    manifest = prepared.manifest
    if manifest.vocab_size > recipe.model.vocab_size:
        raise UserError(
            f"the tokenizer {manifest.tokenizer} has {manifest.vocab_size} tokens, but the model's vocabulary only "
            f"{recipe.model.vocab_size}; enlarge it"
        )
    return prepared


def _open_needles(recipe: Recipe, data: NeedleConfig, prepared: PreparedData, world: World) -> Feed:
    documents = NeedleDocuments(data, prepared)

    def reader(split: str) -> Callable[[int], Iterable[Batch]]:
        return lambda rows: starmap(asked, needle_batches(documents, split, rows, world.data_rank, world.data_size))

    return Feed(
        train=NeedleLoader(documents, recipe.budget.batch_size, recipe.seed, world.data_rank, world.data_size),
        evaluation={split: reader(split) for split in ("valid", "test")},
        facts={
            "fingerprints": {split: prepared.fingerprint(split) for split in prepared.splits},
            "tokenizer_fingerprint": prepared.manifest.tokenizer_fingerprint,
        },
        answers=True,
    )


def asked(inputs_BT: Tensor, targets_BT: Tensor) -> Batch:
    """The counted targets of a batch as answers, (inputs_BT, answers_BP, positions_BP)."""
    counted_BT = targets_BT != IGNORE
    most = max(1, int(counted_BT.sum(1).max()))
    positions_BP = (~counted_BT).int().argsort(dim=1, stable=True)[:, :most]
    return inputs_BT, targets_BT.gather(1, positions_BP), positions_BP


def _open_text(recipe: Recipe, data: DataConfig, prepared: PreparedData, world: World) -> Feed:
    manifest, batch_size = prepared.manifest, recipe.budget.batch_size
    blocks = TokenBlocks(prepared, "train", data.seq_len)
    loader = BlockLoader(blocks, batch_size, recipe.seed, world.data_rank, world.data_size)
    splits = [split for split in prepared.splits if split != "train"]

    def reader(split: str) -> Callable[[int], Iterable[Batch]]:
        return lambda rows: eval_batches(prepared, split, data.seq_len, rows, world.data_rank, world.data_size)

    return Feed(
        train=loader,
        evaluation={split: reader(split) for split in splits},
        words={split: prepared.split(split).words for split in splits},
        end_token=manifest.eos_id if data.packed else None,
        facts={
            "fingerprints": {split: prepared.fingerprint(split) for split in prepared.splits},
            "tokens": {split: prepared.split(split).tokens for split in prepared.splits},
            "order_hash": loader.order_hash(),
            "tokenizer_fingerprint": manifest.tokenizer_fingerprint,
        },
    )


def _open_mixture(recipe: Recipe, data: MixtureConfig, world: World) -> Feed:
    """Evaluated are all its corpora, one after another, each token of a split once."""
    prepared = {name: _open_corpus(recipe, name, data.tokenizer, world) for name in data.corpora}
    blocks = {name: TokenBlocks(each, "train", data.seq_len) for name, each in prepared.items()}
    budget = recipe.budget
    splits = [split for split in ("valid", "test") if all(split in each.splits for each in prepared.values())]

    def reader(split: str) -> Callable[[int], Iterable[Batch]]:
        return lambda rows: chain.from_iterable(
            eval_batches(each, split, data.seq_len, rows, world.data_rank, world.data_size)
            for each in prepared.values()
        )

    first = next(iter(prepared.values()))
    return Feed(
        train=MixtureLoader(
            data, blocks, budget.batch_size, budget.steps, recipe.seed, world.data_rank, world.data_size
        ),
        evaluation={split: reader(split) for split in splits},
        words={split: sum(each.split(split).words for each in prepared.values()) for split in splits},
        facts={
            "fingerprints": {
                name: {split: each.fingerprint(split) for split in each.splits} for name, each in prepared.items()
            },
            "tokens": {
                name: {split: each.split(split).tokens for split in each.splits} for name, each in prepared.items()
            },
            "stages": dict(zip((stage.name for stage in data.stages), data.first_steps(budget.steps), strict=True)),
            "tokenizer_fingerprint": first.manifest.tokenizer_fingerprint,
        },
    )
