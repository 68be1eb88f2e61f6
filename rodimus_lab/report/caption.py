"""What a caption says of the runs behind a figure."""

from __future__ import annotations

from collections.abc import Iterable

from rodimus_lab.records import Record
from rodimus_lab.report.table import corpora, stands_in


def told_runs(runs: Iterable[Record], paper_corpus: str | tuple[str, ...] | None = None) -> str:
    """Corpus, tokenizer, budget with its tokens, device and the ids of the runs that share them, each run once."""
    groups: dict[str, dict[str, None]] = {}
    for run in runs:
        groups.setdefault(", ".join(conditions(run, paper_corpus)), {})[_named(run)] = None
    return "; ".join(f"{', '.join(ids)}: {shared}" for shared, ids in groups.items())


def conditions(run: Record, paper_corpus: str | tuple[str, ...] | None = None) -> list[str]:
    """What a run's numbers depend on beside its model, in words."""
    instead = f" standing in for {' or '.join(corpora(paper_corpus))}" if stands_in(run.corpus, paper_corpus) else ""
    tokens = f"{run.tokenizer} tokens" if run.tokenizer not in ("", "none") else ""
    return [part for part in (f"{run.corpus}{instead}", tokens, run.budget_text, run.device) if part]


def _named(run: Record) -> str:
    steps = run.metrics.get("steps", run.budget["steps"])
    return run.id if steps == run.budget["steps"] else f"{run.id} (ended after {steps:,} steps)"
