"""What a corpus is: a named source of documents, in the splits train, valid and test."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, TypeAlias

from rodimus_lab.data.storage import SPLITS
from rodimus_lab.errors import UserError
from rodimus_lab.registry import Registry

Part: TypeAlias = Callable[[], Iterator[str]]


class Corpus(ABC):
    """Documents by split. `unit` is what one end-of-document token closes, `note` what one must know of the text."""

    name: str
    note: str
    unit: Literal["document", "line"] = "document"
    splits: tuple[str, ...] = SPLITS

    @abstractmethod
    def source(self, split: str) -> str:
        """Where the split comes from, in words."""

    @abstractmethod
    def fingerprint(self, split: str) -> str | None:
        """Changes when the source does. None where the source is not at hand, so that prepared shards stand alone."""

    @abstractmethod
    def documents(self, split: str) -> Iterator[str]:
        """The split's documents in a fixed order, streamed. Raises `UserError` where the source cannot be read."""

    def parts(self, split: str) -> Sequence[Part]:
        """`documents` in pieces, such as files, that can each be read without the ones before. Shards do not span them,
        so that a preparation that was broken off passes over the finished ones unread."""
        return [partial(self.documents, split)]

    def limit(self, split: str) -> int | None:
        """How many tokens of the split are to be prepared, up to the end of a document; None for all."""
        return None

    def exhausted(self, split: str, tokens: int) -> None:
        """Called where the split ended before its limit, after so many tokens; may raise `UserError`."""
        return None

    def published_words(self, split: str) -> int | None:
        """Words plus documents of the split as its authors count them, where they do."""
        return None

    def require(self, split: str) -> None:
        if split not in self.splits:
            raise UserError(f"the corpus {self.name!r} has no split {split!r}; it has: {', '.join(self.splits)}")


CORPORA: Registry[Callable[[], Corpus]] = Registry("corpus")
