import hashlib
import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from rodimus_lab.data import describe, list_corpora, load_tokenizer, open_corpus
from rodimus_lab.data.pydoc import extract, split_of
from rodimus_lab.errors import UserError

TEXTS = ["first document", "second\nwith two lines", "third é"]


def test_the_built_in_corpora_describe_themselves():
    assert list_corpora() == ["enwiki-25k", "fineweb", "pile", "pydoc", "wikitext-103", "wikitext-2"]
    for name in list_corpora():
        known = describe(name)
        assert known["name"] == name
        assert set(known["splits"]) == {"train", "valid", "test"}
    assert "<unk>" in describe("wikitext-103")["note"]


@pytest.mark.parametrize(
    ("name", "told"),
    [("wikitext-104", "did you mean 'wikitext-103'"), ("no/such/place", "no corpus at 'no/such/place'")],
)
def test_an_unknown_corpus_is_an_error(name, told):
    with pytest.raises(UserError, match=told):
        open_corpus(name)


def test_every_format_gives_the_same_documents(tmp_path, write_jsonl):
    plain = write_jsonl(tmp_path / "plain.jsonl", TEXTS)
    packed = tmp_path / "packed.jsonl.zst"
    packed.write_bytes(zstandard.ZstdCompressor().compress(plain.read_bytes()))
    table = tmp_path / "table.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), table)
    for path in (plain, packed, table):
        corpus = open_corpus(str(path))
        assert sorted(text for split in corpus.splits for text in corpus.documents(split)) == sorted(TEXTS)


def test_a_zstd_file_of_several_frames_is_read_to_its_end(tmp_path):
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
    path = tmp_path / "train.jsonl.zst"
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(line) for line in lines))
    assert list(open_corpus(str(tmp_path)).documents("train")) == TEXTS


def test_files_named_after_splits_are_those_splits(tmp_path):
    for name in ("train-a.txt", "train-b.txt", "validation.txt", "test.txt", "README.txt", "trained.txt"):
        (tmp_path / name).write_text(name)
    corpus = open_corpus(str(tmp_path))
    assert {split: list(corpus.documents(split)) for split in corpus.splits} == {
        "train": ["train-a.txt", "train-b.txt"],
        "valid": ["validation.txt"],
        "test": ["test.txt"],
    }


def test_folders_named_after_splits_are_those_splits(tmp_path):
    for name in ("train/0.txt", "train/1.txt", "val/0.txt", "notes/0.txt", "test.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    corpus = open_corpus(str(tmp_path))
    assert {split: list(corpus.documents(split)) for split in corpus.splits} == {
        "train": ["train/0.txt", "train/1.txt"],
        "valid": ["val/0.txt"],
        "test": ["test.txt"],
    }


def test_a_corpus_lacks_the_splits_that_have_no_file(tmp_path):
    (tmp_path / "train.txt").write_text("text")
    corpus = open_corpus(str(tmp_path))
    assert corpus.splits == ("train",)
    with pytest.raises(UserError, match="no split 'test'; it has: train"):
        list(corpus.documents("test"))


def test_documents_without_split_names_are_dealt_by_their_hash(tmp_path, write_jsonl):
    texts = [f"document {i}" for i in range(3000)]
    corpus = open_corpus(str(write_jsonl(tmp_path / "all.jsonl", texts)))
    parts = {split: list(corpus.documents(split)) for split in corpus.splits}
    assert sorted(parts["train"] + parts["valid"] + parts["test"]) == sorted(texts)
    assert 0.97 < len(parts["train"]) / 3000 < 0.99
    reordered = open_corpus(str(write_jsonl(tmp_path / "again.jsonl", texts[::-1])))
    assert set(reordered.documents("valid")) == set(parts["valid"])


def test_a_long_text_is_read_in_pieces_that_end_with_a_line(tmp_path):
    text = "".join(f"line {i}\n" for i in range(300_000))
    (tmp_path / "train.txt").write_text(text)
    pieces = list(open_corpus(str(tmp_path)).documents("train"))
    assert len(pieces) == 4
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") for piece in pieces)


def test_the_fingerprint_follows_the_content(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("one")
    before = open_corpus(str(tmp_path)).fingerprint("train")
    assert open_corpus(str(tmp_path)).fingerprint("train") == before
    path.write_text("two")
    assert open_corpus(str(tmp_path)).fingerprint("train") != before


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("train.jsonl", b'{"text": "good"}\n{"body": "bad"}\n', "line 2 of .*train.jsonl"),
        ("train.jsonl", b"not json\n", "line 1 of .*train.jsonl"),
        (
            "train.jsonl",
            b'{"text": "\\ud83d\\ude00"}\n{"text": "\\ud83d"}\n',
            "line 2 of .*jsonl holds a lone",
        ),
        ("train.txt", b"\xff\xfe\x00", "train.txt is not UTF-8"),
        ("train.jsonl.zst", b"not zstd at all", "train.jsonl.zst is not a whole zstd file"),
        ("train.parquet", b"not parquet", "train.parquet is not a whole parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told):
        list(open_corpus(str(tmp_path)).documents("train"))


def test_a_parquet_file_that_is_damaged_within_is_named(tmp_path):
    text = [f"document {os.urandom(20).hex()}" for _ in range(5000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "train.parquet")
    content = bytearray((tmp_path / "train.parquet").read_bytes())
    content[200 : len(content) // 2 : 7] = bytes(len(range(200, len(content) // 2, 7)))
    (tmp_path / "train.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"train\.parquet is not a whole parquet file \(.+\); fetch it again"):
        list(open_corpus(str(tmp_path)).documents("train"))


def test_a_truncated_zstd_file_is_named(tmp_path):
    lines = "".join(json.dumps({"text": f"document {os.urandom(20).hex()}"}) + "\n" for _ in range(2000))
    packed = zstandard.ZstdCompressor().compress(lines.encode())
    for length in (10, len(packed) // 2, len(packed) - 1):
        (tmp_path / "train.jsonl.zst").write_bytes(packed[:length])
        with pytest.raises(UserError, match=r"train\.jsonl\.zst is not a whole zstd file"):
            list(open_corpus(str(tmp_path)).documents("train"))


def test_a_folder_without_text_is_an_error(tmp_path):
    with pytest.raises(UserError, match="there is no text"):
        open_corpus(str(tmp_path))


def test_enwiki_names_the_part_that_is_missing(tmp_path, monkeypatch):
    folder = tmp_path / "enwiki-25k"
    folder.mkdir()
    (folder / "train-00000-of-00002.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(b'{"text": "x"}\n'))
    monkeypatch.setenv("RODIMUS_LAB_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"train-00001-of-00002\.jsonl\.zst is missing"):
        list(open_corpus("enwiki-25k").documents("train"))
    with pytest.raises(UserError, match=r"set RODIMUS_LAB_DATA to a folder that holds enwiki-25k/valid\.jsonl\.zst"):
        list(open_corpus("enwiki-25k").documents("valid"))


def test_a_data_root_that_is_no_folder_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("RODIMUS_LAB_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="RODIMUS_LAB_DATA"):
        list(open_corpus("wikitext-2").documents("test"))


def test_wikitext_gives_one_stripped_document_a_line(tmp_path, monkeypatch):
    folder = tmp_path / "wikitext-103"
    folder.mkdir()
    (folder / "wiki.valid.tokens").write_text(" \n = Title = \n \n The cat @-@ sat \x85 here . \n", encoding="utf-8")
    monkeypatch.setenv("RODIMUS_LAB_DATA", str(tmp_path))
    documents = list(open_corpus("wikitext-103").documents("valid"))
    assert documents == ["", "= Title =", "", "The cat @-@ sat \x85 here ."]


WITHOUT_NETWORK = """
from rodimus_lab.data import load_tokenizer, open_corpus
from rodimus_lab.errors import UserError
for ask in (lambda: list(open_corpus("wikitext-103").documents("train")), lambda: load_tokenizer("gpt2")):
    try:
        ask()
        print("no error")
    except UserError as error:
        print(error)
"""


def test_without_network_the_error_names_the_corpus_and_both_mends(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_NETWORK], env=environment, capture_output=True, text=True, check=True
    )
    corpus, tokenizer = run.stdout.splitlines()
    for words in ("the train split of wikitext-103", "RODIMUS_LAB_DATA", "wiki.train.tokens", "network access"):
        assert words in corpus
    for words in ("'gpt2'", "RODIMUS_LAB_DATA", "tokenizers/gpt2/{encoder.json,vocab.bpe}", "network access"):
        assert words in tokenizer


@pytest.mark.parametrize("ask", [lambda: load_tokenizer("gpt-4"), lambda: list(open_corpus("pile").documents("train"))])
def test_the_hubs_client_does_not_tell_of_its_attempts(monkeypatch, capfd, ask):
    """The error says it once; the client's handler writes to the standard error that it found at its import."""
    from huggingface_hub.utils import logging as hub_logging

    def attempt(*_, **__):
        hub_logging.get_logger("huggingface_hub.utils._http").warning("Retrying in 1s")
        raise OSError("Name or service not known")

    monkeypatch.delenv("RODIMUS_LAB_DATA", raising=False)
    backends = SimpleNamespace(Tokenizer=SimpleNamespace(from_pretrained=attempt))
    monkeypatch.setattr("rodimus_lab.data.tokenizers.backends", backends)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", attempt)
    level = hub_logging.get_verbosity()
    handler = logging.StreamHandler()
    hub_logging.get_logger("huggingface_hub").addHandler(handler)
    try:
        hub_logging.set_verbosity_warning()
        with pytest.raises(UserError, match="the Hub does not give"):
            ask()
    finally:
        hub_logging.set_verbosity(level)
        hub_logging.get_logger("huggingface_hub").removeHandler(handler)
    assert "Retrying" not in capfd.readouterr().err


def test_the_hubs_lines_are_read_as_a_files(monkeypatch, tmp_path):
    """Rows as the Hub gives them, each with its line end, from a stand-in for the package that fetches them."""
    lines = [" \n", " = Robert Boulter = \n", " \n", " Robert Boulter is an English actor . \n"]
    asked = {}

    class Rows:
        def iter(self, batch_size):
            yield {"text": lines[:3]}
            yield {"text": lines[3:]}

    def load_dataset(*arguments, **options):
        asked.update(options, arguments=arguments)
        return Rows()

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    from_hub = list(open_corpus("wikitext-103").documents("valid"))
    assert asked["arguments"] == ("Salesforce/wikitext", "wikitext-103-v1")
    assert (asked["split"], len(asked["revision"])) == ("validation", 40)
    (tmp_path / "wikitext-103").mkdir()
    (tmp_path / "wikitext-103" / "wiki.valid.tokens").write_text("".join(lines))
    monkeypatch.setenv("RODIMUS_LAB_DATA", str(tmp_path))
    assert from_hub == list(open_corpus("wikitext-103").documents("valid"))


PYDOC_DIGEST = """
import hashlib
from rodimus_lab.data.pydoc import extract
print(hashlib.sha256(repr(extract()).encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def extracted():
    return extract()


def test_pydoc_is_the_same_in_every_process(extracted):
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    run = subprocess.run(
        [sys.executable, "-c", PYDOC_DIGEST], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == hashlib.sha256(repr(extracted).encode()).hexdigest()


def test_pydoc_is_documentation_of_topics_and_modules_split_by_name(extracted):
    documents = dict(extracted)
    assert len(documents) == len(extracted) > 300
    assert "Serialize ``obj`` as a JSON formatted stream" in documents["module json"]
    assert "def dumps(obj, *, " in documents["module json"]
    assert "topic assert" in documents
    assert not any(name.startswith(("module test.", "module idlelib")) for name in documents)
    corpus = open_corpus("pydoc")
    parts = {split: list(corpus.documents(split)) for split in corpus.splits}
    assert sorted(text for texts in parts.values() for text in texts) == sorted(documents.values())
    assert len(parts["train"]) == sum(split_of(name) == "train" for name in documents)
    assert 0.85 < len(parts["train"]) / len(documents) < 0.95


def test_genuine_wikitext_has_its_published_size(genuine_data):
    for name in ("wikitext-103", "wikitext-2"):
        corpus = open_corpus(name)
        for split in ("valid", "test"):
            words = sum(len(line.split()) + 1 for line in corpus.documents(split))
            assert words == corpus.published_words(split)
