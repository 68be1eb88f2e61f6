"""Corpora, tokenizers, token shards and the loader."""

from rodimus_lab.data.corpora import describe, list_corpora, open_corpus
from rodimus_lab.data.corpus import CORPORA, Corpus
from rodimus_lab.data.encoding import measure_reading, measure_tokenization
from rodimus_lab.data.loader import IGNORED, BlockLoader, TokenBlocks, eval_batches
from rodimus_lab.data.prepared import Manifest, PreparedData
from rodimus_lab.data.shards import prepare
from rodimus_lab.data.storage import cache_root, data_root
from rodimus_lab.data.tokenizers import (
    TOKENIZERS,
    Tokenizer,
    load_tokenizer,
    padded_vocab_size,
    read_backend,
    train_bpe,
)

__all__ = [
    "CORPORA",
    "IGNORED",
    "TOKENIZERS",
    "BlockLoader",
    "Corpus",
    "Manifest",
    "PreparedData",
    "TokenBlocks",
    "Tokenizer",
    "cache_root",
    "data_root",
    "describe",
    "eval_batches",
    "list_corpora",
    "load_tokenizer",
    "measure_reading",
    "measure_tokenization",
    "open_corpus",
    "padded_vocab_size",
    "prepare",
    "read_backend",
    "train_bpe",
]
