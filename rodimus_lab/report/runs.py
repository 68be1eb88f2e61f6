"""What has been run and what is under way, for `rodimus-lab runs`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any

from rich import box
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
            "steps": record.budget["steps"],
            "device": record.device,
            "test_ppl": record.metrics.get("test_ppl"),
            "finished": record.finished,
            "step": record.metrics.get("steps"),
            "path": str(record.path),
        }
        for record in records
    ]
    return done + [_unfinished(run) for run in unfinished]


def runs_table(
    records: Iterable[Record],
    unfinished: Iterable[UnfinishedRun] = (),
    extra: Mapping[str, Mapping[str, str]] | None = None,
) -> RichTable:
    """The same for a terminal, in short; a section for each experiment. `extra` are further columns: heading ->
    `experiment/id` -> text."""
    table = RichTable(box=box.SIMPLE)
    for name in ("experiment", "run", "corpus", "budget", "device"):
        table.add_column(name)
    table.add_column("test ppl", justify="right")
    for name in extra or {}:
        table.add_column(name)
    table.add_column("finished")
    runs = runs_json(records, unfinished)
    for run, following in zip_longest(runs, runs[1:]):
        done = run["finished"][:10] if run["finished"] else f"at step {run['step'] or 0:,}"
        ppl = MISSING if run["test_ppl"] is None else f"{run['test_ppl']:.2f}"
        budget = f"{run['budget'].partition(' ')[0]}, {run['steps']:,}" if run["steps"] else MISSING
        ends = following is not None and following["experiment"] != run["experiment"]
        more = [texts.get(f"{run['experiment']}/{run['id']}", MISSING) for texts in (extra or {}).values()]
        names = [run["experiment"], run["id"], run["corpus"] or MISSING]
        cells = [*names, budget, run["device"] or MISSING, ppl, *more, done]
        table.add_row(*cells, end_section=ends)
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
        "steps": budget["steps"] if budget else None,
        "device": None,
        "test_ppl": None,
        "finished": None,
        "step": run.last.get("step"),
        "path": str(run.path),
    }
