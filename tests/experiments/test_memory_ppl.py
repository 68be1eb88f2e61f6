"""Figure 1a and Table 7: caches read off real states are the printed ones, and runs land on their points."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from experiments.memory_ppl import FIGURE_1A, cache_bytes, draw_figure_1a, points
from rodimus_lab.experiment import EXPERIMENTS
from rodimus_lab.records import PROJECT_ROOT, load_records
from rodimus_lab.registry import load_plugins
from rodimus_lab.report import PaperResults, Printed

load_plugins()

RESULTS = PROJECT_ROOT / "results"


def test_figure_1as_axis_is_elements_and_not_bytes() -> None:
    """Real bytes are twice what the axis says, but for a window of 512 with its sinks in a context of 512."""
    seen = set()
    for row in PaperResults().figure("01a"):
        size = row["expansion"] or row["window"]
        assert isinstance(size, Printed)
        assert isinstance(row["cache_m_elements"], Printed)
        variant = points("figure1a")[str(row["model"]), size.text]
        held = cache_bytes(variant.config(smoke=False), 512) / 1e6
        if (row["model"], size.text) != ("streaming_llm", "512"):
            assert held == pytest.approx(2 * row["cache_m_elements"], abs=1.1e-3), row
        seen.add((row["model"], size.text))
    assert seen == set(points("figure1a"))


def test_table_7s_bytes_are_bytes() -> None:
    printed = {(str(row["model"]), str(getattr(row["cache_mb"], "text", ""))) for row in PaperResults().table(7)}
    assert printed == set(points("table7"))
    for (_, megabytes), variant in points("table7").items():
        held = cache_bytes(variant.config(smoke=False), 2048) / 1e6
        assert int(held * 10) / 10 == pytest.approx(float(megabytes), abs=0.11)
        assert held in (1.179648, 2.359296, 4.718592, 9.437184)


def test_the_parameters_of_gla_and_hgrn2_stay() -> None:
    for model in ("gla", "hgrn2"):
        counts = [points("figure1a")[model, str(n)].config(smoke=False).num_params() for n in FIGURE_1A[model]]
        assert max(counts) - min(counts) < 4000


def test_points_at_a_models_own_size_are_table_1s() -> None:
    recipes = EXPERIMENTS["memory-ppl"].recipes(budget="paper")
    assert len(recipes) == 35
    own = [recipe for recipe in recipes if recipe.experiment == "wikitext103"]
    assert [recipe.label for recipe in own] == ["rodimus", "rodimus_plus", "mamba", "mamba2", "hgrn2", "gla"]
    for recipe in own:
        assert [recipe] == list(EXPERIMENTS["wikitext103"].recipes(model=recipe.label, budget="paper"))


def test_table_7_is_trained_as_table_8_says() -> None:
    for recipe in EXPERIMENTS["memory-ppl"].recipes(artefact="table7", budget="paper"):
        trained = (recipe.budget.steps, recipe.budget.batch_size * recipe.data.seq_len, recipe.optimizer.lr)
        assert trained == (4800, 2**19, 6e-4)


@pytest.mark.parametrize("model", FIGURE_1A)
def test_the_ends_of_every_line_can_be_built_small(model: str) -> None:
    for amount in (FIGURE_1A[model][0], FIGURE_1A[model][-1]):
        config = points("figure1a")[model, str(amount)].config(smoke=True)
        assert sum(p.numel() for p in config.build().parameters()) == config.num_params()


def test_from_the_command_line_to_the_figure(cli, places, texts) -> None:
    command = ("memory-ppl", "--model", "rodimus", "--amount", "16,64", "--budget", "smoke", "--steps", 2)
    command += ("--corpus", texts)
    done = cli(*command, "--device", "cpu", "--serial")
    assert done.code == 0, done.err
    ids = [one["id"] for one in json.loads(cli(*command, "--dry-run", "--json").out)]
    text = (places / "tables" / "figure01a.md").read_text()
    assert all(name in text for name in ids)
    paper, measured = draw_figure_1a(load_records(places / "runs"), PaperResults()).parts
    assert len(paper.rows()) == 36
    small, large = (row[1] for row in measured.rows()[1:])
    assert large == 4 * small == 4 * 16 * 256 * 4 * 2


def test_seeds_of_one_point_are_drawn_as_their_mean_with_a_band() -> None:
    runs = load_records(RESULTS / "runs", "wikitext103")
    (first,) = (record for record in runs if record.id == "rodimus-b6357da5")
    ppl = first.metrics["best_valid_ppl"]
    again = replace(
        first,
        id="rodimus-00000002",
        recipe=first.recipe | {"seed": 1},
        metrics=first.metrics | {"best_valid_ppl": ppl + 2},
    )
    _, measured = draw_figure_1a([first, again], PaperResults()).parts
    (line,) = measured.lines
    assert (line.ys, line.stds) == ([pytest.approx(ppl + 1)], [pytest.approx(2**0.5)])
    assert line.told()[0][0] == "rodimus-b6357da5; rodimus-00000002"
    assert "rodimus-b6357da5, rodimus-00000002: enwiki-25k standing in for wikitext-103, " in measured.note
    assert "bars: one standard deviation over seeds" in measured.note


def test_without_runs_figure_1a_says_so() -> None:
    paper, ours = draw_figure_1a([], PaperResults()).parts
    assert (len(paper.lines), ours.lines) == (len(FIGURE_1A), [])
    assert ours.note == f"not run: {', '.join(FIGURE_1A)} (rodimus-lab memory-ppl --budget paper)"
