"""Made-up records of evaluations, for the tables that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rodimus_lab.records import Record


def evaluation(id: str, metrics: dict[str, float], scored: str, recipe: dict[str, Any], **changes: Any) -> Record:
    values = {
        "experiment": "eval",
        "id": id,
        "label": "rodimus",
        "recipe": {"tasks": [id], "data": {"source": "local files"}} | recipe,
        "env": {},
        "metrics": metrics,
        "corpus": "pile",
        "tokenizer": "gpt-neox",
        "budget": {"name": "paper", "steps": 10, "scored": scored},
        "device": "cpu",
        "commit": "abc",
        "finished": f"2026-11-22T00:00:0{len(id) % 10}+00:00",
        "path": Path(id),
    }
    return Record(**(values | changes))
