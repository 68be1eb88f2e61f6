"""What has been run and what is under way, for `rodimus-lab runs`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table as RichTable

from rodimus_lab.records import Record, UnfinishedRun, describe_budget
from rodimus_lab.report.table import MISSING


def runs_json(records: Iterable[Record], unfinished: Iterable[UnfinishedRun] = ()) -> list[dict[str, Any]]:
    """One plain dict a run, finished ones first. `test_ppl` and whatever else is not known is None."""
    done = [
        {
            "experiment": record.experiment,
            "id": record.id,
            "label": record.label,
            "corpus": record.corpus,
            "tokenizer": record.tokenizer,
            "budget": record.budget_text,
            "device": record.device,
            "test_ppl": record.metrics.get("test_ppl"),
            "finished": record.finished,
            "step": record.metrics.get("steps"),
            "path": str(record.path),
        }
        for record in records
    ]
    return done + [_unfinished(run) for run in unfinished]


def runs_table(records: Iterable[Record], unfinished: Iterable[UnfinishedRun] = ()) -> RichTable:
    """The same for a terminal."""
    table = RichTable()
    for name in ("experiment", "id", "label", "corpus", "budget", "device"):
        table.add_column(name, overflow="fold")
    table.add_column("test ppl", justify="right")
    table.add_column("finished")
    for run in runs_json(records, unfinished):
        ppl = run["test_ppl"]
        done = run["finished"] or f"no, at step {MISSING if run['step'] is None else run['step']}"
        texts = [run[name] or MISSING for name in ("experiment", "id", "label", "corpus", "budget", "device")]
        table.add_row(*texts, MISSING if ppl is None else f"{ppl:.2f}", done)
    return table


def _unfinished(run: UnfinishedRun) -> dict[str, Any]:
    data, budget = run.recipe.get("data") or {}, run.recipe.get("budget")
    return {
        "experiment": run.experiment,
        "id": run.id,
        "label": run.label,
        "corpus": data.get("corpus"),
        "tokenizer": data.get("tokenizer"),
        "budget": describe_budget(budget) if budget else None,
        "device": None,
        "test_ppl": None,
        "finished": None,
        "step": run.last.get("step"),
        "path": str(run.path),
    }
