"""What a caption says of the runs behind a figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rodimus_lab.records import Record
from rodimus_lab.report.table import corpora, stands_in

NAMED = 8


def told_runs(runs: Iterable[Record], paper_corpus: str | tuple[str, ...] | None = None) -> str:
    """Corpus, tokenizer, budget with its tokens, device and the ids of the runs that share them, each run once; of more
    than `NAMED` their number, as the figure's numbers have every id."""
    groups: dict[str, dict[str, Record]] = {}
    for run in runs:
        groups.setdefault(", ".join(conditions(run, paper_corpus)), {})[run.id] = run
    return "; ".join(f"{_named(list(some.values()))}: {shared}" for shared, some in groups.items())


def conditions(run: Record, paper_corpus: str | tuple[str, ...] | None = None) -> list[str]:
    """What a run's numbers depend on beside its model, in words."""
    instead = f" standing in for {' or '.join(corpora(paper_corpus))}" if stands_in(run.corpus, paper_corpus) else ""
    tokens = f"{run.tokenizer} tokens" if run.tokenizer not in ("", "none") else ""
    return [part for part in (f"{run.corpus}{instead}", tokens, run.budget_text, run.device) if part]


def _named(runs: Sequence[Record]) -> str:
    ended = [steps for run in runs if (steps := run.metrics.get("steps")) not in (None, run.budget["steps"])]
    if len(runs) > NAMED:
        some = "" if len(ended) == len(runs) else f"{len(ended)} of which "
        early = f", {some}ended after {min(ended):,} to {max(ended):,} steps" if ended else ""
        return f"{len(runs)} runs, named in the CSV{early}"
    return ", ".join(map(_with_end, runs))


def _with_end(run: Record) -> str:
    steps = run.metrics.get("steps", run.budget["steps"])
    return run.id if steps == run.budget["steps"] else f"{run.id} (ended after {steps:,} steps)"
