"""Parallel tokenisation: a stream of documents in, encoded chunks out in the same order.

The work is dealt in chunks of documents to a pool of processes, each running the tokenizer on one thread: that scales
with the cores, where the tokenizers library's own threads share one cache, and its results one interpreter lock.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from rodimus_lab.data.corpora import open_corpus
from rodimus_lab.data.corpus import Corpus
from rodimus_lab.data.tokenizers import SPACE_BETWEEN_WORDS, Tokenizer, load_tokenizer
from rodimus_lab.errors import UserError

CHUNK_BYTES = 1 << 19
MAX_WORKERS = 32  # By default; all are started at once, so that more than MOST_WORKERS would swamp a machine.
MOST_WORKERS = 1024
KNOWN_PIECES = 500_000
KNOWN_LENGTH = 40


class Chunk(NamedTuple):
    """Consecutive documents of one shard, and their bytes of UTF-8."""

    shard: int
    texts: list[str]
    bytes: int


class EncodedChunk(NamedTuple):
    """`ids` are little-endian token ids, each document closed by the end-of-document token."""

    shard: int
    ids: bytes
    tokens: int
    words: int
    documents: int
    bytes: int


def default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_WORKERS)


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The narrowest of uint16 and uint32 that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def cut(documents: Iterable[str], shard_bytes: int) -> Iterator[Chunk]:
    """Documents in chunks. A shard ends with the document that fills its `shard_bytes`, so the text alone decides.

    Raises `UserError` naming the document that is not valid Unicode.
    """
    shard = filled = size = 0
    texts: list[str] = []
    for number, text in enumerate(documents, 1):
        try:
            length = len(text.encode())
        except UnicodeEncodeError:
            raise UserError(f"document {number} holds a lone surrogate, which is not valid text; correct it") from None
        texts.append(text)
        size += length
        filled += length
        full = filled >= shard_bytes
        if full or size >= CHUNK_BYTES:
            yield Chunk(shard, texts, size)
            texts, size = [], 0
        if full:
            shard, filled = shard + 1, 0
    if texts:
        yield Chunk(shard, texts, size)


def encode_chunks(tokenizer: Tokenizer, chunks: Iterable[Chunk], workers: int | None = None) -> Generator[EncodedChunk]:
    """The chunks encoded, in order, by `workers` processes (default: one a core; 1: in this process).

    At most three chunks a worker are in flight. Raises `UserError` where a worker process dies.
    """
    workers = default_workers() if workers is None else workers
    if workers < 1:
        raise UserError(f"the number of tokenisation workers is {workers}; it must be at least 1")
    if workers > MOST_WORKERS:
        raise UserError(f"the number of tokenisation workers is {workers:,}; it must be at most {MOST_WORKERS:,}")
    with _library_threads_off():
        if workers == 1:
            yield from map(Encoder(tokenizer), chunks)
            return
        # Workers touch neither torch nor a device, so forking is safe, and it spares each its imports.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer.name, tokenizer.to_json()))
        pending: deque[Future[EncodedChunk]] = deque()
        try:
            source, broken = iter(chunks), None
            while broken is None:
                try:
                    chunk = next(source, None)
                except UserError as error:  # What was read before it is not lost.
                    broken = error
                    break
                if chunk is None:
                    break
                pending.append(pool.submit(_encode_in_worker, chunk))
                if len(pending) >= 3 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
            if broken is not None:
                raise broken
        except BrokenProcessPool:
            raise UserError(
                "a tokenisation worker died, perhaps for lack of memory; run again with fewer workers"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def measure_tokenization(
    corpus: str | Corpus, tokenizer: str | Tokenizer, seconds: float, workers: int | None = None, split: str = "train"
) -> dict[str, Any]:
    """Tokenises the split for about `seconds` and writes nothing: tokens, words and bytes per second, reading included.

    The start of the processes and the first chunk are not timed. Raises `UserError` where there is no second chunk.
    """
    corpus = open_corpus(corpus) if isinstance(corpus, str) else corpus
    tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    workers = default_workers() if workers is None else workers
    stream = encode_chunks(tokenizer, cut(corpus.documents(split), sys.maxsize), workers)
    tokens = words = size = 0
    next(stream, None)
    elapsed, start = 0.0, time.perf_counter()
    for chunk in stream:
        tokens, words, size = tokens + chunk.tokens, words + chunk.words, size + chunk.bytes
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            stream.close()
            break
    if not tokens:
        raise UserError(f"the {split} split of {corpus.name} is too short to be timed; choose a larger corpus")
    return {
        "corpus": corpus.name,
        "split": split,
        "tokenizer": tokenizer.name,
        "workers": workers,
        "seconds": elapsed,
        "tokens": tokens,
        "tokens_per_second": tokens / elapsed,
        "words_per_second": words / elapsed,
        "bytes_per_second": size / elapsed,
    }


def measure_reading(corpus: str | Corpus, seconds: float, split: str = "train") -> dict[str, Any]:
    """Reads the split for about `seconds`, as the one process does that deals documents to the workers: decompression,
    parsing, cutting. What it reads a second bounds all workers together.

    Raises `UserError` where the split is over with its first chunk.
    """
    corpus = open_corpus(corpus) if isinstance(corpus, str) else corpus
    stream = cut(corpus.documents(split), sys.maxsize)
    next(stream, None)
    size, elapsed, start = 0, 0.0, time.perf_counter()
    for chunk in stream:
        size += chunk.bytes
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            break
    if not size:
        raise UserError(f"the {split} split of {corpus.name} is too short to be timed; choose a larger corpus")
    return {"corpus": corpus.name, "split": split, "seconds": elapsed, "bytes_per_second": size / elapsed}


class Encoder:
    """Encodes chunks. Most words of a text were met before, so the ids of short pieces between spaces are kept."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._format = "H" if token_dtype(tokenizer.vocab_size) == "uint16" else "I"
        self._width = struct.calcsize(f"<{self._format}")
        self._split = SPACE_BETWEEN_WORDS.split if tokenizer.cuts_at_spaces else lambda text: [text]
        self._known = _Pieces(self._encode)

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        end = self._pack([self._tokenizer.eos_id])
        known = self._known.__getitem__
        ids = b"".join(b"".join(map(known, self._split(text))) + end for text in chunk.texts)
        words = sum(len(text.split()) for text in chunk.texts)
        return EncodedChunk(chunk.shard, ids, len(ids) // self._width, words, len(chunk.texts), chunk.bytes)

    def _encode(self, piece: str) -> bytes:
        return self._pack(self._tokenizer.encode(piece))

    def _pack(self, ids: list[int]) -> bytes:
        return struct.pack(f"<{len(ids)}{self._format}", *ids)


class _Pieces(dict[str, bytes]):
    """Pieces of text and their ids, filled as they are asked for; never more than some 100 MB."""

    def __init__(self, encode: Callable[[str], bytes]):
        self._encode = encode

    def __missing__(self, piece: str) -> bytes:
        ids = self._encode(piece)
        if len(piece) <= KNOWN_LENGTH and len(self) < KNOWN_PIECES:
            self[piece] = ids
        return ids


_worker: Encoder | None = None


def _start_worker(name: str, tokenizer_json: str) -> None:
    global _worker
    # An interrupt is the parent's to handle; it shuts the pool down.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = Encoder(Tokenizer.from_json(name, tokenizer_json))


def _end_with_parent() -> None:
    """A parent that is killed tells its workers nothing, and they would wait for chunks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(chunk: Chunk) -> EncodedChunk:
    assert _worker is not None
    return _worker(chunk)


@contextmanager
def _library_threads_off() -> Iterator[None]:
    """Also keeps the library from warning at every fork that follows a use of its threads."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
