"""Records as frames: what is selected, sorted and compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from committed_runs import copy_three

from rodimus_lab import results
from rodimus_lab.errors import UserError
from rodimus_lab.records import PROJECT_ROOT, load_records

COMMITTED = PROJECT_ROOT / "results" / "runs"
RODIMUS, PLUS = "rodimus-b6357da5", "rodimus_plus-36701bfc"


def with_seed(root: Path, run: str, seed: int, **metrics: float) -> str:
    """A copy of a committed run with another seed and other metrics; its id."""
    id = f"{run.rpartition('-')[0]}-{seed:08x}"
    folder = root / "wikitext103" / id
    shutil.copytree(COMMITTED / "wikitext103" / run, folder)
    for name, change in (("recipe.json", {"seed": seed}), ("record.json", {"id": id})):
        values = json.loads((folder / name).read_text()) | change
        if name == "record.json":
            values["metrics"] |= metrics
        (folder / name).write_text(json.dumps(values))
    return id


@pytest.fixture
def root(tmp_path: Path) -> Path:
    copy_three(tmp_path)
    return tmp_path


def test_a_row_for_each_run(root: Path) -> None:
    frame = results.runs(root, "wikitext103")
    assert list(frame["model"]) == ["rodimus", "rodimus+", "transformer++"]
    assert frame.set_index("id").loc[RODIMUS, "test_ppl"] == 59.483677
    assert (frame["seed"] == 0).all()
    whole = results.runs(root, "wikitext103", recipes=True)
    assert list(whole["recipe.optimizer.lr"]) == [5e-4] * 3
    assert "env.packages.torch" in whole


def test_no_runs_are_no_rows(tmp_path: Path) -> None:
    frame = results.runs(tmp_path)
    assert frame.empty
    assert {"id", "model", "steps"} <= set(frame.columns)


def test_metrics_are_the_lines_that_a_run_logged() -> None:
    logged = results.metrics(RODIMUS, COMMITTED)
    assert logged["step"].max() == 1500
    assert logged["test_ppl"].dropna().iloc[-1] == 59.483677


def test_tables_and_figures_are_read_back(tmp_path: Path, monkeypatch) -> None:
    table = results.table("table1")
    assert "rodimus" in list(table["Model"])
    assert not [name for name in table.columns if name.endswith(": run_id")]
    drawn = results.figure("figure06-128")
    assert {"rodimus", "mamba"} <= set(drawn["name"])
    assert drawn["Accuracy"].dropna().between(0, 1).all()
    monkeypatch.setenv("RODIMUS_LAB_RESULTS", str(tmp_path / "runs"))
    assert results.table("table1").iloc[0, 0] == "not run"
    assert len(results.paper("figure1a")) == 35
    assert "test_ppl" in results.paper("table01")
    with pytest.raises(UserError, match="the paper gives no numbers of a"):
        results.paper("chapter1")


@pytest.mark.parametrize(
    ("where", "models"),
    [
        (["model=rodimus+"], ["rodimus+"]),
        (["label=rodimus_plus"], ["rodimus+"]),
        (["model!=rodimus"], ["rodimus+", "transformer++"]),
        (["test_ppl<60"], ["rodimus", "rodimus+"]),
        (["test_ppl>=59", "test_ppl<60"], ["rodimus"]),
        (["optimizer.lr=5e-4", "repeats=12"], ["rodimus"]),
        (["recipe.optimizer.lr=0.0005", "steps=1500"], ["rodimus", "rodimus+", "transformer++"]),
        (["compile=TRUE", "corpus=enwiki-25k"], ["rodimus", "rodimus+", "transformer++"]),
        (["label=lstm"], []),
    ],
)
def test_conditions(root: Path, where: list[str], models: list[str]) -> None:
    records = load_records(root, "wikitext103")
    assert [results.spelled(record.label) for record in results.select(records, where)] == models


@pytest.mark.parametrize(
    ("where", "sort", "said"),
    [
        (["model"], None, "'model' is no condition; write one such as"),
        (["=3"], None, "'=3' is no condition"),
        (["perplexity=3"], None, "no run has a 'perplexity'"),
        (["test_ppl=sixty"], None, "test_ppl is a number, and 'sixty' is none"),
        ([], "test_pl", "no run has a 'test_pl'.*test_ppl"),
        (["init_max=0.1"], None, "'init_max' may be any of recipe.model.pattern.0"),
    ],
)
def test_conditions_that_mean_nothing(where: list[str], sort: str | None, said: str) -> None:
    with pytest.raises(UserError, match=said):
        results.select(load_records(COMMITTED, "wikitext103"), where, sort)


def test_sorting_puts_what_is_missing_last() -> None:
    records = load_records(COMMITTED)
    up = [record.metrics.get("test_ppl") for record in results.select(records, sort="test_ppl")]
    down = [record.metrics.get("test_ppl") for record in results.select(records, sort="-test_ppl")]
    known = sum(value is not None for value in up)
    assert 3 <= known < len(up)
    assert up[:known] == sorted(up[:known])
    assert down[:known] == up[:known][::-1]
    assert set(up[known:]) == set(down[known:]) == {None}
    names = [record.id for record in results.select(records, sort="id")]
    assert names == sorted(names)


def test_a_comparison_names_settings_and_metrics() -> None:
    found = results.compare(RODIMUS, PLUS, COMMITTED)
    settings = {row.setting: (row.first, row.second) for row in found.recipe.itertuples()}
    assert settings["model.repeats"] == (12, 6)
    assert settings["model.pattern.0.hops.1.0.kind"] == (None, "attention")
    assert "data.corpus" not in settings
    row = found.metrics.set_index("metric").loc["test_ppl"]
    assert row["difference"] == pytest.approx(56.958276 - 59.483677)
    assert found.metrics["noise"].isna().all()
    assert found.seeds == (1, 1)


def test_noise_is_that_over_seeds(root: Path) -> None:
    """By hand: means 60 and 57, variances 2 and 0.5 of two seeds each: 2 sqrt(2/2 + 0.5/2)."""
    for run, values in ((RODIMUS, (59.0, 61.0)), (PLUS, (56.5, 57.5))):
        shutil.rmtree(root / "wikitext103" / run)
        for seed, value in enumerate(values, 1):
            with_seed(root, run, seed, test_ppl=value)
    found = results.compare("rodimus-00000001", "rodimus_plus-00000002", root)
    row = found.metrics.set_index("metric").loc["test_ppl"]
    assert found.seeds == (2, 2)
    assert tuple(row) == pytest.approx((60, 57, -3, 2 * (1 + 0.25) ** 0.5))


def test_two_seeds_of_one_recipe_are_set_beside_each_other(root: Path) -> None:
    id = with_seed(root, RODIMUS, 7, test_ppl=50.0)
    found = results.compare(RODIMUS, id, root)
    assert list(found.recipe.itertuples(index=False)) == [("seed", 0, 7)]
    row = found.metrics.set_index("metric").loc["test_ppl"]
    assert (row["first"], row["second"]) == (59.483677, 50.0)


def test_runs_are_found_by_the_beginning_of_an_id(root: Path) -> None:
    records = load_records(root)
    assert results.find("transformer", records).label == "transformer_pp"
    assert results.find(f"wikitext103/{RODIMUS}", records).id == RODIMUS
    with pytest.raises(UserError, match="names 2 runs"):
        results.find("rodimus", records)
    with pytest.raises(UserError, match="no finished run 'lstm'"):
        results.find("lstm", records)


@pytest.mark.parametrize(
    ("label", "model"),
    [("rodimus_plus", "rodimus+"), ("transformer_pp-swa", "transformer++-swa"), ("gated_deltanet", "gated_deltanet")],
)
def test_labels_are_spelled_as_models(label: str, model: str) -> None:
    assert results.spelled(label) == model


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda: results.table("tabel1"), "no table named 'tabel1' in .*; did you mean 'table1'"),
        (lambda: results.table("figure06-rates-128"), "no table named 'figure06-rates-128'"),
        (lambda: results.figure("figure6-128"), "no figure named 'figure6-128' in .*; did you mean 'figure06-128'"),
        (lambda: results.picture("../paper/figure06"), "no figure named '../paper/figure06'"),
        (lambda: results.paper("table99"), "no numbers of a 'table99'; .* known: figure01a, "),
        (lambda: results.paper("table1b"), "no numbers of a 'table1b'"),
        (lambda: results.runs(experiment="wikitxt103"), "experiment named 'wikitxt103'; did you mean 'wikitext103'"),
        (lambda: results.overview("mqra"), "experiment named 'mqra'; did you mean 'mqar'"),
        (lambda: results.curves("wikitext103", "los"), "no run of 'wikitext103' logged a 'los'; did you mean 'loss'"),
    ],
)
def test_wrong_names_are_told_and_are_not_what_was_not_run(monkeypatch, read, said: str) -> None:
    monkeypatch.delenv("RODIMUS_LAB_RESULTS", raising=False)
    with pytest.raises(UserError, match=said):
        read()


def test_what_the_paper_leaves_out_was_not_left_out_by_us(monkeypatch) -> None:
    monkeypatch.delenv("RODIMUS_LAB_RESULTS", raising=False)
    table = results.table("table21")
    (paper,) = (name for name in table if name.startswith("Gemma2-2B-PT"))
    assert set(table[paper]) >= {"—"}
    assert "not run" not in set(table[paper])
    assert set(table["Ours"]) == {"not run"}
    downstream = results.table("table2")
    assert set(downstream["AVG"]) == {"not run"}
    assert not downstream.isna().any(axis=None)
    assert not downstream.astype(str).apply(lambda column: column.str.contains(r"\[[a-z]+\]$")).any(axis=None)


def test_words_that_pandas_takes_for_missing_are_words(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RODIMUS_LAB_RESULTS", str(tmp_path / "runs"))
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "mine.csv").write_text("gate,points\nNone,1.5\nNA,\n")
    assert results.figure("mine").to_dict("list") == {"gate": ["None", "NA"], "points": [1.5, "not run"]}
