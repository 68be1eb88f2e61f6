"""The paper beside made-up records: corpora, budgets, seeds and settings stay apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rodimus_lab.records import Record, UnfinishedRun
from rodimus_lab.report import Cell, Metric, Printed, Table, paper_vs_measured, runs_json, runs_table, to_markdown

PAPER = [
    {"model": "rodimus", "test_ppl": Printed("21.90"), "params_m": Printed("46.68")},
    {"model": "rodimus+", "test_ppl": Printed("21.56"), "params_m": Printed("48.45")},
    {"model": "transformer++", "test_ppl": Printed("22.02"), "params_m": None},
]
PPL = Metric("Test PPL", "test_ppl", "test_ppl")
FULL = {"name": "paper", "steps": 25000, "batch_size": 256, "paper_steps": 25000}
SHORT = FULL | {"name": "short", "steps": 1500}


def record(
    label: str,
    ppl: float | None,
    *,
    seed: int = 0,
    corpus: str = "wikitext-103",
    budget: dict[str, Any] = SHORT,
    device: str = "NVIDIA H200",
    tokenizer: str = "gpt2",
    metrics: dict[str, Any] | None = None,
    **recipe: Any,
) -> Record:
    id = f"{label}-{seed}{corpus[0]}{budget['name']}{'-'.join(map(str, recipe.values()))}"
    return Record(
        experiment="wikitext103",
        id=id,
        label=label,
        recipe={"label": label, "seed": seed, "budget": budget, "data": {"corpus": corpus}} | recipe,
        env={},
        metrics={"test_ppl": ppl, "steps": budget["steps"]} | (metrics or {}),
        corpus=corpus,
        tokenizer=tokenizer,
        budget=budget,
        device=device,
        commit="abc",
        finished="2026-11-21T00:00:00+00:00",
        path=Path("runs") / id,
    )


def compare(records: list[Record], **options: Any) -> Table:
    options = {"title": "Table 1", "metrics": [PPL], "paper_corpus": "wikitext-103"} | options
    return paper_vs_measured(PAPER, records, **options)


def texts(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


def test_the_paper_alone():
    table = compare([])
    assert table.headers == ("Model", "Test PPL (paper)", "Test PPL")
    assert texts(table) == [
        ["rodimus", "21.90", "not run"],
        ["rodimus+", "21.56", "not run"],
        ["transformer++", "22.02", "not run"],
    ]


def test_corpora_and_budgets_have_their_own_columns():
    table = compare(
        [
            record("rodimus", 30.0, corpus="enwiki-25k"),
            record("rodimus_plus", 29.5),
            record("rodimus", 22.0, budget=FULL),
            record("rodimus", 29.0),
        ]
    )
    assert table.headers == (
        "Model",
        "Test PPL (paper)",
        "Test PPL (wikitext-103, paper budget #1)",
        "Test PPL (wikitext-103, short #2)",
        "Test PPL (enwiki-25k stand-in, short #3)",
    )
    short = "gpt2 tokens, short budget 1,500 of 25,000 steps, batch 256"
    assert list(table.settings) == [
        "wikitext-103, gpt2 tokens, paper budget 25,000 steps, batch 256",
        f"wikitext-103, {short}",
        f"enwiki-25k standing in for wikitext-103, {short}",
    ]
    assert texts(table) == [
        ["rodimus", "21.90", "22.00", "29.00", "30.00"],
        ["rodimus+", "21.56", "not run", "29.50", "not run"],
        ["transformer++", "22.02", "not run", "not run", "not run"],
    ]
    assert table.rows[0][3].run_id == "rodimus-0wshort"
    assert table.marks == (("", "second", "", "best", ""), ("", "best", "", "second", ""), ("", "", "", "", ""))


def test_tokenizers_have_their_own_columns():
    table = compare([record("rodimus", 30.0), record("rodimus_plus", 10.0, tokenizer="bytes")])
    assert texts(table)[:2] == [["rodimus", "21.90", "not run", "30.00"], ["rodimus+", "21.56", "10.00", "not run"]]


def test_seeds_become_mean_deviation_and_count():
    runs = [record("rodimus", ppl, seed=seed) for seed, ppl in enumerate((20.0, 21.0, 22.0))]
    cell = compare(runs).rows[0][2]
    assert cell.value == 21.0
    assert cell.std == pytest.approx(1.0)
    assert cell.text == "21.00 ± 1.00 (3 seeds)"
    assert cell.run_id == "rodimus-0wshort; rodimus-1wshort; rodimus-2wshort"


def test_a_seed_without_the_metric_is_not_counted():
    cell = compare([record("rodimus", 20.0), record("rodimus", None, seed=1)]).rows[0][2]
    assert (cell.text, cell.run_id) == ("20.00", "rodimus-0wshort")


def test_runs_that_differ_in_settings_are_never_averaged():
    runs = [record("rodimus", 20.0, dropout=0.1, seed=seed) for seed in (0, 1)]
    runs += [record("rodimus", 30.0, dropout=0.0), record("gla", 40.0, dropout=0.0), record("gla", 50.0)]
    table = compare(runs)
    assert table.headers[:3] == ("Model", "Settings", "Test PPL (paper)")
    assert texts(table) == [
        ["rodimus", "—", "21.90", "—"],
        ["rodimus", "dropout=0.0", "—", "30.00"],
        ["rodimus", "dropout=0.1", "—", "20.00 ± 0.00 (2 seeds)"],
        ["rodimus+", "—", "21.56", "not run"],
        ["transformer++", "—", "22.02", "not run"],
        ["gla", "dropout=0.0", "—", "40.00"],
        ["gla", "no dropout", "—", "50.00"],
    ]


def test_a_list_of_plain_values_is_one_setting():
    runs = [record("rodimus", 20.0, depths=[0, 50, 100]), record("rodimus", 21.0, depths=[0])]
    assert [row[1].text for row in compare(runs).rows[1:3]] == ["depths=[0, 50, 100]", "depths=[0]"]


def test_nested_settings_are_named_by_their_path():
    runs = [record("rodimus", 20.0, blocks=[{"mixer": {}}]), record("rodimus", 21.0, blocks=[{"mixer": {"tau": None}}])]
    assert [row[1].text for row in compare(runs).rows[1:3]] == [
        "blocks.0.mixer={}, no blocks.0.mixer.tau",
        "no blocks.0.mixer, blocks.0.mixer.tau=None",
    ]


def test_models_that_only_we_ran_follow_the_papers():
    table = compare([record("mamba", 33.0)])
    assert texts(table)[-1] == ["mamba", "—", "33.00"]


def test_several_metrics_scales_and_given_columns():
    runs = [record("rodimus", 20.0, metrics={"best_test_ppl": 19.0, "params": 46_681_856})]
    table = compare(
        runs,
        metrics=[
            PPL,
            Metric("Best", "best_test_ppl", None),
            Metric("Word PPL", "test_word_ppl", None),
            Metric("Params (M)", "params", "params_m", better=None, scale=1e-6),
        ],
        given={"Formula": lambda names: Cell(len(names[0]), source="computed")},
        computed="the length of the name",
    )
    condition = "wikitext-103, short #1"
    assert table.headers == (
        "Model",
        "Formula (computed)",
        "Test PPL (paper)",
        f"Test PPL ({condition})",
        f"Best ({condition})",
        "Params (M) (paper)",
        f"Params (M) ({condition})",
    )
    assert texts(table)[0] == ["rodimus", "7", "21.90", "20.00", "19.00", "46.68", "46.68"]


def test_a_table_without_rows_says_that_nothing_was_run():
    table = paper_vs_measured([], [], title="Ours alone", metrics=[PPL], notes=["A note."])
    assert table.notes == ["A note.", "Not run yet."]
    assert "Not run yet." not in compare([]).notes


def test_rows_named_by_several_columns():
    paper = [
        {"rank": Printed("16"), "size": "125M", "ppl": Printed("7.26")},
        {"rank": Printed("1"), "size": "125M", "ppl": None},
    ]
    table = paper_vs_measured(
        paper,
        [record("rodimus", 7.5, rank=16)],
        title="Table 12",
        metrics=[Metric("Valid PPL", "test_ppl", "ppl")],
        key=("rank", "size"),
        headings=("Rank", "Size"),
        record_key=lambda run: (run.recipe["rank"], "125M"),
    )
    assert texts(table) == [["16", "125M", "7.26", "7.50"], ["1", "125M", "—", "not run"]]
    with pytest.raises(ValueError, match="do not tell the paper's rows apart"):
        paper_vs_measured(paper, [], title="t", metrics=[], key=("size",))


def test_devices_are_kept_apart_where_asked():
    runs = [record("rodimus", 1.0), record("rodimus", 1.0, seed=1, device="cpu")]
    assert len(compare(runs).columns) == 3
    table = compare(runs, per_device=True)
    assert [setting.rsplit(", ", 1)[1] for setting in table.settings] == ["NVIDIA H200", "cpu"]
    assert [header[-3:] for header in table.headers[2:]] == ["#1)", "#2)"]


def test_a_run_that_stopped_early_says_so():
    text = to_markdown(compare([record("rodimus", 20.0, metrics={"steps": 900})]))
    assert "run rodimus-0wshort; stopped after 900 steps" in text


def test_runs_as_rows_and_as_a_table():
    started = UnfinishedRun(
        experiment="wikitext103",
        id="gla-1",
        label="gla",
        recipe={"data": {"corpus": "wikitext-103", "tokenizer": "gpt2"}, "budget": SHORT},
        last={"step": 40},
        path=Path("runs/gla-1"),
    )
    rows = runs_json([record("rodimus", 20.0)], [started])
    assert [row["id"] for row in rows] == ["rodimus-0wshort", "gla-1"]
    assert rows[0].keys() == rows[1].keys()
    assert (rows[0]["test_ppl"], rows[1]["test_ppl"]) == (20.0, None)
    assert rows[1]["budget"] == "short budget 1,500 of 25,000 steps, batch 256"
    columns = {column.header: list(column.cells) for column in runs_table([record("rodimus", 20.0)], [started]).columns}
    assert columns["run"] == ["rodimus-0wshort", "gla-1"]
    assert columns["test ppl"] == ["20.00", "—"]
    assert columns["finished"] == ["2026-11-21", "at step 40"]
    assert runs_table([]).row_count == 0
