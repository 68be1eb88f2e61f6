"""Table 1's runs: the paper's settings, their shrunken kin, and the table that comes of them."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import get_args

import pytest
import torch

from experiments.wikitext103 import table1, wikitext103
from rodimus_lab.errors import UserError
from rodimus_lab.experiment import BudgetName
from rodimus_lab.nn.zoo import MODELS, slug
from rodimus_lab.records import PROJECT_ROOT, Record, RunDir, load_records
from rodimus_lab.registry import load_plugins
from rodimus_lab.report import PaperResults, write
from rodimus_lab.settings import SETTINGS
from rodimus_lab.train.distributed import World
from rodimus_lab.train.optimizer import build_optimizer, decay_groups
from rodimus_lab.train.step import Stepper

load_plugins()

RESULTS = PROJECT_ROOT / "results"
PAPER_STEPS = SETTINGS["wikitext-103"].steps


@pytest.fixture(scope="module")
def paper_settings():
    with (RESULTS / "paper" / "table05.csv").open(encoding="utf-8") as file:
        return next(row for row in csv.DictReader(file) if row["corpus"] == "WikiText-103")


@pytest.mark.parametrize("model", ["rodimus", "rodimus+", "transformer++"])
def test_the_paper_budget_is_table_5(model, paper_settings):
    (recipe,) = wikitext103(model, budget="paper")
    optimizer, schedule, budget = recipe.optimizer, recipe.schedule, recipe.budget
    ours = {
        "vocab_size": recipe.model.vocab_size,
        "seq_len": recipe.data.seq_len,
        "batch_size": budget.batch_size,
        "steps": budget.steps,
        "warmup_steps": schedule.warmup_steps,
        "peak_lr": optimizer.lr,
        "min_lr": schedule.min_lr,
        "beta1": optimizer.beta1,
        "beta2": optimizer.beta2,
        "weight_decay": optimizer.weight_decay,
        "clip_norm": optimizer.clip_norm,
    }
    assert ours == {name: float(paper_settings[name]) for name in ours}
    assert (recipe.data.corpus, recipe.data.tokenizer) == ("wikitext-103", "gpt2")
    assert (budget.name, budget.fraction, budget.patience) == ("paper", 1, None)
    assert recipe.precision == "bf16"
    assert recipe.model.dropout == 0


@pytest.mark.parametrize("model", ["rodimus", "rodimus+", "transformer++"])
def test_the_models_have_table_1s_parameters(model):
    (recipe,) = wikitext103(model, budget="paper")
    row = next(row for row in PaperResults().table(1) if str(row["model"]) == model)
    assert recipe.model.num_params() / 1e6 == pytest.approx(float(str(row["params_m"])), rel=2e-3)


def test_short_shrinks_the_schedule_alone():
    (whole,), (short,) = wikitext103(budget="paper"), wikitext103(budget="short")
    assert short.budget.fraction == short.budget.steps / PAPER_STEPS == 0.06
    assert short.schedule.warmup_steps == 2000 * 0.06
    changed = short.replace(
        budget=short.budget.replace(name="paper", steps=PAPER_STEPS, eval_every=1000),
        schedule=short.schedule.replace(warmup_steps=2000),
    )
    assert changed == whole


@pytest.mark.parametrize("budget", ["paper", "short"])
def test_fewer_steps_than_the_papers_are_a_short_run(budget):
    (recipe,) = wikitext103(budget=budget, steps=250)
    assert (recipe.budget.name, recipe.budget.fraction, recipe.schedule.warmup_steps) == ("short", 0.01, 20)
    assert wikitext103(budget=budget, steps=PAPER_STEPS) == wikitext103(budget="paper")
    with pytest.raises(UserError, match=r"--steps: 25,001 is more than the paper's 25,000"):
        wikitext103(budget=budget, steps=PAPER_STEPS + 1)


def test_smoke_is_small_and_labelled_pydoc():
    (recipe,) = wikitext103(budget="smoke")
    assert (recipe.budget.name, recipe.budget.fraction) == ("smoke", None)
    assert (recipe.data.corpus, recipe.data.tokenizer) == ("pydoc", "pydoc-4096")
    assert recipe.model.num_params() < 2e6
    (shorter,) = wikitext103(budget="smoke", steps=100)
    assert (shorter.budget.name, shorter.budget.steps, shorter.schedule.warmup_steps) == ("smoke", 100, 10)
    for steps in (1, 2, 3):
        (recipe,) = wikitext103(budget="smoke", steps=steps)
        assert recipe.schedule.warmup_steps < recipe.budget.steps == steps


def test_an_id_is_its_options():
    (first,), (again,) = wikitext103("rodimus_plus", budget="short"), wikitext103("rodimus+", budget="short")
    assert first.id == again.id
    assert first.id.startswith("rodimus_plus-")
    others = [
        wikitext103("rodimus", budget="short"),
        wikitext103("rodimus+", budget="short", seed=1),
        wikitext103("rodimus+", budget="short", dropout=0.1),
        wikitext103("rodimus+", budget="short", steps=1000),
        wikitext103("rodimus+", budget="short", corpus="wikitext-2"),
        wikitext103("rodimus+", budget="paper"),
        wikitext103("rodimus+", budget="smoke"),
    ]
    assert len({first.id, *(recipe.id for (recipe,) in others)}) == 8


@pytest.mark.parametrize("model", list(MODELS))
def test_every_model_takes_a_step_of_the_smoke_budget(model):
    """With the recipe's own batch, clipping and first learning rate, on random tokens; and every budget can name it."""
    for budget in get_args(BudgetName):
        (recipe,) = wikitext103(model, budget=budget)
        assert recipe.label == slug(model)
    (recipe,) = wikitext103(model, budget="smoke")
    torch.manual_seed(recipe.seed)
    net, rows = recipe.model.build(), recipe.budget.batch_size
    optimizer = build_optimizer(net, decay_groups(net), recipe.optimizer)
    stepper = Stepper(net, optimizer, recipe, World(0, 1, torch.device("cpu")), rows)
    inputs, targets = torch.randint(recipe.model.vocab_size, (2, rows, recipe.data.seq_len))
    loss, norm = stepper.step(1, inputs, targets)
    assert stepper.sentinel.first_bad_step() is None
    assert float(loss) == pytest.approx(math.log(recipe.model.vocab_size), abs=0.2)
    assert float(norm) > 0
    with torch.no_grad():
        assert net.loss(inputs, targets) < loss


def test_the_committed_runs_are_what_todays_options_give():
    """Their ids would change with any setting of the experiment or of the models."""
    records = load_records(RESULTS / "runs", experiment="wikitext103")
    assert records
    for record in records:
        budget = "paper" if record.budget["steps"] == PAPER_STEPS else record.budget["name"]
        (recipe,) = wikitext103(
            record.label,
            budget=budget,
            corpus=record.corpus,
            steps=record.budget["steps"],
            dropout=record.recipe["model"]["dropout"],
            seed=record.recipe["seed"],
        )
        assert recipe.to_dict() == record.recipe
        assert recipe.id == record.id


def made_up(label: str, budget: dict, corpus: str, **metrics: float) -> Record:
    return Record(
        experiment="wikitext103",
        id=f"{label}-01234567",
        label=label,
        recipe={"label": label, "seed": 0},
        env={},
        metrics=metrics,
        corpus=corpus,
        tokenizer="gpt2",
        budget=budget,
        device="made-up device",
        commit="0" * 40,
        finished="2026-01-01T00:00:00+00:00",
        path=Path("nowhere"),
    )


def test_table_1_keeps_corpora_and_budgets_apart(tmp_path):
    paper = {"name": "paper", "steps": 25000, "paper_steps": 25000, "batch_size": 256}
    short = paper | {"name": "short", "steps": 1500}
    records = [
        made_up("rodimus", paper, "wikitext-103", params=46681856, test_ppl=21.875),
        made_up("rodimus_plus", short, "enwiki-25k", params=48454400, test_ppl=57.0625),
    ]
    paths = {path.suffix: path.read_text() for path in write(table1(records, PaperResults()), tmp_path, "table1")}
    rows = list(csv.DictReader(paths[".csv"].splitlines()))
    own = next(row for row in rows if row["Model"] == "rodimus")
    plus = next(row for row in rows if row["Model"] == "rodimus+")
    missing = next(row for row in rows if row["Model"] == "mamba")
    assert own["Test PPL (paper)"] == "21.90"
    assert [name for name, value in own.items() if value == "21.875"] != []
    assert "57.0625" in plus.values()
    assert not [name for name, value in own.items() if "enwiki" in name and value], "a stand-in's column took this run"
    assert "21.875" not in plus.values()
    assert {value for name, value in missing.items() if "(paper)" not in name and name != "Model"} == {""}
    assert "enwiki-25k standing in for wikitext-103" in paths[".md"]
    assert "1,500 of 25,000 steps" in paths[".md"]
    assert "rodimus-01234567" in paths[".md"]


def test_table_1_without_runs_is_the_papers(tmp_path):
    text = (write(table1([], PaperResults()), tmp_path, "table1")[0]).read_text()
    assert "| rodimus | 46.68 |" in text
    assert "measured" not in text


def test_the_committed_table_is_that_of_the_committed_runs(tmp_path):
    table = table1(load_records(RESULTS / "runs", experiment="wikitext103"), PaperResults())
    for path in write(table, tmp_path, "table1"):
        assert path.read_bytes() == (RESULTS / "tables" / path.name).read_bytes(), (
            f"run rodimus-lab report: {path.name}"
        )


def test_a_smoke_run_from_the_command_line(smoke_run):
    """Minutes on a CPU, of which these are the first seconds."""
    code, out, err = smoke_run.result
    assert (code, err) == (0, "")
    assert out.startswith("budget: smoke (as asked)\n")
    assert "corpus pydoc, smoke budget 4 steps, batch 8, cpu" in out
    run = RunDir(smoke_run.root / "runs", "wikitext103", smoke_run.id)
    record = json.loads((run.path / "record.json").read_text())
    assert (record["corpus"], record["budget"]["name"], record["metrics"]["steps"]) == ("pydoc", "smoke", 4)
    assert 1000 < record["metrics"]["test_ppl"] < 4096
    losses = [line["loss"] for line in run.read_metrics() if "loss" in line]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


def test_the_smoke_table_names_its_stand_in(finished_smoke_run):
    text = (finished_smoke_run.root / "tables" / "table1.md").read_text()
    assert "pydoc standing in for wikitext-103, pydoc-4096 tokens, smoke budget 4 steps, batch 8" in text
    assert f"run {finished_smoke_run.id}" in text
