"""Figures 6 and 1b: tables and pictures say of which runs they are, what is missing, and who is ahead of whom."""

from __future__ import annotations

from dataclasses import replace

from recall_fakes import record, runs

from experiments.figure06 import draw_figure_1b, figure01b, figure06
from experiments.mqar import mqar
from rodimus_lab.report import FIGURES, PaperResults, to_markdown
from rodimus_lab.report.figure import figure_csv

PAPER = PaperResults()


def test_the_tables_say_what_is_missing_and_what_became_of_the_papers_order():
    found = runs([0.1, 0.5, 0.9, 0.2], model="rodimus", length=128, width=64)
    found += runs([0.1, 0.5, 0.2, 0.94], model="rwkv6", length=128, width=64)
    found += runs([0.1, 0.5, 0.2, 0.89], model="mamba", length=128, width=64)
    found += runs([0.1, 0.5, 0.2, 0.89], model="mamba2", length=128, width=64)[:3]
    text = to_markdown(figure06(found, PAPER))
    assert "ahead: rwkv6 (128 tokens) at 64; behind: none; level: mamba (128 tokens) at 64." in text
    assert "15 of the figure's 336 runs. Not all of 4 learning rates yet" in text
    assert "the best may become better: mamba2 (128 tokens) at 64." in text
    assert "rodimus-lab mqar --figure 6 --budget paper runs what is missing" in text
    assert "paper budget #1" in text
    found = runs([0.3, 0.6, 0.2], figure="1b", model="rodimus", expansion=64)
    text = to_markdown(figure01b(found, PAPER))
    assert "whether its order holds is not known" in text
    found += runs([0.3, 0.7, 0.2], figure="1b", model="mamba2", expansion=64)
    text = to_markdown(figure01b(found, PAPER))
    assert "0 of 1 pairs of rows stand as in the paper; (rodimus 64) is not above (mamba2 64)" in text
    assert "6 of the figure's 60 runs." in text
    text = to_markdown(figure01b(found[:-1], PAPER))
    assert "have all their runs at one setting, so whether its order holds is not known" in text, (
        "the rate that mamba2 lacks may raise it"
    )


def test_models_that_figure_6_has_not_are_none_of_its_runs():
    found = runs([0.1, 0.5, 0.9, 0.2], model="rodimus", length=128, width=64)
    found += runs([0.1, 0.5, 0.9, 0.2] * 4, model="gla", length=128)
    text = to_markdown(figure06(found, PAPER))
    assert "bf16: 4 of the figure's 336 runs." in text
    assert "gla" not in text


def test_the_best_is_told_within_a_length():
    found = runs([0.9, 0.1, 0.1, 0.1], model="rodimus", length=128, width=64)
    found += runs([0.4, 0.1, 0.1, 0.1], model="rodimus", length=512, width=64)
    found += runs([0.3, 0.1, 0.1, 0.1], model="mamba", length=512, width=64)
    text = to_markdown(figure06(found, PAPER))
    assert "**40.0**" in text
    assert "**90.0**" not in text


def test_a_setting_of_few_points_is_told_below_the_table():
    found = runs([0.1, 0.5, 0.9, 0.2] * 12, model="rodimus")
    (one,) = (recipe for recipe in mqar("6", model="rodimus", length=128, width=64, lr=1e-2, budget="short"))
    few = record(one, 0.4)
    text = to_markdown(figure06([*found, few], PAPER))
    assert "(mqar, paper budget" in text
    assert "(mqar, short" not in text
    assert f"rodimus (128 tokens) at 64 40.0% at 0.01, the best of 1 of 4 rates ({few.id})." in text
    assert "(mqar, short" in to_markdown(figure06([found[0], few], PAPER))


def test_figure_1b_has_the_papers_points_and_ours():
    found = runs([0.3, 0.6, 0.2], figure="1b", model="rodimus", expansion=64)
    figure = draw_figure_1b(found, PAPER)
    csv = figure_csv(figure)
    assert 'rodimus,64.0,0.65,"paper, read by eye"' in csv
    assert f"rodimus,64,0.6,{found[1].id} at rate 0.003162,{found[1].corpus}," in csv
    assert "rodimus,128,,not run" in csv
    assert figure.note.startswith(
        f"dashed and pale: the paper's, read by eye; {found[1].id}: {found[1].corpus}, paper budget "
    )
    assert figure.note.endswith(
        f"{found[1].device}; not run: rodimus at 16, 32, 128, 256, rodimus+, mamba2, mamba "
        "(rodimus-lab mqar --figure 1b --budget paper); bfloat16 over float32 weights"
    )
    text = to_markdown(figure01b(found, PAPER))
    assert "read by eye (paper)" in text
    assert "60.0" in text


def test_a_panel_of_figure_6_shows_runs_of_one_budget_and_precision():
    make = FIGURES["figure06-128"]
    short = [record(r, 0.7) for r in mqar("6", model="rodimus", length=128, width=64, budget="short")]
    tf32 = [record(r, 0.8) for r in mqar("6", model="rodimus", length=128, width=64, budget="paper", precision="tf32")]
    full = runs([0.1, 0.5, 0.9, 0.2], model="rodimus", length=128, width=64)
    panel = make(full, PAPER)
    (line,) = panel.lines
    assert (line.name, list(line.xs), list(line.ys)) == ("rodimus", [64], [0.9])
    assert panel.note.endswith("; bfloat16 over float32 weights")
    assert list(make([*short, *full], PAPER).lines[0].ys) == [0.9]
    assert list(make([*tf32[:2], *full], PAPER).lines[0].ys) == [0.9]
    assert list(make([*tf32, *full[:3]], PAPER).lines[0].ys) == [0.8]
    panel = make(full[:2], PAPER)
    assert panel.lines == []
    assert "not run: rodimus at 128, 256, 512, rodimus+, mamba" in panel.note
    assert "; not drawn before all its runs are there: rodimus at 64; " in panel.note
    assert "rodimus,64,,some runs are missing" in figure_csv(panel)
    panel = make(runs([0.1, 0.995, 0.2, 0.2], model="rodimus", length=128, width=64)[:2], PAPER)
    assert list(panel.lines[0].ys) == [0.995]
    assert panel.note.endswith("; not all of 4 learning rates yet: rodimus at 64")
    panel = make(short, PAPER)
    assert list(panel.lines[0].ys) == [0.7]
    assert ": mqar-128x8, short budget 1,568 of 12,544 steps, batch 512" in panel.note
    assert FIGURES["figure06-256"](full, PAPER).lines == []


def test_every_rate_is_drawn_by_itself():
    found = runs([0.1, 0.5, 0.9, 0.2], model="rodimus", length=128, width=64)
    found += runs([0.3, 0.4, 0.6, 0.7], model="mamba", length=128, width=512)[1:]
    drawn = FIGURES["figure06-rates"](found, PAPER)
    assert list(drawn) == ["128"]
    narrow, *_, wide = drawn["128"].parts
    assert [(line.name, *line.xs, *line.ys) for line in narrow.lines] == [
        ("rodimus", 1e-4, 4.642e-4, 2.154e-3, 1e-2, 0.1, 0.5, 0.9, 0.2)
    ]
    assert [(line.name, *line.xs, *line.ys) for line in wide.lines] == [
        ("mamba", 4.642e-4, 2.154e-3, 1e-2, 0.4, 0.6, 0.7)
    ]
    assert ("mamba", 1e-4) in wide.missing
    csv = figure_csv(drawn["128"])
    assert f"Width 64,rodimus,0.002154,0.9,{found[2].id},{found[2].corpus}," in csv
    assert "Width 512,mamba,0.0001,,not run" in csv


def test_steps_are_those_of_the_soonest_rate():
    accuracies, steps = [0.995, 0.992, 0.999, 0.5], [900, 700, 800, 100]
    found = runs(accuracies, model="rodimus", length=128, width=64)
    found = [replace(run, metrics=run.metrics | {"steps": count}) for run, count in zip(found, steps, strict=True)]
    found += runs([0.1, 0.5, 0.9, 0.2], model="mamba", length=128, width=64)
    figure = FIGURES["figure06-steps"](found, PAPER)["128"]
    assert [(line.name, *line.xs, *line.ys) for line in figure.lines] == [("rodimus", 64, 700)]
    assert f"rodimus,64,700,{found[1].id} at rate 0.0004642," in figure_csv(figure)
    assert "not run: rodimus at 128, 256, 512, rodimus+," in figure.note
    assert figure.note.endswith("; never, at any rate: mamba at 64")
