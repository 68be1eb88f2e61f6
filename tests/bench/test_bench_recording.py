"""Measurements kept as run records: what names a record, what is refused, and that measuring again replaces it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rodimus_lab.bench import app
from rodimus_lab.errors import UserError
from rodimus_lab.records import Record, load_records
from rodimus_lab.report import runs_json

ENVIRONMENT = {"device": "NVIDIA H200", "commit": "abc", "dirty": False, "packages": {"torch": "2.11.0"}}


def train_report(*rows: dict[str, Any]) -> dict[str, Any]:
    settings = {"size": "1.3b", "batch": "1 x 4096", "precision": "bf16", "steps": 20}
    return {"bench": "train", "settings": settings, "environment": ENVIRONMENT, "rows": list(rows)}


def train_row(model: str = "rodimus", **changes: Any) -> dict[str, Any]:
    row = {
        "model": model, "peer": False, "size": "1.3b", "batch_size": 1, "seq_len": 4096, "precision": "bf16",
        "params": 10, "micro_batch_size": 1, "compiled": True, "tokens_per_second": 4000.5, "mfu": None,
        "peak_bytes": 123,
    }  # fmt: skip
    return row | changes


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RODIMUS_LAB_RESULTS", str(tmp_path / "runs"))
    return tmp_path


def record(place: Path, report: Any) -> list[Record]:
    path = place / "report.json"
    path.write_text(report if isinstance(report, str) else json.dumps(report))
    result = CliRunner().invoke(app, ["record", str(path)], catch_exceptions=False)
    assert result.exit_code == 0
    return load_records()


def test_a_row_becomes_a_record(place: Path) -> None:
    (kept,) = record(place, train_report(train_row()))
    assert (kept.experiment, kept.label, kept.device, kept.commit) == ("bench", "rodimus", "NVIDIA H200", "abc")
    assert kept.recipe == {
        "bench": "train", "label": "rodimus", "device": "NVIDIA H200", "peer": False, "size": "1.3b", "batch_size": 1,
        "seq_len": 4096, "precision": "bf16", "compiled": True,
    }  # fmt: skip
    assert kept.metrics == {"params": 10, "micro_batch_size": 1, "tokens_per_second": 4000.5, "peak_bytes": 123}
    assert kept.env == ENVIRONMENT
    assert kept.budget_text == "bench budget 20 steps, batch 1, 81.9k tokens"
    assert runs_json([kept])[0]["corpus"] == "random tokens"


def test_measured_again_it_takes_the_place_of_the_record_before(place: Path) -> None:
    record(place, train_report(train_row()))
    (kept,) = record(place, train_report(train_row(tokens_per_second=5000.0, params=11)))
    assert kept.metrics["tokens_per_second"] == 5000.0
    assert len(record(place, train_report(train_row(batch_size=2)))) == 2
    assert len(record(place, train_report(train_row()) | {"environment": ENVIRONMENT | {"device": "cpu"}})) == 3


def test_what_was_not_measured_is_not_kept_but_too_little_memory_is(place: Path) -> None:
    missing = {"model": "fla-rodimus", "batch_size": 1, "note": "cannot run: fla is not installed"}
    full = {"model": "transformer", "batch_size": 1, "seq_len": 4096, "note": "out of memory", "out_of_memory": True}
    (kept,) = record(place, train_report(missing, full))
    assert kept.label == "transformer"
    assert kept.metrics == {"note": "out of memory", "out_of_memory": True}


def test_decoding_is_kept_under_the_names_of_ids(place: Path) -> None:
    row = {"model": "rodimus+", "batch_size": 1, "context": 4096, "dtype": "bfloat16", "tokens_per_second": 9.0}
    report = {"bench": "decode", "settings": {"size": "1.3b", "tokens": 256}, "environment": ENVIRONMENT, "rows": [row]}
    (kept,) = record(place, report)
    assert kept.id.startswith("rodimus_plus-")
    assert (kept.recipe["size"], kept.recipe["context"], kept.budget["steps"]) == ("1.3b", 4096, 1)


LACKING = train_report({"model": "rodimus", "tokens_per_second": 1.0}) | {"settings": {}}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"bench": "ops"}', '{"bench": "train"}', json.dumps(LACKING)])
def test_what_is_no_report_is_refused(place: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"report\.json is not what bench --json prints \(.+\); measure again"):
        record(place, text)
    assert load_records() == []


def test_a_missing_file_is_named(place: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read nowhere\.json \(no such file or directory\)"):
        CliRunner().invoke(app, ["record", "nowhere.json"], catch_exceptions=False)
