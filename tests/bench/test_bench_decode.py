"""`bench decode` on a CPU: what it reports, and that a wrong step gets no time."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from rodimus_lab.bench import app
from rodimus_lab.bench import decode as module
from rodimus_lab.bench.decode import state_traffic, weights_read
from rodimus_lab.errors import UserError
from rodimus_lab.nn.model import LanguageModel
from rodimus_lab.nn.zoo import build_model, model_config
from rodimus_lab.ops.attention import KVCache

TIMES = {"seconds_per_token", "tokens_per_second", "floor_seconds", "of_floor", "of_floor_with_state"}


def bench(*arguments: str) -> list[dict[str, Any]]:
    options = ["--size", "mqar", "--device", "cpu", "--tokens", "3", "--json"]
    result = CliRunner().invoke(app, ["decode", *options, *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads(result.stdout)["rows"]


def test_rows() -> None:
    models = ["rodimus", "rodimus+", "transformer++"]
    rows = bench("--batch", "2", "--context", "20", "--context", "300")
    assert [(row["model"], row["context"]) for row in rows] == [(m, c) for m in models for c in (20, 300)]
    for row in rows:
        config = model_config(row["model"], size="mqar")
        assert row.keys() >= TIMES
        assert row["relative_error"] < 1e-3
        assert row["params"] == config.num_params() == row["weight_bytes"] / 4
        assert row["growth_bytes"] == 0
        assert (row["backend"], row["dtype"], row["generated"]) == ("eager", "float32", 3)
        assert row["tokens_per_second"] == 2 / row["seconds_per_token"]
        assert row["of_floor"] == row["floor_seconds"] / row["seconds_per_token"]
    read = [row["state"] for row in rows]
    assert read[0] == read[4] == "20 tokens read"
    assert read[1] == "64 tokens read, caches filled with noise up to 300"  # 600 tokens are too many for a CPU
    assert read[5] == "64 tokens read, caches filled with noise up to 300"  # Its state grows with them.
    assert rows[0]["state_bytes"] == rows[1]["state_bytes"]
    assert rows[4]["state_bytes"] < rows[5]["state_bytes"]


def test_a_states_dtype_and_an_operators_backend_can_be_asked_for() -> None:
    rows = [bench("--model", "rodimus", "--context", "5", "--state-dtype", kind)[0] for kind in ("fp32", "bf16")]
    assert [row["state_dtype"] for row in rows] == ["float32", "bfloat16"]
    assert rows[0]["state_bytes"] - 8 == 2 * (rows[1]["state_bytes"] - 8)
    (row,) = bench("--model", "transformer++", "--context", "5", "--backend", "attention_step=naive")
    assert row["backends"] == {"attention_step": "naive"}
    with pytest.raises(UserError, match="attention_stp"):
        bench("--backend", "attention_stp=naive")


def test_late_steps_are_timed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMED", 2)
    (row,) = bench("--model", "rodimus", "--context", "5")
    assert row["late_seconds_per_token"] > 0


def test_a_wrong_step_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LanguageModel.step
    monkeypatch.setattr(LanguageModel, "step", lambda *arguments: 1.01 * right(*arguments))
    (row,) = bench("--model", "rodimus", "--context", "5")
    assert "off by 1.0e-02 from the general path; it gets no time" in row["note"]
    assert not TIMES & row.keys()


def test_a_peer_is_a_row_beside_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def peer(*facts: Any) -> dict[str, Any]:
        assert facts[:3] == ("mqar", 1, 5)
        return {"model": "other", "seconds_per_token": 1.0, "weight_bytes": 8}

    monkeypatch.setitem(module.DECODE_PEERS._things, "other", peer)
    ours, other = bench("--model", "rodimus", "--model", "other", "--context", "5")
    assert ours["model"] == "rodimus"
    assert other["of_floor"] == other["floor_seconds"] > 0


def test_tables_of_which_rows_are_looked_up_are_not_read() -> None:
    tied = build_model("transformer", size="mqar")
    untied = build_model("transformer", size="mqar", tie_embeddings=False)
    assert weights_read(untied) == weights_read(tied)
    assert weights_read(tied) == 4 * (tied.config.num_params() - tied.config.max_positions * tied.config.d_model)


def test_traffic_counts_what_is_filled() -> None:
    cache = KVCache(torch.zeros(2, 10, 1, 4), torch.zeros(2, 10, 2, 4), torch.tensor([5, 1000]))
    assert state_traffic(cache) == (5 + 10) * (4 + 8) * 4
    assert state_traffic((cache, (torch.zeros(3),))) == state_traffic(cache) + 2 * 12


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'rodimus'"):
        bench("--model", "rodimos")
    with pytest.raises(UserError, match="no size named 'mqr'; did you mean 'mqar'"):
        bench("--size", "mqr")
