"""From a corpus and a tokenizer to token shards on disk (see `rodimus_lab.data.prepared`), resumable and repeatable."""

from __future__ import annotations

import hashlib
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import groupby
from pathlib import Path

from filelock import FileLock
from rich.console import Console
from rich.progress import Progress, TaskID, TextColumn, TimeElapsedColumn

from rodimus_lab.data.corpora import open_corpus
from rodimus_lab.data.corpus import Corpus
from rodimus_lab.data.encoding import Chunk, EncodedChunk, Encoder, cut, encode_chunks, token_dtype
from rodimus_lab.data.prepared import Manifest, PreparedData, Shard, Split, corrupt_shard
from rodimus_lab.data.storage import cache_root, sha256_of, whole_file
from rodimus_lab.data.tokenizers import TOKENIZERS, Tokenizer, load_tokenizer
from rodimus_lab.errors import UserError

SHARD_BYTES = 1 << 26
SUMMED = ("tokens", "words", "documents", "bytes")


def prepare(
    corpus: str | Corpus,
    tokenizer: str | Tokenizer,
    out_dir: Path | str | None = None,
    workers: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    splits: tuple[str, ...] | None = None,
    progress: bool = True,
) -> PreparedData:
    """Tokenises a corpus into shards of about `shard_bytes` bytes of source text (64 MiB: some 14 M tokens of English).

    What is there is kept: complete splits are returned at once, and of a broken-off split the shards whose SHA-256 is
    the manifest's. A shard missing from a complete split is made again. `out_dir` defaults to
    `<cache>/<corpus>--<tokenizer>`, `splits` to all that the corpus has, `workers` to one process a core. Several
    processes may call this at once; one works and the others wait.

    Raises `UserError` on an unknown corpus or tokenizer, a source that cannot be read, a corrupt shard, a full disk,
    and on an `out_dir` that holds other data.
    """
    if shard_bytes < 1:
        raise UserError(f"shard_bytes is {shard_bytes}; it must be at least 1")
    corpus = open_corpus(corpus) if isinstance(corpus, str) else corpus
    splits = corpus.splits if splits is None else splits
    for split in splits:
        corpus.require(split)
    # A built-in tokenizer is loaded only where there is something to tokenise: finished data needs no network.
    if isinstance(tokenizer, str) and tokenizer not in TOKENIZERS:
        tokenizer = load_tokenizer(tokenizer)
    name = TOKENIZERS.canonical(tokenizer) if isinstance(tokenizer, str) else tokenizer.name
    folder = cache_root() / f"{corpus.name}--{name}" if out_dir is None else Path(out_dir)
    if not _missing(folder, corpus, name, splits):
        return PreparedData(folder)
    tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock").acquire()
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); choose another folder") from None
    with lock, _Display(corpus.name, progress) as display:
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
        for split in _missing(folder, corpus, name, splits):
            _prepare_split(folder, corpus, tokenizer, split, workers, shard_bytes, display.count)
    return PreparedData(folder)


def _missing(folder: Path, corpus: Corpus, tokenizer: str, splits: tuple[str, ...]) -> list[str]:
    """The splits that are not completely and currently there. Raises `UserError` where the folder holds other data."""
    if not (folder / "manifest.json").exists():
        return list(splits)
    manifest = Manifest.read(folder)
    if (manifest.corpus, manifest.tokenizer) != (corpus.name, tokenizer):
        raise UserError(
            f"{folder} holds {manifest.corpus} in the tokens of {manifest.tokenizer}, not {corpus.name} in those of "
            f"{tokenizer}; choose another folder"
        )
    return [split for split in splits if not _stands(folder, manifest, corpus, split)]


def _stands(folder: Path, manifest: Manifest, corpus: Corpus, split: str) -> bool:
    entry = manifest.splits.get(split)
    if entry is None or not entry.complete or not all((folder / shard.file).exists() for shard in entry.shards):
        return False
    return corpus.fingerprint(split) in (None, entry.fingerprint)


def _prepare_split(
    folder: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    split: str,
    workers: int | None,
    shard_bytes: int,
    count: Callable[[str, EncodedChunk], None],
) -> None:
    empty = Split(
        source=corpus.source(split), fingerprint=corpus.fingerprint(split), shard_bytes=shard_bytes, complete=False
    )
    manifest = _manifest(folder, corpus, tokenizer)
    done = _intact(folder, manifest, split, empty)
    stream = _Stream(corpus, split, shard_bytes, done, list(manifest.splits[split].parts) if done else [])

    def record(**changes: object) -> None:
        shards = tuple(done[index] for index in sorted(done))
        sums = {name: sum(getattr(shard, name) for shard in shards) for name in SUMMED}
        entry = empty.replace(shards=shards, parts=tuple(stream.ends), **sums, **changes)
        manifest.replace(splits={**manifest.splits, split: entry}).write(folder)

    if stream.room > 0:
        with closing(encode_chunks(tokenizer, stream.chunks(), workers)) as encoded:
            for index, chunks in groupby(encoded, key=lambda chunk: chunk.shard):
                if stream.room_before(index) <= 0:
                    break
                limited = stream.up_to_limit(chunks, stream.room_before(index), tokenizer)
                done[index] = _write_shard(folder / f"{split}-{index:05d}.bin", limited, partial(count, split))
                record()
    if not done:
        raise UserError(
            f"the {split} split of {corpus.name} is empty; give it text (files may be named train*, valid* and test*)"
        )
    if corpus.limit(split) is not None and stream.room > 0:
        corpus.exhausted(split, sum(shard.tokens for shard in done.values()))
    published = corpus.published_words(split)
    counted = sum(shard.words + shard.documents for shard in done.values())
    order = hashlib.sha256("".join(done[index].sha256 for index in sorted(done)).encode()).hexdigest()
    record(complete=True, matches_published=None if published is None else counted == published, order_hash=order)
    for stale in folder.glob(f"{split}-[0-9]*.bin"):
        if stale.name not in {shard.file for shard in done.values()}:
            stale.unlink()


class _Stream:
    """The chunks of a split that are yet to be encoded. `done` are the shards that are there, by number, and grow as
    they are written; `ends` are the numbers of shards up to the end of each part that was read to its end."""

    def __init__(self, corpus: Corpus, split: str, shard_bytes: int, done: dict[int, Shard], ends: list[int]):
        self.corpus, self.split, self.shard_bytes, self.done, self.ends = corpus, split, shard_bytes, done, ends
        self._sent: deque[Chunk] = deque()

    @property
    def room(self) -> float:
        """Tokens up to the limit that are not there."""
        return self.room_before(sys.maxsize)

    def room_before(self, index: int) -> float:
        """Tokens that shards from number `index` on may have; infinite without a limit."""
        limit = self.corpus.limit(self.split)
        if limit is None:
            return math.inf
        return limit - sum(shard.tokens for number, shard in self.done.items() if number < index)

    def chunks(self) -> Iterator[Chunk]:
        """In order, without those of shards that are there; finished parts are not read again."""
        first = 0
        for number, read in enumerate(self.corpus.parts(self.split)):
            if number < len(self.ends) and all(index in self.done for index in range(first, self.ends[number])):
                first = self.ends[number]
                continue
            end = first
            for chunk in cut(read(), self.shard_bytes):
                index = first + chunk.shard
                end = index + 1
                if index in self.done:
                    continue
                if self.room_before(index) <= 0:
                    return
                self._sent.append(chunk._replace(shard=index))
                yield self._sent[-1]
            self.ends[number:] = [end]
            first = end

    def up_to_limit(self, chunks: Iterator[EncodedChunk], room: float, tokenizer: Tokenizer) -> Iterator[EncodedChunk]:
        """Encoded chunks up to the end of the document that fills `room`."""
        for chunk in chunks:
            sent = self._sent.popleft()
            if chunk.tokens < room:
                room -= chunk.tokens
                yield chunk
                continue
            encode = Encoder(tokenizer)
            for text in sent.texts:
                document = encode(Chunk(sent.shard, [text], len(text.encode())))
                yield document
                room -= document.tokens
                if room <= 0:
                    return


def _manifest(folder: Path, corpus: Corpus, tokenizer: Tokenizer) -> Manifest:
    """The folder's manifest, or a new one where there is none or its tokens are another tokenizer's."""
    fresh = Manifest(
        corpus=corpus.name,
        note=corpus.note,
        unit=corpus.unit,
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        dtype=token_dtype(tokenizer.vocab_size),
        splits={},
    )
    if (folder / "manifest.json").exists():
        old = Manifest.read(folder)
        if old.replace(splits={}, note=fresh.note) == fresh:
            return old
    tokenizer.to_file(folder / "tokenizer.json")
    return fresh


def _intact(folder: Path, manifest: Manifest, split: str, wanted: Split) -> dict[int, Shard]:
    """The shards to keep, by number. Raises `UserError` naming one that is there but is not what the manifest says."""
    entry = manifest.splits.get(split)
    if entry is None or (entry.fingerprint, entry.shard_bytes) != (wanted.fingerprint, wanted.shard_bytes):
        return {}
    kept = {}
    for shard in entry.shards:
        path = folder / shard.file
        if not path.exists():
            continue
        if sha256_of(path) != shard.sha256:
            raise corrupt_shard(path, "its SHA-256 is not the manifest's")
        kept[int(path.stem.rpartition("-")[2])] = shard
    return kept


def _write_shard(path: Path, chunks: Iterator[EncodedChunk], count: Callable[[EncodedChunk], None]) -> Shard:
    sums = dict.fromkeys(SUMMED, 0)
    digest = hashlib.sha256()
    with whole_file(path) as file:
        for chunk in chunks:
            file.write(chunk.ids)
            digest.update(chunk.ids)
            sums = {name: sums[name] + getattr(chunk, name) for name in SUMMED}
            count(chunk)
    return Shard(file=path.name, sha256=digest.hexdigest(), **sums)


class _Display:
    """A line a split with its tokens so far, on standard error; without a thread, which would not suit forking."""

    def __init__(self, corpus: str, shown: bool):
        columns = (TextColumn("{task.description}"), TextColumn("{task.fields[counts]}"), TimeElapsedColumn())
        console = Console(stderr=True)
        self._progress = Progress(*columns, console=console, disable=not shown, auto_refresh=False)
        self._corpus = corpus
        self._lines: dict[str, TaskID] = {}

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lines:
            self._progress.stop()

    def count(self, split: str, chunk: EncodedChunk) -> None:
        if not self._lines:
            self._progress.start()
        if split not in self._lines:
            self._lines[split] = self._progress.add_task(f"{self._corpus} {split}", total=None, counts="")
        line = self._lines[split]
        self._progress.advance(line, chunk.tokens)
        counts = f"{self._progress.tasks[line].completed:,.0f} tokens"
        self._progress.update(line, counts=counts, refresh=True)
