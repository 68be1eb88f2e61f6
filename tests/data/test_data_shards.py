import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rodimus_lab.data import Corpus, PreparedData, encoding, measure_tokenization, open_corpus, prepare, shards, storage
from rodimus_lab.data.encoding import cut, encode_chunks
from rodimus_lab.errors import UserError


class Invented(Corpus):
    """Documents made of numbers. `calls` counts the readings of a split; `version` stands for the source's content."""

    name, note, unit, splits = "invented", "invented for a test", "document", ("train", "test")

    def __init__(self, count=300, version="1", here=True):
        self.count, self.version, self.here, self.calls = count, version, here, 0

    def source(self, split):
        return "numbers"

    def fingerprint(self, split):
        return self.version if self.here else None

    def documents(self, split):
        self.calls += 1
        for i in range(self.count if split == "train" else 7):
            yield f"{split} {self.version}: document {i} says {'well, ' * (i % 11)}hello\n"


def make(corpus, tokenizer, folder, **options):
    options = {"workers": 1, "shard_bytes": 2000, "progress": False} | options
    return prepare(corpus, tokenizer, folder, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".bin", ".json")}


def tokens_of(prepared, split):
    return [token for shard in prepared.shards(split) for token in shard.tolist()]


@pytest.fixture
def whole(tokenizer, tmp_path):
    """The folder and contents of a preparation that nothing disturbed."""
    make(Invented(), tokenizer, tmp_path / "whole")
    return contents(tmp_path / "whole")


def test_shards_hold_the_documents_each_closed_by_the_end_token(tokenizer, tmp_path):
    prepared = make(Invented(), tokenizer, tmp_path / "p")
    for split in ("train", "test"):
        texts = list(Invented().documents(split))
        expected = [token for text in texts for token in (*tokenizer.encode(text), tokenizer.eos_id)]
        assert tokens_of(prepared, split) == expected
        entry = prepared.split(split)
        assert entry.tokens == len(expected)
        assert entry.documents == len(texts)
        assert entry.words == sum(len(text.split()) for text in texts)
        assert entry.bytes == sum(len(text.encode()) for text in texts)
    assert len(prepared.split("train").shards) > 5
    assert prepared.tokenizer().fingerprint == tokenizer.fingerprint
    prepared.verify()


def test_the_number_of_workers_changes_nothing(tokenizer, tmp_path, whole):
    make(Invented(), tokenizer, tmp_path / "parallel", workers=3)
    assert contents(tmp_path / "parallel") == whole


def test_finished_data_are_not_read_again(tokenizer, tmp_path):
    corpus = Invented()
    make(corpus, tokenizer, tmp_path / "p")
    assert corpus.calls == 2
    make(corpus, tokenizer, tmp_path / "p")
    assert corpus.calls == 2


def test_finished_data_stand_without_their_source(tokenizer, tmp_path):
    before = make(Invented(), tokenizer, tmp_path / "p").fingerprint("train")
    elsewhere = Invented(version="unknown", here=False)
    assert make(elsewhere, tokenizer, tmp_path / "p").fingerprint("train") == before
    assert elsewhere.calls == 0


@pytest.mark.parametrize("fatal", [1, 4, 9])
def test_a_broken_off_preparation_goes_on_to_the_same_bytes(tokenizer, tmp_path, monkeypatch, whole, fatal):
    folder, written = tmp_path / "p", []
    write = shards._write_shard

    def failing(path, chunks, count):
        written.append(path.name)
        if len(written) == fatal:
            raise KeyboardInterrupt
        return write(path, chunks, count)

    monkeypatch.setattr(shards, "_write_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        make(Invented(), tokenizer, folder, workers=2)
    kept = {name for name in contents(folder) if name.endswith(".bin")}
    assert len(kept) == fatal - 1
    assert not list(folder.glob("*.tmp"))
    written.clear()
    fatal = 0
    make(Invented(), tokenizer, folder, workers=2)
    assert not kept & set(written)
    assert contents(folder) == whole


def test_a_killed_process_leaves_what_the_next_one_finishes(tokenizer, tmp_path):
    texts = [f"document {i} " + "word " * 50 for i in range(2000)]
    source = tmp_path / "train.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer.to_file(tmp_path / "tiny.json")
    script = f"""
import os
from rodimus_lab.data import prepare, shards
write = shards._write_shard
def dying(path, chunks, count):
    if path.name == "train-00003.bin":
        def broken():
            yield next(chunks)
            os._exit(9)
        return write(path, broken(), count)
    return write(path, chunks, count)
shards._write_shard = dying
prepare({str(source.parent)!r}, {str(tmp_path / "tiny.json")!r}, {str(tmp_path / "p")!r}, 1, 60_000, progress=False)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    assert {path.name for path in (tmp_path / "p").glob("*.bin")} == {f"train-0000{i}.bin" for i in range(3)}
    arguments = (str(source.parent), str(tmp_path / "tiny.json"))
    resumed = prepare(*arguments, tmp_path / "p", 1, 60_000, progress=False)
    untouched = prepare(*arguments, tmp_path / "q", 1, 60_000, progress=False)
    assert resumed.fingerprint("train") == untouched.fingerprint("train")
    assert not list((tmp_path / "p").glob(".*.tmp"))
    resumed.verify()


def test_a_missing_shard_alone_is_made_again(tokenizer, tmp_path, whole):
    folder = tmp_path / "whole"
    (folder / "train-00002.bin").unlink()
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.bin")}
    with pytest.raises(
        UserError, match=r"train-00002\.bin.*missing.*delete it, and preparing or training makes it again"
    ):
        PreparedData(folder)
    make(Invented(), tokenizer, folder)
    assert contents(folder) == whole
    assert all((folder / name).stat().st_mtime_ns == time for name, time in times.items())


def test_a_truncated_shard_is_named_with_the_mend(tokenizer, tmp_path, whole):
    path = tmp_path / "whole" / "train-00001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    for opening in (PreparedData, lambda folder: make(Invented(), tokenizer, folder)):
        with pytest.raises(UserError, match=r"train-00001\.bin is corrupt.*delete it, and preparing"):
            opening(tmp_path / "whole")
    path.unlink()
    make(Invented(), tokenizer, tmp_path / "whole")
    assert contents(tmp_path / "whole") == whole


def test_a_changed_shard_is_found_by_verify_and_by_resuming(tokenizer, tmp_path, whole):
    folder = tmp_path / "whole"
    path = folder / "train-00001.bin"
    path.write_bytes(bytes(reversed(path.read_bytes())))
    with pytest.raises(UserError, match=r"train-00001\.bin is corrupt"):
        PreparedData(folder).verify()
    (folder / "train-00002.bin").unlink()
    with pytest.raises(UserError, match=r"train-00001\.bin is corrupt"):
        make(Invented(), tokenizer, folder)


def test_a_changed_source_is_prepared_anew(tokenizer, tmp_path):
    make(Invented(300), tokenizer, tmp_path / "p")
    make(Invented(20, version="2"), tokenizer, tmp_path / "p")
    make(Invented(20, version="2"), tokenizer, tmp_path / "q")
    assert contents(tmp_path / "p") == contents(tmp_path / "q")


def test_splits_can_be_prepared_one_by_one(tokenizer, tmp_path, whole):
    first = make(Invented(), tokenizer, tmp_path / "p", splits=("train",))
    assert first.splits == ["train"]
    with pytest.raises(UserError, match="the test split of invented is not prepared"):
        first.shards("test")
    make(Invented(), tokenizer, tmp_path / "p", splits=("test",), shard_bytes=10**6)
    assert PreparedData(tmp_path / "p").splits == ["train", "test"]
    assert (tmp_path / "p/train-00000.bin").read_bytes() == whole["train-00000.bin"]


def test_a_folder_of_other_data_is_left_alone(tokenizer, tmp_path, whole):
    other = Invented()
    other.name = "other"
    with pytest.raises(UserError, match="holds invented in the tokens of tiny, not other"):
        make(other, tokenizer, tmp_path / "whole")
    assert contents(tmp_path / "whole") == whole


@pytest.mark.parametrize("file", ["../secret.bin", "/etc/passwd", "train-00000.bin/../../x", "notes.bin"])
def test_a_manifest_that_points_outside_is_refused(tmp_path, whole, file):
    path = tmp_path / "whole" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["shards"][0]["file"] = file
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json is not valid .*file.*delete it"):
        PreparedData(tmp_path / "whole")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": 1}', '{"format": 2}'])
def test_a_broken_manifest_is_named(tmp_path, whole, content):
    (tmp_path / "whole" / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json is not valid"):
        PreparedData(tmp_path / "whole")


def test_counts_that_do_not_add_up_are_refused(tmp_path, whole):
    path = tmp_path / "whole" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["words"] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="'words' is not the sum over the shards"):
        PreparedData(tmp_path / "whole")


def test_a_folder_without_data_is_an_error(tmp_path):
    with pytest.raises(UserError, match="holds no prepared data"):
        PreparedData(tmp_path)


def test_another_tokenizer_beside_the_shards_is_refused(tmp_path, whole):
    (tmp_path / "whole" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is not the tokenizer of these shards"):
        PreparedData(tmp_path / "whole").tokenizer()


def test_a_full_disk_leaves_no_half_written_file(tokenizer, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full while writing"):
        make(Invented(), tokenizer, tmp_path / "p")
    assert not [path.name for path in (tmp_path / "p").iterdir() if path.name != ".lock"]


def test_an_interrupted_write_keeps_the_older_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupted():
        with storage.whole_file(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir() if entry.is_file()} == {"file": b"old"}


def test_a_folder_that_cannot_be_made_is_an_error(tokenizer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file/p cannot be written"):
        make(Invented(), tokenizer, tmp_path / "file" / "p")


def test_a_source_that_goes_away_is_named_and_the_shards_so_far_are_kept(tokenizer, tmp_path, write_jsonl):
    for part in range(2):
        write_jsonl(tmp_path / "in" / f"train-{part}.jsonl", [f"part {part}, document {i}" for i in range(600)])
    corpus = open_corpus(str(tmp_path / "in"))
    corpus.fingerprint = lambda split: "fixed"
    (tmp_path / "in" / "train-1.jsonl").rename(tmp_path / "away.jsonl")
    with pytest.raises(UserError, match=r"train-1\.jsonl cannot be read"):
        make(corpus, tokenizer, tmp_path / "p")
    kept = {name for name in contents(tmp_path / "p") if name.endswith(".bin")}
    assert kept
    (tmp_path / "away.jsonl").rename(tmp_path / "in" / "train-1.jsonl")
    prepared = make(corpus, tokenizer, tmp_path / "p")
    assert prepared.split("train").documents == 1200
    assert prepared.fingerprint("train") == make(corpus, tokenizer, tmp_path / "q").fingerprint("train")


def test_an_empty_split_is_an_error(tokenizer, tmp_path):
    with pytest.raises(UserError, match="the train split of invented is empty"):
        make(Invented(0), tokenizer, tmp_path / "p")


@pytest.mark.parametrize(
    ("options", "told"), [({"workers": 0}, "workers is 0"), ({"shard_bytes": 0}, "shard_bytes is 0")]
)
def test_options_out_of_range_are_errors(tokenizer, tmp_path, options, told):
    with pytest.raises(UserError, match=told):
        make(Invented(), tokenizer, tmp_path / "p", **options)


def test_an_unknown_split_is_an_error(tokenizer, tmp_path):
    with pytest.raises(UserError, match="'invented' has no split 'valid'"):
        make(Invented(), tokenizer, tmp_path / "p", splits=("valid",))


def test_a_lone_surrogate_is_named_by_its_document():
    with pytest.raises(UserError, match="document 2 holds a lone surrogate"):
        list(cut(["fine", "\ud800"], 100))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_with_a_killed_parent(tokenizer):
    reading, writing = os.pipe()
    parent = os.fork()
    if not parent:
        stream = encode_chunks(tokenizer, cut(["text"] * 10, 1), workers=2)
        next(stream)
        os.write(writing, json.dumps([child.pid for child in multiprocessing.active_children()]).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    workers = json.loads(os.read(reading, 1000))
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(map(runs, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def runs(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_dead_worker_is_an_error(tokenizer, monkeypatch):
    monkeypatch.setattr(encoding.Encoder, "__call__", lambda self, chunk: os._exit(1))
    with pytest.raises(UserError, match="a tokenisation worker died"):
        list(encode_chunks(tokenizer, cut(["text"], 100), workers=2))


@settings(deadline=None)
@given(st.lists(st.text(max_size=30)), st.integers(1, 60), st.integers(1, 60))
def test_cuts_keep_every_document_and_depend_on_the_shard_size_alone(texts, shard_bytes, chunk_bytes):
    def cuts(size):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encoding, "CHUNK_BYTES", size)
            return list(cut(texts, shard_bytes))

    by_shard = {}
    for chunk in cuts(chunk_bytes):
        by_shard.setdefault(chunk.shard, []).extend(chunk.texts)
        assert chunk.bytes == sum(len(text.encode()) for text in chunk.texts)
    assert [text for shard in by_shard.values() for text in shard] == texts
    assert list(by_shard) == list(range(len(by_shard)))
    assert all(len("".join(shard).encode()) >= shard_bytes for shard in list(by_shard.values())[:-1])
    wide = {}
    for chunk in cuts(10**6):
        wide.setdefault(chunk.shard, []).extend(chunk.texts)
    assert wide == by_shard


def test_wikitext_is_one_stream_with_an_end_token_a_line(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "data/wikitext-2").mkdir(parents=True)
    (tmp_path / "data/wikitext-2/test.txt").write_text(" \n = A = \n \n a cat . \n")
    monkeypatch.setenv("RODIMUS_LAB_DATA", str(tmp_path / "data"))
    prepared = make("wikitext-2", tokenizer, tmp_path / "p", splits=("test",))
    end = tokenizer.eos_id
    expected = [end, *tokenizer.encode("= A ="), end, end, *tokenizer.encode("a cat ."), end]
    assert tokens_of(prepared, "test") == expected
    assert prepared.manifest.unit == "line"
    assert prepared.split("test").matches_published is False


def test_the_smoke_corpus_prepares_into_the_cache(tmp_path):
    prepared = prepare("pydoc", "pydoc-4096", progress=False)
    assert prepared.folder == tmp_path / "cache" / "pydoc--pydoc-4096"
    assert prepared.splits == ["train", "valid", "test"]
    assert prepared.split("train").tokens > 300_000
    assert max(shard.max() for shard in prepared.shards("train")) < 4096


def test_genuine_wikitext_matches_what_is_published(genuine_data, tmp_path):
    prepared = prepare("wikitext-103", "gpt2", splits=("valid", "test"), progress=False)
    assert [prepared.split(split).matches_published for split in ("valid", "test")] == [True, True]
    assert [prepared.split(split).documents for split in ("valid", "test")] == [3760, 4358]


def test_tokenisation_is_measured_on_a_stream(tokenizer):
    measured = measure_tokenization(Invented(40_000), tokenizer, seconds=0.5, workers=2)
    assert 0 < measured["seconds"] < 5
    assert measured["tokens_per_second"] == measured["tokens"] / measured["seconds"] > 0
    with pytest.raises(UserError, match="too short to be timed"):
        measure_tokenization(Invented(1), tokenizer, seconds=0.1, workers=1)


def test_a_number_of_workers_that_would_swamp_a_machine_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "ProcessPoolExecutor", None)
    with pytest.raises(UserError, match="workers is 100,000; it must be at most 1,024"):
        list(encode_chunks(tokenizer, cut(["text"], 100), workers=100_000))
