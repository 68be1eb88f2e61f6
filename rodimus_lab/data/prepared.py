"""Prepared data on disk: a folder with `manifest.json`, `tokenizer.json` and the shards `<split>-<number>.bin`.

A shard is a plain run of little-endian token ids, and a split is its shards end to end: documents (WikiText: lines),
each closed by the end-of-document token.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from rodimus_lab.config import Config, ConfigError
from rodimus_lab.data.storage import sha256_of, whole_file
from rodimus_lab.data.tokenizers import Tokenizer
from rodimus_lab.errors import UserError

Count = Annotated[int, Field(ge=0)]
SplitName = Annotated[str, Field(pattern=r"^(train|valid|test)$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Shard(Config):
    """One file of a split. `bytes` counts its source text in UTF-8, `words` the text's whitespace-separated words."""

    file: Annotated[str, Field(pattern=r"^(train|valid|test)-[0-9]{5}\.bin$")]
    tokens: Count
    words: Count
    documents: Count
    bytes: Count
    sha256: Digest


class Split(Config):
    """One split: its shards, and their sums. `matches_published` tells whether the words are as many as the corpus's
    authors count, and is None where they do not say. `order_hash` is SHA-256 over the shards' hashes in order; `parts`
    says how many shards there are up to the end of each part of the source that was read to its end."""

    source: str
    fingerprint: str | None
    shard_bytes: Annotated[int, Field(ge=1)]
    complete: bool
    tokens: Count = 0
    words: Count = 0
    documents: Count = 0
    bytes: Count = 0
    matches_published: bool | None = None
    order_hash: Digest | None = None
    parts: tuple[Count, ...] = ()
    shards: tuple[Shard, ...] = ()

    @model_validator(mode="after")
    def _sums(self) -> Split:
        for name in ("tokens", "words", "documents", "bytes"):
            if getattr(self, name) != sum(getattr(shard, name) for shard in self.shards):
                raise ValueError(f"{name!r} is not the sum over the shards")
        return self


class Manifest(Config):
    """All that is known of a prepared folder."""

    format: Literal[1] = 1
    corpus: str
    note: str
    unit: Literal["document", "line"]
    tokenizer: str
    tokenizer_fingerprint: Digest
    vocab_size: Annotated[int, Field(ge=1)]
    eos_id: Count
    dtype: Literal["uint16", "uint32"]
    splits: dict[SplitName, Split]

    def write(self, folder: Path) -> None:
        with whole_file(folder / "manifest.json") as file:
            file.write(json.dumps(self.to_dict(), indent=1).encode() + b"\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises `UserError` naming what is missing or wrong in `folder/manifest.json`."""
        path = folder / "manifest.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{folder} holds no prepared data (no manifest.json); run rodimus-lab data prepare"
            ) from None
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise UserError(f"{path} is not valid JSON; delete it and run rodimus-lab data prepare again")
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise UserError(
                f"{path} is not valid ({error}); delete it and run rodimus-lab data prepare again"
            ) from None

    @property
    def token_type(self) -> np.dtype:
        return np.dtype(self.dtype).newbyteorder("<")


class PreparedData:
    """A prepared folder, opened. Raises `UserError` where a complete split lacks a shard or one has another size."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        for split in self.splits:
            for shard in self.manifest.splits[split].shards:
                self._check_size(shard)

    @property
    def splits(self) -> list[str]:
        """The splits that are completely prepared."""
        return [name for name, split in self.manifest.splits.items() if split.complete]

    def split(self, name: str) -> Split:
        """The counts of a split. Raises `UserError` where it is not prepared."""
        if name not in self.splits:
            raise UserError(
                f"the {name} split of {self.manifest.corpus} is not prepared in {self.folder}; run "
                f"rodimus-lab data prepare {self.manifest.corpus}"
            )
        return self.manifest.splits[name]

    def shards(self, split: str) -> list[np.ndarray]:
        """The split's token ids, memory-mapped, one flat array a shard."""
        paths = [self.folder / shard.file for shard in self.split(split).shards]
        return [np.memmap(path, dtype=self.manifest.token_type, mode="r") for path in paths]

    def fingerprint(self, split: str) -> str:
        """SHA-256 over the hashes of the split's shards, in order."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.split(split).shards).encode()).hexdigest()

    def verify(self) -> None:
        """Reads every shard and compares its SHA-256. Raises `UserError` naming the first that differs."""
        for split in self.splits:
            for shard in self.split(split).shards:
                if sha256_of(self.folder / shard.file) != shard.sha256:
                    raise corrupt_shard(self.folder / shard.file, "its SHA-256 is not the manifest's")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the shards. Raises `UserError` where it is not the manifest's."""
        path = self.folder / "tokenizer.json"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if hashlib.sha256(text.encode()).hexdigest() != self.manifest.tokenizer_fingerprint:
            raise UserError(
                f"{path} is not the tokenizer of these shards; delete {self.folder} and run "
                "rodimus-lab data prepare again"
            )
        return Tokenizer.from_json(self.manifest.tokenizer, text)

    def _check_size(self, shard: Shard) -> None:
        path = self.folder / shard.file
        if not path.is_file():
            raise corrupt_shard(path, "it is missing")
        if path.stat().st_size != shard.tokens * self.manifest.token_type.itemsize:
            raise corrupt_shard(path, f"it holds {path.stat().st_size} bytes for {shard.tokens} tokens")


def corrupt_shard(path: Path, reason: str) -> UserError:
    return UserError(f"the shard {path} is corrupt ({reason}); delete it, and preparing or training makes it again")
