"""Corpora that lie on disk as files: .txt and .tokens, and by their `text` field .jsonl, .jsonl.zst and .parquet.

A file belongs to the split that its name starts with (train; valid, validation, val or dev; test). Where no name does,
every document goes to train, valid or test by a hash of its text, 98 : 1 : 1. A text file is one document; a long one
is read in pieces of about a million characters, cut at line ends, each of them a document.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from rodimus_lab.data.corpus import CORPORA, Corpus, Part
from rodimus_lab.data.storage import SPLITS, data_root
from rodimus_lab.errors import UserError

SUFFIXES = (".txt", ".tokens", ".jsonl", ".jsonl.zst", ".parquet")
SPLIT_NAMES = {
    "train": "train",
    "validation": "valid",
    "valid": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
}
SPLIT_PATTERN = re.compile(rf"({'|'.join(SPLIT_NAMES)})(?![a-z])", re.IGNORECASE)
PART_PATTERN = re.compile(r"-(\d{5})-of-(\d{5})")
PIECE_CHARACTERS = 1_000_000
PART_BYTES = 1 << 28
# A document longer than this would not leave memory bounded.
LONGEST_LINE = 1 << 28
SAMPLED_BYTES = 1 << 16
# Packed bytes at a time: even text that packs a thousandfold unpacks in pieces of a few megabytes.
READ_BYTES = 1 << 13
# As JSON escapes it; two that make a pair are one character once they are read.
SURROGATE, SURROGATE_LEFT = re.compile(rb"\\u[dD][89a-fA-F]"), re.compile("[\ud800-\udfff]")
# Files packed with `zstd --long=27` and up need a decoder that allows such windows.
ZSTD_WINDOW = 1 << 31


class FileCorpus(Corpus):
    """Documents in files of one folder. `by_hash` where the files' names tell no splits."""

    def __init__(self, name: str, folder: Path | None, files: dict[str, list[Path]], note: str, by_hash: bool = False):
        self.name, self.folder, self.note = name, folder, note
        self._files, self._by_hash = files, by_hash
        self.splits = tuple(split for split in SPLITS if by_hash or files.get(split))

    @classmethod
    def at(cls, path: Path) -> FileCorpus:
        """The corpus of a file, or of the files of a folder and, where it has `train/`, of its folders of splits, named
        after it and its content."""
        found = [path] if path.is_file() else sorted(_files_of(path))
        found = [entry for entry in found if entry.name.endswith(SUFFIXES)]
        if not found:
            raise UserError(f"there is no text in {path}; it must be or hold files ending in {', '.join(SUFFIXES)}")
        files = _by_split(found, path) if path.is_dir() else {}
        by_hash = not files
        if by_hash:
            files = dict.fromkeys(SPLITS, found)
        digest = files_fingerprint(found)[:8]
        stem = re.sub(r"[^A-Za-z0-9._-]+", "_", path.resolve().name.split(".")[0]).strip("._") or "corpus"
        splitting = "split 98 : 1 : 1 by a hash of each document" if by_hash else "split by file name"
        return cls(f"{stem}-{digest}", path, files, f"Local files, {splitting}.", by_hash)

    def files(self, split: str) -> list[Path]:
        """The split's files. Raises `UserError` naming a part that is missing of a numbered series."""
        self.require(split)
        paths = self._files[split]
        for path in paths:
            for missing in _missing_parts(path):
                raise UserError(f"{path.name} is there but {missing.name} is missing from {path.parent}; add it")
        return paths

    def source(self, split: str) -> str:
        return ", ".join(path.name for path in self._files[split])

    def fingerprint(self, split: str) -> str | None:
        return files_fingerprint(self.files(split))

    def documents(self, split: str) -> Iterator[str]:
        return self._read(self.files(split), split)

    def parts(self, split: str) -> Sequence[Part]:
        """Files, small ones together."""
        groups: list[list[Path]] = [[]]
        filled = 0
        for path in self.files(split):
            groups[-1].append(path)
            filled += path.stat().st_size if path.exists() else 0  # Reading it will name it.
            if filled >= PART_BYTES:
                groups.append([])
                filled = 0
        return [partial(self._read, group, split) for group in groups if group]

    def _read(self, paths: list[Path], split: str) -> Iterator[str]:
        for path in paths:
            for document in read_documents(path):
                if not self._by_hash or split_of(document) == split:
                    yield document


class Enwiki(Corpus):
    """23,894 long articles of the English Wikipedia of 2015, for where WikiText-103's train split is not to be had."""

    name = "enwiki-25k"
    note = (
        "A stand-in for WikiText-103: natural, not tokenised text, with no Good or Featured filter; articles of "
        "WikiText-103's valid and test are left out. Its perplexities are not WikiText-103's."
    )
    patterns = ("train-*-of-*.jsonl.zst", "valid.jsonl.zst", "test.jsonl.zst")

    def _folder(self) -> FileCorpus | None:
        root = data_root()
        if root is None:
            return None
        folder = root / self.name
        files = {split: sorted(folder.glob(pattern)) for split, pattern in zip(SPLITS, self.patterns, strict=True)}
        return FileCorpus(self.name, folder, files, self.note)

    def source(self, split: str) -> str:
        self.require(split)
        return f"{self.name}/{self.patterns[SPLITS.index(split)]}"

    def fingerprint(self, split: str) -> str | None:
        self.require(split)
        corpus = self._folder()
        return corpus.fingerprint(split) if corpus and split in corpus.splits else None

    def documents(self, split: str) -> Iterator[str]:
        self.require(split)
        corpus = self._folder()
        if corpus is None or split not in corpus.splits:
            raise UserError(
                f"the {split} split of {self.name} is not here, and no hub carries it; set RODIMUS_LAB_DATA to a "
                f"folder that holds {self.source(split)}"
            )
        yield from corpus.documents(split)


CORPORA.register("enwiki-25k")(Enwiki)


def read_documents(path: Path) -> Iterator[str]:
    """The documents of one file, streamed. Raises `UserError` naming the file, and the line, that cannot be read."""
    with reading(path):
        if path.name.endswith((".txt", ".tokens")):
            yield from _read_text(path)
        elif path.name.endswith(".parquet"):
            yield from _read_parquet(path)
        else:
            yield from _read_jsonl(path)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what goes wrong with `path` in the block into a `UserError` that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}); convert it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); restore it or its permissions") from None


def files_fingerprint(paths: list[Path]) -> str:
    """SHA-256 of the files' names, sizes, and first and last 64 KiB: quick at any size, the same on any machine."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLED_BYTES))
            file.seek(max(0, size - SAMPLED_BYTES))
            digest.update(file.read())
    return digest.hexdigest()


def _files_of(folder: Path) -> Iterator[Path]:
    in_folders = (folder / "train").is_dir()
    for entry in folder.iterdir():
        if entry.is_file():
            yield entry
        elif in_folders and entry.name.lower() in SPLIT_NAMES and entry.is_dir():
            yield from (file for file in entry.iterdir() if file.is_file())


def _by_split(paths: list[Path], folder: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for path in paths:
        if match := SPLIT_PATTERN.match(path.relative_to(folder).parts[0]):
            files.setdefault(SPLIT_NAMES[match[1].lower()], []).append(path)
    return files


def _missing_parts(path: Path) -> Iterator[Path]:
    match = PART_PATTERN.search(path.name)
    if match is None:
        return
    for part in range(int(match[2])):
        other = path.with_name(f"{path.name[: match.start()]}-{part:05d}-of-{match[2]}{path.name[match.end() :]}")
        if not other.exists():
            yield other


def split_of(document: str) -> str:
    bucket = int.from_bytes(hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()[:8], "big") % 100
    return "train" if bucket < 98 else "valid" if bucket == 98 else "test"


def _read_text(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="\n") as file:
        while piece := file.read(PIECE_CHARACTERS):
            yield piece if piece.endswith("\n") else piece + file.readline(PIECE_CHARACTERS)


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        packed = path.name.endswith(".zst")
        pieces = _unpacked(path, file) if packed else iter(partial(file.read, 1 << 20), b"")
        yield from _parse_lines(path, _lines(path, pieces))


def _lines(path: Path, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file that comes in pieces; never more of it in memory than a line and a piece."""
    begun: list[bytes] = []
    length = 0
    for piece in pieces:
        *lines, rest = piece.split(b"\n")
        for line in lines:
            yield b"".join([*begun, line])
            begun, length = [], 0
        begun.append(rest)
        length += len(rest)
        if length > LONGEST_LINE:
            raise UserError(f"{path} has a line of more than {LONGEST_LINE >> 20} MiB; cut that document or remove it")
    yield b"".join(begun)


def _unpacked(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """The content of a zstd file of one or more frames, each of which must be whole."""
    try:
        import zstandard
    except ImportError:
        raise UserError(f"reading {path.name} needs the package 'zstandard'; pip install -e '.[data]'") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
    frame = decompressor.decompressobj()
    begun = False
    try:
        while data := file.read(READ_BYTES):
            while data:
                begun = True
                yield frame.decompress(data)
                data = b""
                if frame.eof:
                    data, frame, begun = frame.unused_data, decompressor.decompressobj(), False
    except zstandard.ZstdError as error:
        raise UserError(f"{path} is not a whole zstd file ({error}); fetch it again") from None
    if begun:
        raise UserError(f"{path} is not a whole zstd file (it breaks off); fetch it again")


def _parse_lines(path: Path, lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise UserError(f"line {number} of {path} is no JSON object with a string 'text'; correct or remove it")
        if SURROGATE.search(line) and SURROGATE_LEFT.search(text):
            raise UserError(f"line {number} of {path} holds a lone surrogate, which is not valid text; correct it")
        yield text


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"reading {path.name} needs the package 'pyarrow'; pip install -e '.[data]'") from None
    try:
        # Unbuffered, a row group of any size would be in memory at once.
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as table:
            if "text" not in table.schema_arrow.names:
                raise UserError(f"{path} has no column 'text'; rename the column that holds the text")
            for batch in table.iter_batches(batch_size=256, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        raise UserError(f"{path} has an entry in 'text' that is no string; correct or remove it")
                    yield text
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not a whole parquet file ({reason}); fetch it again") from None
