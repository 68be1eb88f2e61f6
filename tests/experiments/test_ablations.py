"""Tables 12 to 18: every run is the paper's row, one change from its base; and the tables that come of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.ablations import axes, order, sharing, tables
from rodimus_lab.accounting import paper_accounting
from rodimus_lab.experiment import EXPERIMENTS, REPORTS
from rodimus_lab.nn.rodimus import RodimusConfig
from rodimus_lab.records import PROJECT_ROOT, Record, load_records
from rodimus_lab.registry import load_plugins
from rodimus_lab.report import PaperResults, Printed, Table
from rodimus_lab.variant import Variant, rows_of

load_plugins()

RESULTS = PROJECT_ROOT / "results"
NUMBERS = range(12, 19)
KEYS = {
    12: ("size", "rank"),
    13: ("size", "expansion"),
    14: ("model", "head_sharing"),
    15: ("beta_hat", "g", "tau"),
    16: ("beta",),
    17: ("n_layers", "two_hop_residual"),
    18: ("order", "corpus", "n_layers"),
}
VARIANTS = {
    variant.label: variant
    for runs in [
        *(rows.values() for rows in tables().values()),
        *(v for axis in axes().values() for v in axis.values()),
    ]
    for variant in runs
}


def recipes(**options):
    return EXPERIMENTS["ablate"].recipes(**({"budget": "paper"} | options))


def as_record(variant: Variant, ppl: float, *, seed: int = 0, steps: int = 1000) -> Record:
    """A made-up record of a real recipe on a stand-in."""
    recipe = variant.recipe("short", corpus="enwiki-25k", steps=steps, dropout=0.0, seed=seed)
    return Record(
        experiment=recipe.experiment,
        id=recipe.id,
        label=recipe.label,
        recipe=recipe.to_dict(),
        env={},
        metrics={"test_ppl": ppl, "best_test_ppl": ppl, "valid_ppl": ppl, "params": recipe.model.num_params()},
        corpus=recipe.data.corpus,
        tokenizer=recipe.data.tokenizer,
        budget=recipe.budget.to_dict(),
        device="made-up device",
        commit="0" * 40,
        finished="2026-01-01T00:00:00+00:00",
        path=Path(recipe.experiment) / recipe.id,
    )


def made(number: int, records: list[Record]) -> Table:
    return REPORTS[f"table{number}"].make(records, PaperResults())


@pytest.mark.parametrize("number", NUMBERS)
def test_the_runs_are_the_papers_rows(number: int) -> None:
    printed = [
        tuple(str(getattr(row[key], "text", row[key])) for key in KEYS[number]) for row in PaperResults().table(number)
    ]
    words = {"\\prod_{j=i+1}^t\\beta_j": "yes", "1_m": "no"}
    assert {tuple(words.get(word, word) for word in row) for row in printed} == set(tables()[number])


@pytest.mark.parametrize("number", [12, 13])
def test_the_counts_are_the_papers(number: int) -> None:
    for row in PaperResults().table(number):
        size, value, params = (row[name] for name in ("size", KEYS[number][1], "params_m"))
        assert isinstance(value, Printed)
        assert isinstance(params, Printed)
        variant = tables()[number][str(size), value.text]
        assert f"{variant.config(smoke=False).num_params() / 1e6:.1f}" == params.text


def test_table_14s_caches_are_the_papers() -> None:
    for row in PaperResults().table(14):
        variant = tables()[14][str(row["model"]), str(row["head_sharing"])]
        megabytes = paper_accounting(variant.config(smoke=False), 2048).memory.remembered / 1e6
        assert isinstance(row["cache_mb"], Printed)
        assert f"{megabytes:.1f}" == row["cache_mb"].text
    mqa = paper_accounting(sharing("transformer++", "mqa").config(smoke=False), 2048).memory.remembered
    assert mqa == 12 * 2048 * 2 * 128 * 2


def test_gates_are_those_of_the_row() -> None:
    for (beta_hat, g, tau), variant in tables()[15].items():
        mixer = variant.config(smoke=False).pattern[0].hops[0][0]
        assert isinstance(mixer, RodimusConfig)
        on = {name: "no" if getattr(mixer, name) is None else "yes" for name in ("beta_hat", "g", "tau", "beta")}
        assert on == {"beta_hat": beta_hat, "g": g, "tau": tau, "beta": "no"}
    with_beta = tables()[16]["yes",].config(smoke=False).pattern[0].hops[0][0]
    assert isinstance(with_beta, RodimusConfig)
    assert (with_beta.g, with_beta.tau) == (None, None)
    assert None not in (with_beta.beta, with_beta.beta_hat)


def test_hops_and_order() -> None:
    kinds = {
        row: [[sublayer.kind for sublayer in hop] for hop in variant.config(smoke=False).pattern[0].hops]
        for row, variant in (tables()[17] | tables()[18]).items()
    }
    assert kinds["24", "yes"][0] == ["rodimus"]
    assert kinds["24", "yes"][1][0] == "attention"
    assert [len(hop) for hop in kinds["24", "yes"]] == [1, 2]
    assert [len(hop) for hop in kinds["24", "no"]] == [1, 1, 1]
    assert kinds["X + Rodimus", "Pile", "24"] == kinds["Rodimus + X", "Pile", "24"][::-1]
    assert tables()[17]["24", "no"].config(smoke=False).repeats == 24


def test_every_run_is_its_bases_but_for_what_it_declares() -> None:
    """The trainings agree, and only the model differs."""
    for recipe in recipes(table=["12,13,14,15", "16", "17", "18"], seed=3):
        departure = recipe.departure
        if departure is None:
            assert recipe.experiment in ("ablate", "wikitext103")
            continue
        assert departure["changes"]
        assert all(path.startswith("model.") for path in departure["changes"])
        assert departure["base"] != recipe.id


def test_the_full_model_is_table_1s_run() -> None:
    (table_1,) = EXPERIMENTS["wikitext103"].recipes(budget="paper")
    assert table_1.id in [recipe.id for recipe in recipes(table=["15"])]
    (plus,) = EXPERIMENTS["wikitext103"].recipes(model="rodimus+", budget="paper")
    assert plus.id in [recipe.id for recipe in recipes(table=["17"])]


def test_settings_are_tables_5_and_8() -> None:
    def trained(recipe):
        budget, schedule = recipe.budget, recipe.schedule
        return (recipe.data.corpus, recipe.data.seq_len, budget.steps, budget.batch_size, schedule.warmup_steps,
                recipe.optimizer.lr, schedule.min_lr, recipe.model.vocab_size)  # fmt: skip

    assert {trained(recipe) for recipe in recipes(table=["12,13,14"])} == {
        ("pile", 2048, 13351, 256, 572, 5e-4, 1e-5, 50277)
    }
    assert {trained(recipe) for recipe in recipes(table=["15,16,17"])} == {
        ("wikitext-103", 512, 25000, 256, 2000, 5e-4, 1e-5, 50265)
    }
    pile = order("attention-first", True).recipe("paper", dropout=0.0, seed=0)
    assert trained(pile) == ("pile", 2048, 13500, 256, 1350, 3e-4, 1e-5, 50277)


def test_options_add_up_and_no_run_comes_twice() -> None:
    ids = [recipe.id for recipe in recipes(gate=["tau", "beta-hat"], rank=["1,2"], layers=["6"])]
    assert len(ids) == len(set(ids)) == 3
    both = recipes(table=["15,17"], layers=["6"], corpus="enwiki-25k", budget="short", steps=1000)
    assert [recipe.label for recipe in both[:6]] == [variant.label for variant in tables()[15].values()]
    assert len(both) == 8
    assert {(r.seed, r.budget.steps, r.budget.batch_size, r.data.seq_len, r.data.corpus) for r in both} == {
        (0, 1000, 256, 512, "enwiki-25k")
    }


@pytest.mark.parametrize("label", sorted(VARIANTS))
def test_every_run_can_be_built_small(label: str) -> None:
    recipe = VARIANTS[label].recipe("smoke", dropout=0.0, seed=0)
    model = recipe.model.build()
    assert sum(parameter.numel() for parameter in model.parameters()) == recipe.model.num_params() < 1e7
    ids = torch.randint(recipe.model.vocab_size, (1, 20))
    loss = model.loss(ids, ids.roll(-1, 1))
    loss.backward()
    assert 8 < float(loss.detach()) < 9
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_row_takes_the_runs_of_its_model_alone() -> None:
    rows = tables()[15]
    full = rows["yes", "yes", "yes"]
    fixed = axes()["gate_temperature"]["fixed"][0]
    records = [as_record(full, 20.0), as_record(fixed, 21.0), as_record(tables()[17]["6", "yes"], 22.0)]
    assert [(record.id, row) for record, row in rows_of(rows, records)] == [(records[0].id, ("yes", "yes", "yes"))]


def test_the_order_is_told_in_one_line() -> None:
    rows = tables()[15]
    by_paper = {("no", "no", "no"): 70.0, ("yes", "no", "no"): 71.0, ("no", "yes", "no"): 66.0,
                ("no", "yes", "yes"): 64.0, ("yes", "yes", "no"): 65.0, ("yes", "yes", "yes"): 62.0}  # fmt: skip
    runs = [as_record(rows[row], ppl) for row, ppl in by_paper.items()]
    (note,) = [note for note in made(15, runs).closing_notes if note.startswith("Order")]
    assert "15 of 15 pairs of rows stand as in the paper" in note
    assert "short budget 1,000 of 25,000 steps" in note
    assert "the noise is not known" in note
    runs[-1] = as_record(rows["yes", "yes", "yes"], 64.5)
    (note,) = [note for note in made(15, runs).closing_notes if note.startswith("Order")]
    assert "14 of 15" in note
    assert "(no yes yes) is not above (yes yes yes)" in note


def test_the_noise_of_several_seeds_counts() -> None:
    with_beta, without = tables()[16]["yes",], tables()[16]["no",]
    apart = [as_record(with_beta, 24.0 + s / 10, seed=s) for s in (0, 1)]
    apart += [as_record(without, 23.0 + s / 10, seed=s) for s in (0, 1)]
    assert any("1 of 1 pairs" in note and "Noise is that over seeds" in note for note in made(16, apart).closing_notes)
    close = apart[:2] + [
        replace(record, metrics=record.metrics | {"test_ppl": 23.9 + i}) for i, record in enumerate(apart[2:])
    ]
    assert any("0 of 1 pairs" in note and "1 lie within noise" in note for note in made(16, close).closing_notes)


def test_table_18_takes_the_split_of_its_corpus() -> None:
    wiki = as_record(order("attention-first", False), 30.0)
    pile = as_record(order("attention-first", True), 9.0)
    pile = replace(pile, metrics=pile.metrics | {"test_ppl": 10.0})
    cells = {cell.text for row in made(18, [wiki, pile]).rows for cell in row}
    assert {"30.00", "9.00"} < cells
    assert "10.00" not in cells


def test_from_the_command_line(cli, places, texts) -> None:
    """Listed, trained in small, found finished, and its departure from the base in the record."""
    command = ("ablate", "--gate", "tau", "--budget", "smoke", "--steps", 2, "--corpus", texts)
    listed = json.loads(cli(*command, "--dry-run", "--json").out)
    assert [(one["state"], one["hours"]) for one in listed] == [("new", None)] * 2
    assert not (places / "runs").exists()
    done = cli(*command, "--device", "cpu", "--serial")
    assert done.code == 0, done.err
    record = json.loads((places / "runs" / "ablate" / listed[1]["id"] / "record.json").read_text())
    assert record["departure"]["base"] == listed[0]["id"]
    ((path, (there, here)),) = record["departure"]["changes"].items()
    assert path.endswith(".tau")
    assert (there["fixed"], here) == (None, None)
    assert "finished" in cli(*command, "--dry-run").out
    text = (places / "tables" / "table15.md").read_text()
    assert f"{record['corpus']} standing in for wikitext-103" in text
    assert listed[1]["id"] in text


def test_an_options_values_are_told_by_commas_or_one_by_one_and_seeds_are_combined(cli) -> None:
    def ids(*options: object) -> list[str]:
        result = cli("ablate", *options, "--budget", "smoke", "--dry-run", "--json")
        return [one["id"] for one in json.loads(result.out)]

    at_once = ids("--gate", "g,tau")
    assert len(at_once) == 3
    assert ids("--gate", "g", "--gate", "tau") == at_once
    assert ids("--gate", "g,tau", "--seed", 0, "--seed", 1)[:3] == at_once
    assert len(set(ids("--gate", "g,tau", "--seed", 0, "--seed", 1))) == 6


@pytest.mark.parametrize("switch", ["key_norm", "feedthrough", "short_conv"])
def test_a_switch_is_run_on_and_off(cli, switch) -> None:
    plan = json.loads(cli("ablate", f"--{switch.replace('_', '-')}", "--budget", "smoke", "--dry-run", "--json").out)
    assert [run["id"].rpartition("-")[0] for run in plan] == ["rodimus", f"rodimus-no-{switch}"]


def test_times_are_scaled_from_what_was_measured(cli, places, monkeypatch) -> None:
    monkeypatch.setenv("RODIMUS_LAB_RESULTS", str(RESULTS / "runs"))
    options = ("--corpus", "enwiki-25k", "--budget", "short", "--steps", 1000, "--dry-run", "--json")
    own, deeper = (json.loads(cli("ablate", "--hops", "two", "--layers", n, *options).out)[0] for n in (6, 24))
    (record,) = [record for record in load_records(RESULTS / "runs") if record.id == own["measured"]]
    assert own["hours"] == pytest.approx(1000 * 256 * 512 / record.metrics["tokens_per_second"] / 3600, abs=1e-3)
    assert deeper["measured"] == own["measured"]
    assert 1.2 < deeper["hours"] / own["hours"] < 4
    assert json.loads(cli("ablate", "--rank", 1, *options).out)[0]["hours"] is None
