"""OpenCompass's NeedleBench data sets with a length tokenizer of choice. Imported in OpenCompass's environment only.

Theirs ask tiktoken for gpt-4's tokens, which it downloads; here any tokenizer of this project measures lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tiktoken
from opencompass.datasets.needlebench.multi import NeedleBenchMultiDataset
from opencompass.datasets.needlebench.origin import NeedleBenchOriginDataset
from opencompass.datasets.needlebench.parallel import NeedleBenchParallelDataset

from rodimus_lab.data import Tokenizer, load_tokenizer


class _Encoding:
    """What of tiktoken's encodings these data sets call."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def encode(self, text: str, **_: Any) -> list[int]:
        return self._tokenizer.encode(text)

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return self._tokenizer.decode(list(tokens))


@contextmanager
def measured_by(name: str) -> Iterator[None]:
    """Within, tiktoken's encoding of any model is this project's tokenizer `name`."""
    original, encoding = tiktoken.encoding_for_model, _Encoding(load_tokenizer(name))
    tiktoken.encoding_for_model = lambda _: encoding
    try:
        yield
    finally:
        tiktoken.encoding_for_model = original


class SingleRetrieval(NeedleBenchOriginDataset):
    @staticmethod
    def load(*, length_tokenizer: str, **options: Any) -> Any:
        with measured_by(length_tokenizer):
            return NeedleBenchOriginDataset.load(**options)


class MultiRetrieval(NeedleBenchParallelDataset):
    @staticmethod
    def load(*, length_tokenizer: str, **options: Any) -> Any:
        with measured_by(length_tokenizer):
            return NeedleBenchParallelDataset.load(**options)


class MultiReasoning(NeedleBenchMultiDataset):
    @staticmethod
    def load(*, length_tokenizer: str, **options: Any) -> Any:
        with measured_by(length_tokenizer):
            return NeedleBenchMultiDataset.load(**options)
