"""Scaling laws: the settings of Tables 8 and 9, the ladders, FLOPs against the paper's figure, laws found again."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from experiments.figure04 import NAMES, figure04, figure04_fit, flops_at, flops_of, quoted, table6, table8, table9
from experiments.scaling_laws import FOUR, LADDER, RATIO, parameters, pile, scaling_laws
from rodimus_lab.errors import UserError
from rodimus_lab.nn.zoo import model_config
from rodimus_lab.recipe import Recipe
from rodimus_lab.records import Record
from rodimus_lab.registry import load_plugins
from rodimus_lab.report import FIGURES, PaperResults, to_markdown

load_plugins()
PAPER = PaperResults()
H200_FLOPS = 250e12  # about a quarter of an H200's peak: what 46 M parameters reach (docs/benchmarks.md), less a fifth


def settings(recipe: Recipe) -> dict[str, float]:
    return {
        "steps": recipe.budget.steps,
        "peak_lr": recipe.optimizer.lr,
        "d_model": recipe.model.d_model,
        "batch_m_tokens": recipe.budget.batch_size * recipe.data.seq_len / 1e6,
        "tokens_b": recipe.budget.steps * recipe.budget.batch_size * recipe.data.seq_len / 1e9,
    }


@pytest.mark.parametrize("model", FOUR)
def test_the_paper_budget_is_table_8(model):
    recipes = scaling_laws(model, budget="paper")
    assert [recipe.label.rpartition("-")[2] for recipe in recipes] == list(NAMES)
    for recipe, row in zip(recipes, PAPER.table(8), strict=True):
        for name, value in settings(recipe).items():
            assert value == pytest.approx(float(str(row[name])), rel=0.05 if "tokens" in name else 1e-9), name
        doubled = 2 if model in ("rodimus", "mamba2") else 1
        assert len(recipe.model.blocks) == doubled * int(float(str(row["n_layers"])))
        assert (recipe.data.tokenizer, recipe.model.vocab_size, recipe.data.seq_len) == ("gpt-neox", 50277, 2048)
        assert recipe.budget.fraction == 1
        corpus, _, tokens = recipe.data.corpus.partition(":")
        assert corpus == "pile"
        assert float(tokens.removesuffix("b")) == pytest.approx(settings(recipe)["tokens_b"], rel=0.04)
        assert float(tokens.removesuffix("b")) > settings(recipe)["tokens_b"], "a run would read tokens twice"


def test_table_9_is_a_setting_of_rodimus_alone():
    recipes = scaling_laws(budget="paper", table="9")
    assert len(recipes) == 6
    rows = {"130m": "0.13", "460m": "0.46", "1.4b": "1.4", "1.6b": "1.4"}
    printed = {str(row["params_b"]): row for row in PAPER.table(9)}
    for recipe in recipes:
        row = printed[rows[recipe.label.rpartition("-")[2]]]
        assert recipe.optimizer.lr == float(str(row["peak_lr"]))
        assert recipe.schedule.min_lr == float(str(row["min_lr"]))
        assert f"{settings(recipe)['batch_m_tokens']:.1f}" in (str(row["batch_m_tokens"]), "1.6")
    tokens = {recipe.label: round(settings(recipe)["tokens_b"]) for recipe in recipes}
    assert tokens["rodimus-130m"] == 100
    assert (tokens["rodimus-460m"], tokens["rodimus-1.4b"], tokens["rodimus_plus-1.6b"]) == (150, 500, 1000)
    with pytest.raises(UserError, match="Table 9 has no mamba2"):
        scaling_laws("mamba2", table="9", budget="paper")


@pytest.mark.parametrize("model", FOUR)
def test_the_short_ladder_holds_its_ratio_and_its_half_hour(model):
    recipes = scaling_laws(model, budget="short", corpus="enwiki-25k")
    sizes = [parameters(recipe.model) for recipe in recipes]
    assert len(recipes) >= 5
    assert sizes == sorted(sizes)
    assert 0.7e6 < sizes[0] < 1.5e6
    assert 45e6 < sizes[-1] < 62e6
    seconds = 0.0
    for recipe, size in zip(recipes, sizes, strict=True):
        tokens = recipe.budget.steps * recipe.budget.batch_size * recipe.data.seq_len
        assert tokens / size == pytest.approx(RATIO, rel=0.01)
        assert recipe.data.corpus == "enwiki-25k"
        seconds += tokens * recipe.model.training_flops_per_token(2048) / H200_FLOPS
    assert seconds < 1800


def test_table_6_is_the_350m_of_table_8():
    names = [str(row["model"]) for row in PAPER.table(6)]
    recipes = pile(budget="paper")
    assert sorted(r.label for r in recipes) == sorted(
        f"{n.replace('++', '_pp').replace('+', '_plus')}-350m" for n in names
    )
    scaled = {recipe.id for recipe in scaling_laws(size="350m", budget="paper")}
    assert scaled <= {recipe.id for recipe in recipes}
    (check,) = pile("rodimus", budget="short", steps=100, corpus="enwiki-25k")
    assert (check.experiment, check.budget.name, check.budget.steps, check.budget.batch_size) == (
        "pile",
        "short",
        100,
        256,
    )
    with pytest.raises(UserError, match="13,501 is more than the paper's 13,500"):
        pile("rodimus", budget="short", steps=13_501)
    assert all(recipe.budget.steps == 100 and recipe.data.corpus == "pydoc" for recipe in pile(budget="smoke"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ratio": 4.0, "budget": "paper"}, "--ratio belongs to the short and smoke"),
        ({"table": "9", "budget": "short"}, "--table 9 has no shorter form"),
        ({"size": "125m", "budget": "short"}, "--size: '125m' is not trained at this budget; give one of 1m, 4m"),
        ({"size": "2b", "budget": "paper"}, "give one of 125m, 350m, 760m, 1.3b"),
    ],
)
def test_options_that_do_not_go_together_are_told(options, told):
    with pytest.raises(UserError, match=told):
        scaling_laws(**options)


def test_flops_by_the_papers_rule_are_those_of_its_figure():
    """Points are read by eye to about 1 %; Mamba2's have the term that the rule lacks (reference: its 3.65e13)."""
    for (model, size), (flops, _) in quoted(PAPER).items():
        assert flops_at(model, size, "paper") == pytest.approx(flops, rel=0.045 if model == "mamba2" else 0.026)
        assert flops_at(model, size, "true") < flops_at(model, size, "paper")


def test_true_flops_are_three_forward_passes():
    config = model_config("transformer++", size="125m")
    by_hand = 3 * sum(config.flops_per_token(t) for t in range(1, 2049)) * 256 * 4800
    assert flops_at("transformer++", "125m", "true") == pytest.approx(by_hand)


def made_up(recipe: Recipe, ppl: float) -> Record:
    return Record(
        experiment=recipe.experiment, id=recipe.id, label=recipe.label, recipe=recipe.to_dict(), env={},
        metrics={"valid_ppl": ppl, "steps": recipe.budget.steps, "params": recipe.model.num_params()},
        corpus=recipe.data.corpus, tokenizer=recipe.data.tokenizer, budget=recipe.budget.to_dict(),
        device="made-up device", commit="0" * 40, finished="2026-01-01T00:00:00+00:00", path=Path("nowhere"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def ladder() -> list[Record]:
    """Runs of two models whose loss is an exact law of true FLOPs, one of another corpus and one of another ratio."""
    records = []
    for model, exponent in (("rodimus", 0.07), ("transformer++", 0.05)):
        for recipe in scaling_laws(model, budget="short", corpus="enwiki-25k"):
            flops = flops_of(made_up(recipe, 1.0), "true")
            records.append(made_up(recipe, math.exp(40 * flops**-exponent)))
    records.append(made_up(scaling_laws("rodimus", size="1m", budget="short")[0], 99.0))
    records.append(made_up(scaling_laws("rodimus", size="1m", ratio=4, budget="short", corpus="enwiki-25k")[0], 88.0))
    return records


def test_the_law_that_was_put_in_is_found(ladder):
    text = to_markdown(figure04_fit(ladder, PAPER))
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    mine = {(row[1], row[2]): " ".join(row) for row in rows[2:]}
    assert "0.0700 to 0.0700" in mine["rodimus", "truly"]
    assert "0.0500 to 0.0500" in mine["transformer++", "truly"]
    assert "0.0700 to 0.0700" not in mine["rodimus", "the paper's rule"]
    assert f"{40 * 1e18**-0.07:.3f}" in mine["rodimus", "truly"]
    assert mine["mamba2", "truly"].endswith("— — — ")
    assert "enwiki-25k standing in for the Pile, gpt-neox tokens, short budget, 8 tokens a parameter" in text


def test_corpora_and_ratios_have_columns_of_their_own(ladder):
    table = figure04(ladder, PAPER)
    measured = [header for header in table.headers if header.startswith("Valid PPL (")]
    assert len(measured) == 3
    text = to_markdown(table)
    assert "4 tokens a parameter" in text
    assert "| rodimus | 57m |" in text


def test_rungs_of_few_steps_stand_with_the_others_of_their_ladder():
    runs = [
        made_up(recipe, 9.0)
        for recipe in (*scaling_laws("rodimus", budget="smoke"), *scaling_laws("transformer++", budget="smoke"))
    ]
    measured = [header for header in figure04(runs, PAPER).headers if header.startswith("Valid PPL (")]
    assert len(measured) == 1


def test_the_figures_have_their_bands_and_say_what_was_not_run(ladder):
    figure = FIGURES["figure04-short-true"](ladder, PAPER)
    assert [band.name for band in figure.bands] == ["rodimus", "transformer++"]
    assert all(low <= y <= high for b in figure.bands for low, y, high in zip(b.lows, b.ys, b.highs, strict=True))
    assert {name for name, _ in figure.missing} == {"rodimus+", "mamba2"}
    assert len(figure.lines[0].xs) == len(LADDER)
    assert "enwiki-25k" in figure.title
    whole = FIGURES["figure04"](ladder, PAPER)
    assert not whole.bands
    assert all(line.quoted for line in whole.lines), "a short run stands among the paper's"


def test_tables_without_runs_say_so():
    for make in (figure04, table8, table9):
        assert "not run" in to_markdown(make([], PAPER))
    assert "5.88" in to_markdown(table6([], PAPER))


def test_tables_6_8_and_9_take_their_own_runs():
    (mamba,) = pile("mamba", budget="paper")
    (nine,) = scaling_laws("rodimus", size="460m", table="9", budget="paper")
    (eight,) = scaling_laws("rodimus", size="125m", budget="paper")
    records = [made_up(mamba, 6.25), made_up(nine, 9.125), made_up(eight, 7.375)]
    six, eighth, ninth = (to_markdown(make(records, PAPER)) for make in (table6, table8, table9))
    assert [value in six for value in ("6.25", "9.12", "7.38")] == [True, False, False]
    assert [value in eighth for value in ("6.25", "9.12", "7.38")] == [False, False, True]
    assert [value in ninth for value in ("6.25", "9.12", "7.38")] == [False, True, False]
    assert "pile:7.1b standing in for the Pile" in six


def test_a_smoke_ladder_from_the_command_line(cli, places, texts):
    code, out, err = cli(
        "scaling-laws", "--model", "rodimus", "--size", "s1", "--ratio", "0.1", "--budget", "smoke", "--corpus", texts
    )
    assert code == 0, err
    assert "figure04-fit" in out
    assert "s1" in (places / "tables" / "figure04.md").read_text()
    code, _, err = cli("scaling-laws", "--size", "57m", "--budget", "smoke")
    assert code == 2
    assert "give one of s1, s2, s3" in err
    code, _, err = cli("scaling-laws", "--ratio", "1e305", "--budget", "short", "--dry-run")
    assert code == 2
    assert "--ratio: input should be less than or equal to 1000000" in err
