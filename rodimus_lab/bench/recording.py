"""`bench record`: keep what `bench train --json` and `bench decode --json` printed, as run records that tables read.

A row becomes a record of the experiment `bench`. Its recipe is what was measured: the row's settings and the device;
measured again, it takes the place of the record before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from rodimus_lab.bench.peers import OUT_OF_MEMORY
from rodimus_lab.bench.result import Row, app
from rodimus_lab.errors import UserError
from rodimus_lab.nn.zoo import MODELS, slug
from rodimus_lab.records import RunDir, runs_root
from rodimus_lab.registry import load_plugins

EXPERIMENT = "bench"
RECORDED = ("train", "decode")
OUTCOMES = frozenset({"params", "micro_batch_size", "note", "out_of_memory"})


def record_rows(report: Mapping[str, Any], root: Path) -> list[RunDir]:
    """Write a record for each row that was measured or ran out of memory, and return their folders.

    Raises `ValueError` where it is the report of another benchmark.
    """
    load_plugins()
    if report.get("bench") not in RECORDED:
        raise ValueError(f"it holds no report of bench {' or bench '.join(RECORDED)}")
    settings, environment, rows = report["settings"], report["environment"], report["rows"]
    return [
        _record(row, report["bench"], settings, environment, root)
        for row in rows
        if row.get("note") == OUT_OF_MEMORY["note"] or row.get("tokens_per_second") is not None
    ]


def _record(row: Row, bench: str, settings: Row, environment: Row, root: Path) -> RunDir:
    given = {key: value for key, value in row.items() if value is not None} | {"size": settings["size"]}
    outcomes = {key for key, value in given.items() if _is_outcome(key, value)}
    recipe = {key: value for key, value in given.items() if key not in outcomes and key != "model"}
    label = slug(row["model"]) if row["model"] in MODELS else row["model"]
    recipe |= {"bench": bench, "label": label, "device": environment["device"]}
    run = RunDir.of(root, EXPERIMENT, recipe)
    run.create(recipe)
    run.write_env(environment)
    run.finish(
        {
            "label": label,
            "corpus": "random tokens",
            "tokenizer": "",
            "budget": {
                "name": "bench",
                "steps": settings["steps"] if bench == "train" else 1,  # Of decoding, the time of one step.
                "batch_size": row["batch_size"],
            },
            "device": environment["device"],
            "commit": environment["commit"],
            "metrics": {key: given[key] for key in sorted(outcomes)},
        }
    )
    return run


def _is_outcome(key: str, value: Any) -> bool:
    """What was measured is a float, or bytes; settings are whole numbers, names and flags."""
    return isinstance(value, float) or key.endswith("_bytes") or key in OUTCOMES


@app.command()
def record(
    files: Annotated[list[Path], typer.Argument(help="What bench train --json or bench decode --json printed.")],
) -> None:
    """Keep measurements as run records, from which rodimus-lab report rebuilds Tables 19 and 20."""
    for path in files:
        try:
            folders = record_rows(json.loads(path.read_text(encoding="utf-8")), runs_root())
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(f"cannot read {path} ({reason}); give a file of bench train --json") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is not what bench --json prints ({_reason(error)}); measure again") from None
        for run in folders:
            print(run.path)


def _reason(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)
