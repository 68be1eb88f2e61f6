"""Figures 6 and 1b: the runs are the paper's and Zoology's, points are the best of their rates, and a small Rodimus
learns the task while one without what it takes does not."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from recall_fakes import record, runs

from experiments.figure06 import figure06
from experiments.mqar import architecture, contested, gpu_hours, mqar, run_all
from rodimus_lab.data.mqar import single
from rodimus_lab.errors import UserError
from rodimus_lab.nn.zoo import with_sublayers
from rodimus_lab.recipe import Recipe
from rodimus_lab.records import RunDir, load_records
from rodimus_lab.report import PaperResults, to_markdown
from rodimus_lab.report.recall import FIGURE_1B, FIGURE_6, best_points
from rodimus_lab.train import TrainOptions, train

PAPER = PaperResults()


def test_figure_6_is_d_7_and_zoology():
    recipes = mqar(budget="paper")
    assert len({recipe.id for recipe in recipes}) == len(recipes) == 7 * 3 * 4 * 4
    for recipe in recipes:
        data, optimizer, budget = recipe.data, recipe.optimizer, recipe.budget
        assert {128: 8, 256: 16, 512: 32}[data.seq_len] == data.test.num_pairs
        assert (data.num_train, data.test.num_examples, data.vocab_size) == (100_000, 3_000, 8192)
        assert recipe.model.d_model in (64, 128, 256, 512)
        assert len(recipe.model.blocks) == 2
        assert recipe.model.tie_embeddings
        assert budget.batch_size == {128: 512, 256: 256, 512: 128}[data.seq_len]
        assert (
            budget.steps == budget.paper_steps == 64 * math.ceil(100_000 / budget.batch_size) == 64 * budget.eval_every
        )
        assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.clip_norm) == (
            0.9,
            0.999,
            0.1,
            None,
        )
        assert (recipe.schedule.kind, recipe.precision, recipe.seed) == ("cosine_by_epoch", "bf16", 123)
    rates = sorted({recipe.optimizer.lr for recipe in recipes})
    assert [math.log10(rate) for rate in rates] == pytest.approx([-4, -3.3, -2.7, -2], abs=0.05)


def test_figure_1b_is_d_7():
    recipes = mqar("1b", budget="paper")
    assert len({recipe.id for recipe in recipes}) == len(recipes) == 4 * 5 * 3
    assert {(r.data.seq_len, r.data.test.num_pairs, r.model.d_model) for r in recipes} == {(1024, 256, 256)}
    assert {r.budget.steps // r.budget.eval_every for r in recipes} == {32}
    rates = sorted({recipe.optimizer.lr for recipe in recipes})
    assert [math.log10(rate) for rate in rates] == pytest.approx([-3.5, -2.5, -2], abs=1e-3)


@pytest.mark.parametrize("model", FIGURE_6.models)
def test_every_model_of_figure_6_runs(model):
    config = architecture(model, single(128, 8), 64)
    loss = config.build().loss(
        torch.randint(8192, (2, 128)), torch.randint(8192, (2, 3)), positions_BP=torch.ones(2, 3).long()
    )
    assert loss.item() == pytest.approx(math.log(8192), rel=0.1)


@pytest.mark.parametrize("model", FIGURE_1B.models)
def test_an_expansion_is_that_of_the_state(model):
    sizes = [
        architecture(model, single(1024, 256), 256, expansion=n).state_bytes(1, 8, torch.float32) for n in (16, 32, 64)
    ]
    assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0]) > 0


def test_a_short_budget_says_so():
    (recipe,) = mqar("6", model="rodimus", length=128, width=64, lr=1e-3, budget="short")
    assert (recipe.budget.name, recipe.budget.fraction) == ("short", 1 / 8)


def test_a_point_is_its_best_rate_and_keeps_the_others():
    found = runs([0.1, 0.5, 0.9, 0.2], model="rodimus", length=128, width=64)
    ((best,),) = best_points(found).values()
    assert (best.model, best.seq_len, best.num_pairs, best.width, best.expansion) == ("rodimus", 128, 8, 64, 64)
    assert (best.accuracy, best.lr, [run.id for run in best.runs]) == (0.9, 2.154e-3, [found[2].id])
    text = to_markdown(figure06(found, PAPER))
    assert all(run.id in text for run in found)
    assert "not run" in text
    row = next(line for line in text.splitlines() if line.startswith("| rodimus | 128 | 8 | 64 |"))
    for shown in ("90.0", "10.0", "50.0", "20.0", "0.002154"):
        assert shown in row


@pytest.mark.parametrize("accuracy", [None, "0.5", [], 1.7, -3.0])
def test_an_accuracy_that_is_none_is_named(tmp_path, accuracy, monkeypatch):
    recipe, *_ = mqar(budget="paper", model="rodimus", length=128, width=64)
    bad = replace(record(recipe, accuracy), path=tmp_path / recipe.id)
    monkeypatch.setattr("experiments.mqar.load_records", lambda experiment: [bad])
    for read in (lambda: figure06([bad], PAPER), lambda: run_all([recipe], lambda chosen: None)):
        with pytest.raises(UserError, match=f"{tmp_path / recipe.id} is not a whole recall run; restore its files"):
            read()


@pytest.mark.parametrize("part", ["data", "optimizer", "model", "precision", "seed"])
def test_a_recipe_that_lacks_a_part_is_named(tmp_path, part):
    found, *_ = runs([0.5], model="rodimus", length=128, width=64, lr=1e-2)
    del found.recipe[part]
    with pytest.raises(UserError, match="is not a whole recall run"):
        best_points([replace(found, path=tmp_path)])


@pytest.mark.parametrize("changes", [{"eval_every": 0}, {"eval_every": None}, {"batch_size": None}])
def test_a_budget_that_cannot_be_is_named(tmp_path, changes):
    found, *_ = runs([0.5], model="rodimus", length=128, width=64, lr=1e-2)
    with pytest.raises(UserError, match="is not a whole recall run"):
        best_points([replace(found, path=tmp_path, budget=found.budget | changes)])


def test_three_seeds_where_models_are_close():
    near = runs([0.1, 0.5, 0.90, 0.2], model="rodimus", length=128, width=64)
    near += runs([0.1, 0.88, 0.3, 0.2], model="mamba", length=128, width=64)
    far = runs([0.1, 0.2, 0.3, 0.4], model="rwkv4", length=128, width=64)
    elsewhere = runs([0.1, 0.2, 0.3, 0.9], model="mamba2", length=128, width=128)
    again = contested([*near, *far, *elsewhere])
    assert [(r.label, r.optimizer.lr, r.seed) for r in again] == [
        ("mamba", 4.642e-4, 124),
        ("mamba", 4.642e-4, 125),
        ("rodimus", 2.154e-3, 124),
        ("rodimus", 2.154e-3, 125),
    ]
    text = to_markdown(figure06([*near, record(again[2], 0.92), record(again[3], 0.94)], PAPER))
    assert "92.0 ± 2.0 (3 seeds)" in text
    done = runs([0.1, 0.995, 0.1, 0.1], model="rodimus", length=128, width=64)
    done += runs([0.1, 0.1, 0.1, 0.992], model="mamba", length=128, width=64)
    assert contested(done) == []


def test_the_contested_are_run_after_the_others(monkeypatch):
    recipes = list(mqar("6", model="rodimus", length=128, width=64, budget="paper"))
    recipes += mqar("6", model="mamba", length=128, width=64, budget="paper")
    monkeypatch.setattr("experiments.mqar.load_records", lambda experiment: [record(r, 0.5) for r in recipes])
    asked: list[list[Recipe]] = []
    run_all(recipes, lambda chosen: asked.append(list(chosen)))
    assert asked[0] == recipes
    assert {(r.label, r.seed) for r in asked[1]} == {(m, s) for m in ("rodimus", "mamba") for s in (124, 125)}


def test_points_that_lack_a_rate_get_no_more_seeds(monkeypatch):
    """The rate that is missing may be the best one; above 99 % it does not matter."""
    recipes = list(mqar("6", model="rodimus", length=128, width=64, budget="paper"))
    recipes += mqar("6", model="mamba", length=128, width=64, budget="paper")
    asked: list[list[Recipe]] = []
    for accuracies, more in (([0.5] * 7, 0), ([*[0.5] * 3, 0.98, 0.995, *[0.5] * 2], 4)):
        found = [record(recipe, accuracy) for recipe, accuracy in zip(recipes, accuracies, strict=False)]
        monkeypatch.setattr("experiments.mqar.load_records", lambda experiment, found=found: found)
        asked.clear()
        run_all(recipes, lambda chosen: asked.append(list(chosen)))
        assert len(asked[1]) == more
    bare = replace(found[0], metrics={})  # As a record that was meddled with.
    monkeypatch.setattr("experiments.mqar.load_records", lambda experiment: [bare])
    run_all(recipes, lambda chosen: asked.append(list(chosen)))
    assert asked[-1] == []


def test_hours_are_those_of_the_timed_steps():
    narrow, wide = (mqar("6", model="mamba2", length=128, width=d, lr=1e-2, budget="paper")[0] for d in (64, 512))
    assert gpu_hours(narrow) == pytest.approx(12_544 * 3.31e-3 / 3600)
    assert gpu_hours(wide) == pytest.approx(12_544 * 13.94e-3 / 3600)
    (between,) = mqar("6", model="mamba2", length=128, width=256, lr=1e-2, budget="short")
    assert gpu_hours(narrow) < 8 * gpu_hours(between) < gpu_hours(wide)
    (longer,) = mqar("6", model="mamba2", length=512, width=64, lr=1e-2, budget="paper")
    assert gpu_hours(longer) == pytest.approx(4 * gpu_hours(narrow), rel=0.02)
    few, many = (mqar("1b", model="rodimus", expansion=n, lr=1e-2, budget="paper")[0] for n in (16, 256))
    assert gpu_hours(few) < gpu_hours(many) < 3 * gpu_hours(few)
    assert gpu_hours(mqar(budget="smoke")[0]) is None
    assert gpu_hours(mqar("6", model="gla", length=128, width=64, budget="paper")[0]) is None


def test_a_dry_run_has_hours_and_what_follows(cli, places, monkeypatch):
    command = ("mqar", "--model", "rodimus", "--model", "mamba", "--length", 128, "--width", 64, "--budget", "paper")
    listed = json.loads(cli(*command, "--dry-run", "--json").out)
    assert len(listed) == 8
    assert all((one["device"], one["measured"]) == ("NVIDIA H200", "docs/benchmarks.md") for one in listed)
    text = cli(*command, "--dry-run").out
    assert "8 of 8 runs to train; 0.07 h for 8 of them" in text
    assert "a run that has learnt enough ends sooner" in text
    recipes = [r for m in ("rodimus", "mamba") for r in mqar("6", model=m, length=128, width=64, budget="paper")]
    monkeypatch.setattr("experiments.mqar.load_records", lambda experiment: [record(r, 0.5) for r in recipes])
    text = cli(*command, "--dry-run").out
    assert "12 of 12 runs to train" in text
    assert "the last 4 follow from the results so far" in text


def test_the_smoke_budget_says_what_it_does_not_do():
    for option in ({"figure": "1b"}, {"length": 128}, {"width": 64}, {"expansion": 16}):
        (name,) = option
        with pytest.raises(UserError, match=f"--{name} .* would change nothing"):
            mqar(budget="smoke", **option)


def test_the_command_trains_and_reports(cli, places, monkeypatch):
    monkeypatch.setattr("experiments.mqar.SMOKE_EXAMPLES", 64)
    result = cli("mqar", "--budget", "smoke", "--device", "cpu")
    assert result.code == 0, result
    assert "test accuracy" in result.out
    (run,) = load_records(experiment="mqar")
    assert run.corpus == "mqar-64x4"
    assert (places / "tables" / "figure06.md").is_file()
    again = cli("mqar", "--budget", "smoke", "--device", "cpu")
    assert (again.code, len(load_records(experiment="mqar"))) == (0, 1)
    assert "is finished" in again.out


@pytest.mark.slow
def test_a_small_rodimus_recalls_and_one_layer_without_convolution_does_not(tmp_path):
    """The smoke run, and its first epoch with one layer that sees no neighbour: it cannot bind a value to its key."""
    (recipe,) = mqar(budget="smoke")
    one = recipe.replace(
        model=with_sublayers(recipe.model.replace(pattern=recipe.model.blocks[:1]), "rodimus", {"conv_width": 0}),
        label="one_layer",
        budget=recipe.budget.replace(steps=recipe.budget.eval_every // 2, eval_every=recipe.budget.eval_every // 2),
    )
    options = TrainOptions(device="cpu", progress=False, runs_root=tmp_path / "r", checkpoints_root=tmp_path / "c")
    assert train(recipe, options)["metrics"]["test_accuracy"] > 0.95
    assert train(one, options)["metrics"]["test_accuracy"] < 0.5
    evaluations = RunDir(tmp_path / "r", "mqar", recipe.id).read_metrics()
    assert next(line["test_accuracy"] for line in evaluations if "test_accuracy" in line) > 0.7
    losses = [line["loss"] for line in RunDir(tmp_path / "r", "mqar", one.id).read_metrics() if "loss" in line]
    assert losses[-1] < losses[0]  # It does learn what can be learnt without.
