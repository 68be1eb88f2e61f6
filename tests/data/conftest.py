import json
import os
from pathlib import Path

import numpy as np
import pytest

from rodimus_lab.data import PreparedData, Tokenizer, train_bpe
from rodimus_lab.data.prepared import Manifest, Shard, Split
from rodimus_lab.data.storage import sha256_of

PROSE = ["The cat sat on the mat, didn't it?", "It's 1999: déjà vu\n\n  in two lines.", "雨が降る 雨 ☂️ x", "", "a"]


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer("tiny", train_bpe(PROSE * 20, 300))


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """Every test has a cache of its own, and no data root unless it sets one."""
    monkeypatch.setenv("RODIMUS_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RODIMUS_LAB_DATA", raising=False)


GENUINE = Path(os.environ.get("RODIMUS_LAB_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


@pytest.fixture(scope="session")
def genuine_folder():
    """The folder of genuine corpora and tokenizers."""
    if not (GENUINE / "tokenizers/gpt2").is_dir():
        pytest.skip("the genuine data are not here")
    return GENUINE


@pytest.fixture
def genuine_data(genuine_folder, monkeypatch):
    """The same, as the data root."""
    monkeypatch.setenv("RODIMUS_LAB_DATA", str(genuine_folder))
    return genuine_folder


@pytest.fixture
def write_jsonl():
    def write(path, texts):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return path

    return write


@pytest.fixture
def prepared_from(tmp_path):
    """Prepared data of given token ids, cut into shards of given lengths."""

    def make(tokens, lengths):
        folder = tmp_path / f"prepared-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        shards, start = [], 0
        for index, length in enumerate(lengths):
            path = folder / f"train-{index:05d}.bin"
            np.asarray(tokens[start : start + length], dtype="<u2").tofile(path)
            start += length
            shards.append(Shard(file=path.name, tokens=length, words=0, documents=0, bytes=0, sha256=sha256_of(path)))
        assert start == len(tokens)
        split = Split(
            source="test", fingerprint=None, shard_bytes=1, complete=True, tokens=len(tokens), shards=tuple(shards)
        )
        Manifest(
            corpus="test",
            note="",
            unit="document",
            tokenizer="none",
            tokenizer_fingerprint="0" * 64,
            vocab_size=1 << 16,
            eos_id=0,
            dtype="uint16",
            splits={"train": split},
        ).write(folder)
        return PreparedData(folder)

    return make
