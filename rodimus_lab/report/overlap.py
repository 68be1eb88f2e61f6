"""What must be said beside a score whose test items stand partly in the corpus that the model was trained on."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from rodimus_lab.records import Record


class Overlap(NamedTuple):
    """A corpus, the benchmark of which it holds a part, as metrics name it and as it is said, and which part."""

    corpus: str
    metric: str
    benchmark: str
    part: str


OVERLAPS = (
    Overlap("enwiki-25k", "squad", "SQuAD", "at least 24 of the 48 articles of SQuAD's dev set, by their titles"),
)


def overlaps(records: Iterable[Record], names: Collection[str] | None = None) -> list[str]:
    """One sentence for each corpus and benchmark that share texts and of which a record has a score, among the metrics
    `names` where given. A measured part of the corpus (`enwiki-25k:50m`) is warned of as the whole."""
    pairs = [
        (record.corpus.partition(":")[0], name)
        for record in records
        for name in record.metrics
        if names is None or name in names
    ]
    return [
        f"Scores on {known.benchmark} of models trained on {known.corpus} are not of unseen texts: "
        f"{known.corpus} holds {known.part}."
        for known in OVERLAPS
        if any(corpus == known.corpus and known.metric in name.split(".")[0].lower() for corpus, name in pairs)
    ]
