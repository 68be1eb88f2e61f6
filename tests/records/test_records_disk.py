"""The run folder: what is written, when a run counts as finished, and what is said about damaged files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rodimus_lab import records
from rodimus_lab.errors import UserError
from rodimus_lab.records import RunDir, describe_budget, environment, load_records, load_unfinished, write_atomic

RECIPE = {"label": "rodimus", "seed": 0, "optimizer": {"lr": 5e-4}, "evaluators": ("perplexity",)}
BUDGET = {"name": "short", "steps": 1500, "batch_size": 256, "paper_steps": 25000}
RECORD = {
    "label": "rodimus",
    "metrics": {"test_ppl": 23.1},
    "device": "NVIDIA H200",
    "commit": "abc",
    "corpus": "enwiki-25k",
    "tokenizer": "bpe-32k",
    "budget": BUDGET,
}


def started(root: Path, experiment: str = "wikitext103", id: str = "rodimus-1a2b3c4d") -> RunDir:
    run = RunDir(root, experiment, id)
    run.create(RECIPE)
    run.write_env({"python": "3.11"})
    return run


def finished(root: Path, experiment: str = "wikitext103", id: str = "rodimus-1a2b3c4d") -> RunDir:
    run = started(root, experiment, id)
    run.finish(RECORD)
    return run


def test_a_run_is_finished_once_its_record_is_written(tmp_path):
    run = started(tmp_path)
    run.append_metrics({"step": 10, "train_loss": 3.5})
    assert not run.finished
    assert load_records(tmp_path) == []
    (unfinished,) = load_unfinished(tmp_path)
    assert (unfinished.id, unfinished.label, unfinished.last["step"]) == ("rodimus-1a2b3c4d", "rodimus", 10)

    run.finish(RECORD)
    assert run.finished
    assert load_unfinished(tmp_path) == []
    (record,) = load_records(tmp_path)
    assert record.metrics == {"test_ppl": 23.1}
    assert record.recipe["optimizer"] == {"lr": 5e-4}
    assert record.env == {"python": "3.11"}
    assert record.finished.endswith("+00:00")
    assert record.path == tmp_path / "wikitext103" / "rodimus-1a2b3c4d"
    assert record.budget_text == "short budget 1,500 of 25,000 steps, batch 256"


def test_files_are_canonical_json_and_no_temporary_file_is_left(tmp_path):
    run = finished(tmp_path)
    text = (run.path / "record.json").read_text()
    assert text == json.dumps(json.loads(text), sort_keys=True, indent=1) + "\n"
    assert sorted(path.name for path in run.path.iterdir()) == ["env.json", "recipe.json", "record.json"]


def test_records_are_sorted_and_chosen_by_experiment(tmp_path):
    for experiment, id in (("b", "x-2"), ("a", "y-1"), ("b", "x-1")):
        finished(tmp_path, experiment, id)
    assert [(r.experiment, r.id) for r in load_records(tmp_path)] == [("a", "y-1"), ("b", "x-1"), ("b", "x-2")]
    assert [r.id for r in load_records(tmp_path, "b")] == ["x-1", "x-2"]
    assert load_records(tmp_path, "c") == []
    assert load_records(tmp_path / "nowhere") == []


def test_create_keeps_an_equal_recipe_and_refuses_another(tmp_path):
    run = started(tmp_path)
    before = (run.path / "recipe.json").stat().st_mtime_ns
    run.create(json.loads(json.dumps(RECIPE)))
    assert (run.path / "recipe.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"recipe\.json holds another recipe"):
        run.create(RECIPE | {"seed": 1})


@pytest.mark.parametrize("name", ["", "..", "../up", "a/b", ".hidden", "a b", "x\n"])
def test_names_that_could_leave_the_root_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="not a valid"):
        RunDir(tmp_path, "experiment", name)
    with pytest.raises(UserError, match="not a valid"):
        load_records(tmp_path, name)


def test_metrics_keep_every_digit_and_return_to_a_checkpoint(tmp_path):
    straight, resumed = RunDir(tmp_path, "e", "straight"), RunDir(tmp_path, "e", "resumed")
    lines = [{"step": step, "loss": 1 / 3 + step * 1e-17} for step in range(4)]
    for run in (straight, resumed):
        run.create(RECIPE)
        assert run.metrics_size() == 0
    for line in lines:
        straight.append_metrics(line)
    for line in lines[:2]:
        resumed.append_metrics(line)
    checkpoint = resumed.metrics_size()
    resumed.append_metrics({"step": 2, "loss": 9.0})
    with (resumed.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in resumed.read_metrics()] == [0, 1, 2]
    resumed.truncate_metrics(checkpoint)
    for line in lines[2:]:
        resumed.append_metrics(line)
    assert resumed.read_metrics() == lines
    assert (resumed.path / "metrics.jsonl").read_bytes() == (straight.path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="fewer than"):
        resumed.truncate_metrics(10_000)


def test_truncating_metrics_that_were_never_written(tmp_path):
    run = started(tmp_path)
    run.truncate_metrics(0)
    assert run.read_metrics() == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_refused_and_nothing_is_written(tmp_path, value):
    run = started(tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.append_metrics({"step": 1, "loss": value})
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.finish(RECORD | {"metrics": {"test_ppl": value}})
    assert run.metrics_size() == 0
    assert not run.finished


def test_finish_refuses_what_is_not_this_runs_record(tmp_path):
    run = started(tmp_path)
    with pytest.raises(ValueError, match="lacks corpus, device"):
        run.finish({key: value for key, value in RECORD.items() if key not in ("device", "corpus")})
    with pytest.raises(ValueError, match="was given the record of"):
        run.finish(RECORD | {"id": "another"})
    with pytest.raises(ValueError, match="call create first"):
        RunDir(tmp_path, "e", "x").finish(RECORD)
    assert not run.finished


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("record.json", b"{", "is not a JSON object"),
        ("record.json", b"[]", "is not a JSON object"),
        ("record.json", b"\xff", "is not a JSON object"),
        ("record.json", b"{}", "no valid 'experiment'"),
        ("recipe.json", b"{", "is not a JSON object"),
        ("env.json", None, "cannot read"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, file, content, message):
    run = finished(tmp_path)
    (run.path / file).unlink()
    if content is not None:
        (run.path / file).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_records(tmp_path)
    assert str(run.path / file) in str(caught.value)
    assert "restore" in str(caught.value)


def test_a_record_in_the_wrong_folder_is_named(tmp_path):
    run = finished(tmp_path)
    run.path.rename(run.path.with_name("other"))
    with pytest.raises(UserError, match="move it back"):
        load_records(tmp_path)


def test_a_damaged_metrics_line_is_numbered(tmp_path):
    run = started(tmp_path)
    run.append_metrics({"step": 1})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write("oops\n")
    with pytest.raises(UserError, match=r"line 2 of .*metrics\.jsonl"):
        run.read_metrics()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "record.json"
    write_atomic(target, "old\n")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*record\.json \(no space left on device\)"):
        write_atomic(target, "new\n")
    assert target.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [target]


def test_a_metrics_line_that_does_not_fit_is_not_written_in_part(tmp_path):
    resource = pytest.importorskip("resource")
    run = started(tmp_path)
    run.append_metrics({"step": 1})
    before = (run.path / "metrics.jsonl").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot append to .*metrics\.jsonl"):
            run.append_metrics({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (run.path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        ({"name": "paper", "steps": 25000, "paper_steps": 25000}, "paper budget 25,000 steps"),
        (
            {"name": "smoke", "steps": 20, "paper_steps": 25000, "batch_size": 4},
            "smoke budget 20 of 25,000 steps, batch 4",
        ),
        ({"name": "short", "steps": 1500, "paper_steps": None, "batch_size": 8}, "short budget 1,500 steps, batch 8"),
    ],
)
def test_budgets_in_words(budget, text):
    assert describe_budget(budget) == text


@pytest.mark.parametrize(
    ("recipe", "metrics", "text"),
    [
        ({"data": {"seq_len": 512}}, {}, "short budget 1,500 of 25,000 steps, batch 256, 197M tokens"),
        ({"seq_len": 4096}, {}, "short budget 1,500 of 25,000 steps, batch 256, 1.57B tokens"),
        ({"data": {"train": [{"seq_len": 64}]}}, {}, "short budget 1,500 of 25,000 steps, batch 256, 24.6M tokens"),
        ({"data": {"train": [{"seq_len": 64}, {"seq_len": 128}]}}, {}, "short budget 1,500 of 25,000 steps, batch 256"),
        ({}, {}, "short budget 1,500 of 25,000 steps, batch 256"),
        (
            {"data": {"tasks": []}},
            {"trained_tokens": 819200},
            "short budget 1,500 of 25,000 steps, batch 256, 819k tokens",
        ),
    ],
)
def test_a_budget_says_its_tokens_where_they_are_known(recipe, metrics, text, tmp_path):
    finished(tmp_path)
    (record,) = load_records(tmp_path)
    assert replace(record, recipe=recipe, metrics=metrics).budget_text == text


@pytest.mark.parametrize(
    ("count", "text"), [(7, "7"), (999, "999"), (999_900, "1M"), (131_072_000, "131M"), (3_276_800_000, "3.28B")]
)
def test_counts_in_words(count, text):
    assert records.count_text(count) == text


def test_default_root(monkeypatch, tmp_path):
    monkeypatch.delenv("RODIMUS_LAB_RESULTS", raising=False)
    assert records.runs_root() == Path(records.__file__).parents[1] / "results" / "runs"
    monkeypatch.setenv("RODIMUS_LAB_RESULTS", str(tmp_path))
    finished(tmp_path)
    assert len(load_records()) == 1


def test_environment_takes_the_commit_from_git(monkeypatch, tmp_path):
    monkeypatch.delenv("RODIMUS_LAB_COMMIT", raising=False)
    monkeypatch.setattr(records, "PROJECT_ROOT", tmp_path)
    # Neither the machine's settings nor a repository around the temporary folder may speak here.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    assert (environment()["commit"], environment()["dirty"]) == ("unknown", "unknown")

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    git("init", "-q")
    assert environment()["commit"] == "unknown"
    (tmp_path / "code.py").write_text("x = 1\n")
    git("add", "code.py")
    git("commit", "-qm", "first")
    assert environment()["commit"] == git("rev-parse", "HEAD").stdout.strip()
    assert environment()["dirty"] is False
    (tmp_path / "results" / "runs").mkdir(parents=True)
    (tmp_path / "results" / "runs" / "record.json").write_text("{}")
    assert environment()["dirty"] is False
    (tmp_path / "more.py").write_text("")
    assert environment()["dirty"] is True


def test_environment_without_git_history(monkeypatch):
    monkeypatch.setenv("RODIMUS_LAB_COMMIT", "0123abc")
    monkeypatch.delenv("RODIMUS_LAB_DIRTY", raising=False)
    assert (environment()["commit"], environment()["dirty"]) == ("0123abc", "unknown")
    monkeypatch.setenv("RODIMUS_LAB_DIRTY", "0")
    assert environment()["dirty"] is False
    monkeypatch.setenv("RODIMUS_LAB_DIRTY", "maybe")
    with pytest.raises(UserError, match="RODIMUS_LAB_DIRTY"):
        environment()


def test_environment_is_json_and_names_versions():
    values = environment()
    assert json.loads(json.dumps(values)) == values
    assert values["python"] == ".".join(map(str, sys.version_info[:3]))
    assert values["cpu_count"] >= 1
    assert "torch" in values["packages"]


def test_records_need_no_torch():
    """Held for what the module itself imports, whatever the package above it hands on."""
    code = (
        "import sys, types; package = types.ModuleType('rodimus_lab'); package.__path__ = [sys.argv[1]];"
        "sys.modules['rodimus_lab'] = package; import rodimus_lab.records; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(records.__file__).parent)], check=True)
