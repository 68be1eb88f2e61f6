"""Large corpora of many files: from a folder under `$RODIMUS_LAB_DATA`, else fetched file by file from the Hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from rodimus_lab.data.corpus import CORPORA, Corpus, Part
from rodimus_lab.data.files import files_fingerprint, read_documents, split_of
from rodimus_lab.data.storage import SPLITS, data_root
from rodimus_lab.errors import UserError


class HubCorpus(Corpus):
    """`patterns` say which files of the repository, or of the local folder `name`, are a split's. With `by_hash` there
    is one pattern, and documents are dealt to train, valid and test by a hash of their text, 98 : 1 : 1.

    A file from the Hub lies in its cache, whose files it reads once and does not remove.
    """

    def __init__(self, name: str, repository: str, patterns: dict[str, str], note: str, by_hash: bool = False):
        self.name, self.repository, self.note = name, repository, note
        self._patterns, self._by_hash = patterns, by_hash
        self.splits = SPLITS if by_hash else tuple(split for split in SPLITS if split in patterns)

    def _pattern(self, split: str) -> str:
        self.require(split)
        return self._patterns["train" if self._by_hash else split]

    def _local(self, split: str) -> list[Path]:
        root = data_root()
        return sorted((root / self.name).glob(self._pattern(split))) if root else []

    def source(self, split: str) -> str:
        pattern = self._pattern(split)
        return f"{self.name}/{pattern}" if self._local(split) else f"Hub: {self.repository}, {pattern}"

    def fingerprint(self, split: str) -> str | None:
        files = self._local(split)
        return files_fingerprint(files) if files else None

    def parts(self, split: str) -> Sequence[Part]:
        readers: list[Part] = [partial(read_documents, path) for path in self._local(split)]
        if not readers:
            readers = [partial(self._fetched, name) for name in self._names(split)]
        return [partial(self._dealt, read, split) for read in readers] if self._by_hash else readers

    def documents(self, split: str) -> Iterator[str]:
        for part in self.parts(split):
            yield from part()

    @staticmethod
    def _dealt(read: Part, split: str) -> Iterator[str]:
        return (document for document in read() if split_of(document) == split)

    def _names(self, split: str) -> list[str]:
        """The split's files in the repository."""
        try:
            from huggingface_hub import HfApi

            quiet_hub()
            names = HfApi().list_repo_files(self.repository, repo_type="dataset")
        except Exception as error:
            raise self._unreachable(self._pattern(split), error) from None
        found = sorted(name for name in names if fnmatch(name, self._pattern(split)))
        if not found:
            raise UserError(f"the Hub's {self.repository} has no files {self._pattern(split)} any more; get a copy")
        return found

    def _fetched(self, name: str) -> Iterator[str]:
        try:
            from huggingface_hub import hf_hub_download

            quiet_hub()
            path = hf_hub_download(self.repository, name, repo_type="dataset")
        except Exception as error:
            raise self._unreachable(name, error) from None
        yield from read_documents(Path(path))

    def _unreachable(self, name: str, error: Exception) -> UserError:
        if isinstance(error, ImportError):
            reason = "the package 'huggingface_hub' is missing; pip install -e '.[data]'"
        else:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        return UserError(
            f"{name} of {self.name} is not local and the Hub does not give it ({reason}); what is prepared is "
            f"kept: set RODIMUS_LAB_DATA to a folder that holds {self.name}/{name}, or run it again with network "
            "access to the Hub"
        )


def quiet_hub() -> None:
    """Keeps the Hub's client from telling of each of its attempts; what is raised in the end says it once."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()


@CORPORA.register("pile")
def _pile() -> Corpus:
    return HubCorpus(
        "pile",
        "monology/pile-uncopyrighted",
        {"train": "train/*.jsonl.zst", "valid": "val.jsonl.zst", "test": "test.jsonl.zst"},
        "A stand-in for the Pile (Gao et al. 2020), which its authors give out no more: without Books3, BookCorpus2, "
        "OpenSubtitles, YTSubtitles and OWT2. Its perplexities are not the Pile's.",
    )


@CORPORA.register("fineweb")
def _fineweb() -> Corpus:
    return HubCorpus(
        "fineweb",
        "HuggingFaceFW/fineweb",
        {"train": "sample/10BT/*.parquet"},
        "FineWeb's sample of 10 B tokens of web text; split 98 : 1 : 1 by a hash of each document.",
        by_hash=True,
    )
