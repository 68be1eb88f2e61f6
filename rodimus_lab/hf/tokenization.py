"""This project's tokenizers, and the official checkpoints', as transformers' fast tokenizers."""

from __future__ import annotations

from typing import Any

import tokenizers as backends
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rodimus_lab.data import Tokenizer
from rodimus_lab.hf.configuration import RodimusLabConfig


class RodimusLabTokenizer(PreTrainedTokenizerFast):
    """Any `tokenizer.json`. Batches are padded on the left, so that the last column is every row's last token."""

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"

    @classmethod
    def of(cls, tokenizer: Tokenizer, **options: Any) -> RodimusLabTokenizer:
        """`tokenizer` itself; its end-of-document token ends and pads."""
        eos = tokenizer.token(tokenizer.eos_id)
        backend = backends.Tokenizer.from_str(tokenizer.to_json())
        return cls(tokenizer_object=backend, eos_token=eos, pad_token=eos, **options)


AutoTokenizer.register(RodimusLabConfig, fast_tokenizer_class=RodimusLabTokenizer)
