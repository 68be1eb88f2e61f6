"""Evaluations of one model, asked in one way, as one record: what tables of `rodimus-lab eval` are made from."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from rodimus_lab.records import Record, canonical_json

# What may differ between the records of one row: which tasks, their shots and limits, and their files.
OF_TASKS = ("tasks", "data", "shots", "code")


def joined(records: Iterable[Record], names: Collection[str]) -> list[Record]:
    """The records with any of these metrics; those that differ in their tasks only are one, with the ids of all.

    Of two records of one task the later one counts.
    """
    same: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: (record.finished, record.id)):
        if any(name in record.metrics for name in names):
            how = _how(record) | {"budget": record.budget_text, "device": record.device}
            same.setdefault(canonical_json(how), []).append(record)
    rows = []
    for found in same.values():
        metrics: dict[str, float] = {}
        for record in found:
            metrics |= record.metrics
        ids = "; ".join(record.id for record in found)
        rows.append(replace(found[-1], id=ids, metrics=metrics, recipe=_how(found[-1])))
    return rows


def _how(record: Record) -> dict[str, object]:
    kept = {name: value for name, value in record.recipe.items() if name not in OF_TASKS}
    return kept | {"source": record.recipe["data"]["source"]}
