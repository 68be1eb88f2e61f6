"""Large corpora: parts that are read once, subsets by tokens and seed, memory that does not grow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import zstandard

from rodimus_lab.data import PreparedData, describe, open_corpus, prepare
from rodimus_lab.data.corpus import Corpus
from rodimus_lab.data.files import FileCorpus
from rodimus_lab.errors import UserError

FILES, DOCUMENTS = 4, 30


def document(file: int, number: int) -> str:
    return f"file {file} document {number} " + "the cat sat on the mat " * (number % 5)


@pytest.fixture
def pile(tmp_path, monkeypatch):
    """A tiny Pile as the Hub lays it out."""
    root = tmp_path / "data"
    texts = {f"train/{file:02d}": [document(file, n) for n in range(DOCUMENTS)] for file in range(FILES)}
    texts |= {"val": ["held out"] * 3, "test": ["held out too"] * 3}
    for name, documents in texts.items():
        path = root / "pile" / f"{name}.jsonl.zst"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps({"text": text, "meta": {}}) + "\n" for text in documents)
        path.write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    monkeypatch.setenv("RODIMUS_LAB_DATA", str(root))
    return root / "pile"


def texts_of(prepared: PreparedData, split: str = "train") -> list[str]:
    ids = np.concatenate(prepared.shards(split))
    cuts = np.flatnonzero(ids == prepared.manifest.eos_id)
    return [prepared.tokenizer().decode(piece[piece != prepared.manifest.eos_id]) for piece in np.split(ids, cuts + 1)][
        :-1
    ]


class Counted(Corpus):
    """A corpus that notes which of its parts are opened, and may break off in one."""

    def __init__(self, breaks_at: tuple[int, int] | None = None):
        self.name, self.note, self.splits = "counted", "", ("train",)
        self.opened: list[int] = []
        self.breaks_at = breaks_at

    def source(self, split: str) -> str:
        return "memory"

    def fingerprint(self, split: str) -> str | None:
        return "the same"

    def parts(self, split: str):
        return [partial(self._read, file) for file in range(FILES)]

    def documents(self, split: str):
        raise AssertionError("the parts are to be read one by one")

    def _read(self, file: int):
        self.opened.append(file)
        for number in range(DOCUMENTS):
            if (file, number) == self.breaks_at:
                raise UserError("the network is gone; run it again")
            yield document(file, number)


def test_the_pile_says_that_it_is_a_stand_in(pile, tokenizer):
    facts = describe("pile")
    assert "stand-in for the Pile" in facts["note"]
    assert facts["splits"]["train"] == {"source": "pile/train/*.jsonl.zst", "local": True}
    prepared = prepare("pile", tokenizer, workers=1, progress=False)
    assert texts_of(prepared) == [document(file, n) for file in range(FILES) for n in range(DOCUMENTS)]
    assert texts_of(prepared, "valid") == ["held out"] * 3
    assert prepared.manifest.splits["train"].parts == (1, 2, 3, 4)
    assert prepared.manifest.splits["train"].order_hash == prepared.fingerprint("train")


def test_without_files_or_network_the_error_says_what_is_kept(monkeypatch):
    import huggingface_hub

    def unreachable(*_arguments, **_options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", unreachable)
    with pytest.raises(
        UserError, match=r"train/\*\.jsonl\.zst of pile .* \(no route to host\); what is prepared is kept"
    ):
        list(open_corpus("pile").documents("train"))
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: ["train/00.jsonl.zst", "README.md"])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(UserError, match=r"train/00\.jsonl\.zst of pile is not local"):
        list(open_corpus("pile").documents("train"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_preparation_that_broke_off_reads_finished_parts_no_more(tmp_path, tokenizer, workers):
    whole = prepare(Counted(), tokenizer, tmp_path / "whole", workers=1, shard_bytes=600, progress=False)
    with pytest.raises(UserError, match="the network is gone"):
        prepare(Counted((2, 20)), tokenizer, tmp_path / "out", workers=workers, shard_bytes=600, progress=False)
    again = Counted()
    prepared = prepare(again, tokenizer, tmp_path / "out", workers=workers, shard_bytes=600, progress=False)
    assert again.opened == [2, 3]
    assert prepared.fingerprint("train") == whole.fingerprint("train")
    assert prepared.manifest == whole.manifest


def test_a_subset_is_whole_documents_up_to_its_tokens(pile, tokenizer):
    prepared = prepare("pile:1k", tokenizer, workers=1, shard_bytes=600, progress=False)
    texts = texts_of(prepared)
    ends = np.cumsum([len(tokenizer.encode(text)) + 1 for text in texts])
    assert ends[-2] < 1000 <= ends[-1] == prepared.split("train").tokens
    assert prepared.manifest.corpus == "pile-1k"
    assert "the first 1,000 tokens, seed 0" in prepared.split("train").source
    files = list(dict.fromkeys(int(text.split()[1]) for text in texts))
    assert files == np.random.Generator(np.random.PCG64(0)).permutation(FILES)[: len(files)].tolist()


def test_subsets_by_seed_differ_and_smaller_ones_begin_larger_ones(pile, tokenizer):
    def ids(name: str, **options: int) -> list[int]:
        prepared = prepare(name, tokenizer, progress=False, **options)
        return np.concatenate(prepared.shards("train")).tolist()

    small, large, other = (
        ids("pile:0.5k", workers=1),
        ids("pile:2k", workers=2, shard_bytes=700),
        ids("pile:2k@1", workers=1),
    )
    assert large[: len(small)] == small
    assert large != other
    assert len(set(map(len, (small, large)))) == 2


def test_a_subset_goes_on_where_it_broke_off(pile, tokenizer, tmp_path, monkeypatch):
    whole = prepare("pile:2k", tokenizer, tmp_path / "whole", workers=1, shard_bytes=600, progress=False)
    out = tmp_path / "out"
    prepare("pile:2k", tokenizer, out, workers=1, shard_bytes=600, progress=False)
    for shard in ("train-00001.bin", "train-00003.bin"):
        (out / shard).unlink()
    again = prepare("pile:2k", tokenizer, out, workers=1, shard_bytes=600, progress=False)
    assert again.fingerprint("train") == whole.fingerprint("train")
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())


def test_more_tokens_than_there_are_is_an_error(pile, tokenizer):
    with pytest.raises(UserError, match=r"has only [\d,]+ tokens, not the 1,000,000,000 asked for; ask for fewer"):
        prepare("pile:1b", tokenizer, workers=1, progress=False)
    with pytest.raises(UserError, match="asks for no tokens"):
        open_corpus("pile:0k")
    with pytest.raises(UserError, match="asks for more than 1,000,000,000,000,000 tokens; give fewer"):
        open_corpus(f"pile:{'9' * 400}b")
    for seed in (2**63, "9" * 5000):
        with pytest.raises(UserError, match=r"the seed of 'pile:1k@\d+' is more than \d+; give a smaller one"):
            open_corpus(f"pile:1k@{seed}")
    with pytest.raises(UserError, match="no corpus named 'nowhere'"):
        open_corpus("nowhere:7b")


def test_small_files_share_a_part_and_large_ones_do_not(tmp_path, monkeypatch, write_jsonl):
    for number in range(5):
        write_jsonl(tmp_path / f"train-{number}.jsonl", [f"text {number}"])
    corpus = open_corpus(str(tmp_path))
    assert len(corpus.parts("train")) == 1
    monkeypatch.setattr("rodimus_lab.data.files.PART_BYTES", 30)
    parts = FileCorpus.at(tmp_path).parts("train")
    assert [list(part()) for part in parts] == [["text 0", "text 1"], ["text 2", "text 3"], ["text 4"]]


MEMORY = """
import resource, sys
from pathlib import Path
from rodimus_lab.data.encoding import cut
from rodimus_lab.data.files import read_documents
import pyarrow.parquet, zstandard

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

for path in map(Path, sys.argv[1:]):
    list(read_documents(path.with_name("small-" + path.name)))
    before = peak()
    size = sum(chunk.bytes for chunk in cut(read_documents(path), 1 << 26))
    print(path.name, size, round(peak() - before, 1))
"""


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """60 MB of text in each form that packs, in one row group and one frame: a part of that in memory would show."""
    import pyarrow
    import pyarrow.parquet

    text = "the cat sat on the mat " * 200
    names = {"small-": 10, "": 13_000}
    for prefix, count in names.items():
        lines = (json.dumps({"text": text + str(n)}) + "\n" for n in range(count))
        with (
            (tmp_path / f"{prefix}a.jsonl.zst").open("wb") as file,
            zstandard.ZstdCompressor().stream_writer(file) as out,
        ):
            for line in lines:
                out.write(line.encode())
        table = pyarrow.table({"text": [text + str(n) for n in range(count)]})
        pyarrow.parquet.write_table(table, tmp_path / f"{prefix}a.parquet", row_group_size=10**6, use_dictionary=False)
        (tmp_path / f"{prefix}a.txt").write_text(text * count)
    paths = [str(tmp_path / name) for name in ("a.jsonl.zst", "a.parquet", "a.txt")]
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, *paths], capture_output=True, text=True, check=True, env=os.environ
    )
    for line in run.stdout.splitlines():
        name, size, grown = line.split()
        assert int(size) > 55e6, line
        assert float(grown) < 30, f"reading {name} took {grown} MB more than a small one"


def test_a_line_without_an_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("rodimus_lab.data.files.LONGEST_LINE", 1 << 20)
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "' + "x" * (3 << 20) + '"}\n')
    with pytest.raises(UserError, match=r"train\.jsonl has a line of more than 1 MiB; cut that document"):
        list(open_corpus(str(path)).documents("train"))
