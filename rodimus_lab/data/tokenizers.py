"""Tokenizers: the byte-level BPEs of the paper's recipes (Table 5), one made of `pydoc`, and any `tokenizer.json`."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import tokenizers as backends

from rodimus_lab.data.corpora import open_corpus
from rodimus_lab.data.hub import quiet_hub
from rodimus_lab.data.storage import cache_root, data_root, whole_file
from rodimus_lab.errors import UserError
from rodimus_lab.registry import Registry

EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


SPACE_BETWEEN_WORDS = re.compile(r"(?<=\S)(?= \S)")


class Tokenizer:
    """Text to ids and back. Ids lie in [0, vocab_size).

    Special tokens spelled out in a text are text like any other, and nothing is put before or after it.
    """

    def __init__(self, name: str, backend: backends.Tokenizer):
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.name = name
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._backend = backend
        eos = next((vocabulary[token] for token in EOS_NAMES if token in vocabulary), None)
        if eos is None:
            raise UserError(
                f"the tokenizer {name!r} has no end-of-document token; it needs one of: {', '.join(EOS_NAMES)}"
            )
        self.eos_id: int = eos

    @property
    def cuts_at_spaces(self) -> bool:
        """Whether a text cut at `SPACE_BETWEEN_WORDS` has the same ids in pieces as in whole.

        So it is for the pre-tokenizer of GPT-2, none of whose pieces goes on from a visible character to a space.
        """
        parts = json.loads(self.to_json())
        split = parts["pre_tokenizer"] or {}
        words_apart = split.get("type") == "ByteLevel" and split.get("use_regex") and not split.get("add_prefix_space")
        normalizer = (parts["normalizer"] or {}).get("type")
        added = [token for token in parts["added_tokens"] if not token["special"]]
        return (
            bool(words_apart)
            and normalizer in (None, "NFC")
            and not parts["model"].get("dropout")
            and not any(token["single_word"] or token["lstrip"] or token["rstrip"] for token in added)
            and not any(SPACE_BETWEEN_WORDS.search(token["content"]) for token in added)
        )

    @classmethod
    def from_json(cls, name: str, text: str) -> Tokenizer:
        """The inverse of `to_json`."""
        return cls(name, backends.Tokenizer.from_str(text))

    def to_json(self) -> str:
        return self._backend.to_str()

    def to_file(self, path: Path) -> None:
        """Writes a `tokenizer.json`, whole or not at all."""
        with whole_file(path) as file:
            file.write(self.to_json().encode())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the serialised tokenizer."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def token(self, id: int) -> str:
        """The entry of the vocabulary with that id. Raises `UserError` where there is none."""
        token = self._backend.id_to_token(id)
        if token is None:
            raise UserError(f"the tokenizer {self.name!r} has no token {id}; its ids are below {self.vocab_size}")
        return token

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens are left out."""
        return self._backend.decode(list(ids), skip_special_tokens=True)


TOKENIZERS: Registry[Callable[[], backends.Tokenizer]] = Registry("tokenizer")

# GPT-2's 50,257 entries as RoBERTa and fairseq count them: four special tokens and padding more (Table 5: 50,265).
PADDED_VOCAB_SIZES = {"gpt2": 50265, "gpt-neox": 50277, "rodimus": 126340, "pydoc-4096": 4096}


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name or of that `tokenizer.json`. Raises `UserError` where there is neither."""
    if name not in TOKENIZERS:
        path = Path(name).expanduser()
        if path.is_file():
            return _from_file(path)
        if re.search(r"[/\\~]|\.json$", name):
            raise UserError(
                f"there is no tokenizer at {name!r}; give a tokenizer.json or one of: {', '.join(TOKENIZERS)}"
            )
    return Tokenizer(TOKENIZERS.canonical(name), TOKENIZERS[name]())


def padded_vocab_size(name: str) -> int:
    """Rows of the model's embedding for that tokenizer: 50,265 for gpt2 (Table 5), else the tokenizer's own size."""
    known = PADDED_VOCAB_SIZES.get(name)
    return known if known is not None else load_tokenizer(name).vocab_size


@TOKENIZERS.register("gpt2")
def _gpt2() -> backends.Tokenizer:
    """Built of its vocabulary and merges alone, so that it is the same tokenizer from either source."""
    files = _local("tokenizers/gpt2/encoder.json", "tokenizers/gpt2/vocab.bpe")
    if files is None:
        hub = _from_hub("gpt2", "openai-community/gpt2", "tokenizers/gpt2/{encoder.json,vocab.bpe}")
        parts = json.loads(hub.to_str())["model"]
        model = backends.models.BPE(parts["vocab"], [tuple(merge) for merge in parts["merges"]])
    else:
        try:
            model = backends.models.BPE.from_file(str(files[0]), str(files[1]))
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(f"{files[0].parent} does not hold GPT-2's vocabulary ({reason}); fetch it again") from None
    tokenizer = _byte_level(model)
    tokenizer.add_special_tokens([backends.AddedToken("<|endoftext|>", normalized=False)])
    return tokenizer


@TOKENIZERS.register("gpt-neox")
def _gpt_neox() -> backends.Tokenizer:
    return _whole("gpt-neox", "tokenizers/gpt-neox-20b/20B_tokenizer.json", "EleutherAI/gpt-neox-20b")


@TOKENIZERS.register("rodimus")
def _rodimus() -> backends.Tokenizer:
    """The byte-level BPE of the released Rodimus models (D.5)."""
    return _whole("rodimus", "tokenizers/rodimus/tokenizer.json", "codefuse-ai/rodimus_plus_1B6_base_20241001")


@TOKENIZERS.register("gpt-4")
def _gpt_4() -> backends.Tokenizer:
    """cl100k_base, which measures NeedleBench's lengths."""
    return _whole("gpt-4", "tokenizers/gpt-4/tokenizer.json", "Xenova/gpt-4")


@TOKENIZERS.register("pydoc-4096")
def _pydoc_4096() -> backends.Tokenizer:
    """Byte-level BPE of 4,096 entries trained on the train split of `pydoc`, and kept in the cache."""
    path = cache_root() / "tokenizers" / f"pydoc-4096-python-{platform.python_version()}.json"
    if not path.is_file():
        tokenizer = train_bpe(open_corpus("pydoc").documents("train"), 4096)
        with whole_file(path) as file:
            file.write(tokenizer.to_str().encode())
    return read_backend(path)


def train_bpe(documents: Iterable[str], vocab_size: int) -> backends.Tokenizer:
    """A byte-level BPE trained on an iterable of documents, `<|endoftext|>` being its entry 0."""
    tokenizer = _byte_level(backends.models.BPE())
    trainer = backends.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=backends.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _byte_level(model: backends.models.BPE) -> backends.Tokenizer:
    tokenizer = backends.Tokenizer(model)
    tokenizer.pre_tokenizer = backends.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = backends.decoders.ByteLevel()
    return tokenizer


def _local(*names: str) -> list[Path] | None:
    root = data_root()
    paths = [root / name for name in names] if root else []
    return paths if paths and all(path.is_file() for path in paths) else None


def _whole(name: str, file: str, repository: str) -> backends.Tokenizer:
    """A `tokenizer.json` below the data root, or a repository of the Hub."""
    local = _local(file)
    return read_backend(local[0]) if local else _from_hub(name, repository, file)


def _from_hub(name: str, repository: str, files: str) -> backends.Tokenizer:
    try:
        quiet_hub()
        return backends.Tokenizer.from_pretrained(repository)
    except Exception as error:
        raise UserError(
            f"the tokenizer {name!r} is not local and the Hub does not give {repository}; set RODIMUS_LAB_DATA to a "
            f"folder that holds {files}, or get network access to the Hub"
        ) from error


def _from_file(path: Path) -> Tokenizer:
    backend = read_backend(path)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", path.stem if path.stem != "tokenizer" else path.resolve().parent.name)
    return Tokenizer(f"{stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}", backend)


def read_backend(path: Path) -> backends.Tokenizer:
    """What a `tokenizer.json` holds. Raises `UserError` naming the file where it is none."""
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)
        return backends.Tokenizer.from_str(text)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path} is not a tokenizer.json ({reason}); delete it or give another") from None
