"""WikiText-103 and WikiText-2 (Merity et al. 2016), the corpora of the paper's Tables 1, 15, 16 and 17."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from rodimus_lab.data.corpus import CORPORA, Corpus
from rodimus_lab.data.files import files_fingerprint, reading
from rodimus_lab.data.hub import quiet_hub
from rodimus_lab.data.storage import data_root
from rodimus_lab.errors import UserError


class WikiText(Corpus):
    """WikiText (Merity et al. 2016) in its tokenised, non-raw form, read as fairseq reads it.

    Every line of the file, stripped, is a unit of its own, the empty ones too; the split is then one stream with one
    end-of-document token after each line. Local files come first, the Hub second.
    """

    unit = "line"
    note = (
        "Tokenised, not detokenised: words stand apart, rare ones are <unk>, and inner hyphens, commas and points are "
        '" @-@ ", " @,@ " and " @.@ ".'
    )
    hub = ("Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3")
    published: ClassVar[dict[str, dict[str, int]]] = {
        "wikitext-103": {"train": 103_227_021, "valid": 217_646, "test": 245_569},
        "wikitext-2": {"train": 2_088_628, "valid": 217_646, "test": 245_569},
    }
    files: ClassVar[dict[str, str]] = {"wikitext-103": "wiki.{}.tokens", "wikitext-2": "{}.txt"}

    def __init__(self, name: str):
        self.name = name

    def _relative(self, split: str) -> str:
        return f"{self.name}/{self.files[self.name].format(split)}"

    def _local(self, split: str) -> Path | None:
        self.require(split)
        root = data_root()
        path = root / self._relative(split) if root else None
        return path if path and path.is_file() else None

    def source(self, split: str) -> str:
        return self._relative(split) if self._local(split) else f"Hub: {self.hub[0]}, {self.name}-v1, {self.hub[1][:8]}"

    def fingerprint(self, split: str) -> str | None:
        path = self._local(split)
        return files_fingerprint([path]) if path else None

    def published_words(self, split: str) -> int | None:
        return self.published[self.name][split]

    def documents(self, split: str) -> Iterator[str]:
        path = self._local(split)
        if path is None:
            yield from self._from_hub(split)
            return
        with reading(path), path.open(encoding="utf-8", newline="\n") as lines:
            for line in lines:
                yield line.strip()

    def _from_hub(self, split: str) -> Iterator[str]:
        mend = f"set RODIMUS_LAB_DATA to a folder that holds {self._relative(split)}"
        try:
            import datasets
        except ImportError:
            raise UserError(
                f"the {split} split of {self.name} is not local and the package 'datasets' is missing; {mend}, or "
                "pip install -e '.[data]'"
            ) from None
        quiet_hub()
        repository, revision = self.hub
        try:
            hub_split = "validation" if split == "valid" else split
            rows = datasets.load_dataset(repository, f"{self.name}-v1", split=hub_split, revision=revision)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"the {split} split of {self.name} is not local and the Hub does not give it ({reason}); {mend}, or "
                "get network access to the Hub"
            ) from error
        for batch in rows.iter(batch_size=1000):
            for line in batch["text"]:
                yield line.strip()


@CORPORA.register("wikitext-103")
def _wikitext_103() -> Corpus:
    return WikiText("wikitext-103")


@CORPORA.register("wikitext-2")
def _wikitext_2() -> Corpus:
    return WikiText("wikitext-2")
