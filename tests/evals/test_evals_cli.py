"""`rodimus-lab eval` from end to end on a smoke run: records, resumption, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from rodimus_lab.records import PROJECT_ROOT, load_records, load_unfinished
from rodimus_lab.weights import read_run, save_model

ROWS = {
    "arc_easy.jsonl": [
        {"query": f"Question: What is {n}?", "choices": ["a number", "a cat"], "gold": 0} for n in range(6)
    ],
    "piqa.jsonl": [{"query": "Question: To cut\n", "choices": ["use a knife", "use a spoon"], "gold": 1}] * 5,
    "lambada_openai.jsonl": [{"context": "He looked at the", "continuation": "file"}] * 3,
    "squad.jsonl": [{"text": "Ann won. The winner was", "value": "Ann"}] * 2,
    "nq.jsonl": [{"context": "Ann won in 1999.", "question": "the winner was", "answers": ["Ann"]}] * 2,
}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "items"
    folder.mkdir()
    for file, rows in ROWS.items():
        (folder / file).write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def own_task(tmp_path):
    """A task in a YAML file, for lm-eval's own command line."""
    items = tmp_path / "items.jsonl"
    items.write_text("\n".join(json.dumps({"q": "The file is", "a": word}) for word in ("open", "closed")))
    task = tmp_path / "tasks" / "files.yaml"
    task.parent.mkdir()
    task.write_text(
        "task: files\ndataset_path: json\noutput_type: loglikelihood\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {items}\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: ' {{a}}'\nmetric_list:\n  - metric: acc\n    aggregation: mean\n"
        "    higher_is_better: true\n"
    )
    return task


def refused(result, *names):
    assert result.code == 2, result
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1, result.err
    for name in names:
        assert str(name) in result.err


def test_without_lm_eval(cli, smoke_run, folder, monkeypatch):
    monkeypatch.setattr("rodimus_lab.command.find_spec", lambda name: None)
    refused(cli("eval", smoke_run.id, "--data-dir", folder), "the package lm_eval is not installed", ".[eval]")


class TestWithLmEval:
    @pytest.fixture(autouse=True)
    def _needed(self):
        pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra eval)")

    def test_a_record(self, cli, smoke_run, folder):
        result = cli(
            "eval", smoke_run.id, "--suite", "arc_easy,lambada_openai", "--data-dir", folder, "--device", "cpu"
        )
        assert result.code == 0, result.err
        (record,) = load_records(experiment="eval")
        assert record.recipe["model"]["name"] == f"wikitext103/{smoke_run.id}"
        assert record.recipe["data"]["source"] == "local files"
        assert set(record.recipe["data"]["files"]) == {"arc_easy.jsonl", "lambada_openai.jsonl"}
        assert record.env["packages"]["lm-eval"] == record.recipe["version"]
        assert "all items from local files" in record.budget_text
        assert record.metrics["arc_easy.items"] == 6
        accuracy = record.metrics["arc_easy.acc"]
        error = (accuracy * (1 - accuracy) / 5) ** 0.5
        assert record.metrics["arc_easy.acc_stderr"] == pytest.approx(error)
        assert record.metrics["lambada_openai.perplexity"] > 1
        assert record.metrics["params"] > 0
        assert str(folder) not in json.dumps(record.recipe)
        before = record.path.joinpath("record.json").read_bytes()
        again = cli("eval", smoke_run.id, "--suite", "arc_easy,lambada_openai", "--data-dir", folder, "--device", "cpu")
        assert "is finished" in again.out
        assert record.path.joinpath("record.json").read_bytes() == before

    def test_it_goes_on_where_it_stopped(self, cli, smoke_run, folder, monkeypatch):
        """Interrupted in the second task, it keeps the first; the whole is what an uninterrupted evaluation gives."""
        from evals.lmeval import evaluation

        scores, asked = evaluation._scores, []

        def interrupted(model, name, tasks, limit):
            if name == "piqa":
                raise KeyboardInterrupt
            return scores(model, name, tasks, limit)

        def watched(model, name, tasks, limit):
            asked.append(name)
            return scores(model, name, tasks, limit)

        command = ("eval", smoke_run.id, "--suite", "arc_easy,piqa", "--data-dir", folder, "--device", "cpu")
        monkeypatch.setattr(evaluation, "_scores", interrupted)
        assert cli("eval", smoke_run.id, "--suite", "piqa", "--data-dir", folder, "--device", "cpu").code == 130
        assert not [run for run in load_unfinished(None) if run.experiment == "eval"], "there is nothing to go on with"
        assert cli(*command).code == 130
        assert [run.last["task"] for run in load_unfinished(None) if run.experiment == "eval"] == ["arc_easy"]
        monkeypatch.setattr(evaluation, "_scores", watched)
        assert cli(*command).code == 0
        assert asked == ["piqa"]
        (record,) = load_records(experiment="eval")
        assert {"arc_easy.acc", "piqa.acc"} <= set(record.metrics)

    def test_a_limit_is_another_record_and_says_so(self, cli, smoke_run, folder):
        for limit in ([], ["--limit", 2]):
            assert (
                cli("eval", smoke_run.id, "--suite", "piqa", "--data-dir", folder, "--device", "cpu", *limit).code == 0
            )
        records = {record.metrics["piqa.items"]: record for record in load_records(experiment="eval")}
        assert set(records) == {5, 2}
        assert "the first 2 items of each task" in records[2].budget_text

    def test_recall(self, cli, smoke_run, folder):
        command = ("eval", smoke_run.id, "--suite", "recall_nq", "--data-dir", folder, "--recall-generation", 4)
        assert cli(*command, "--device", "cpu").code == 0
        (record,) = load_records(experiment="eval")
        assert record.recipe["recall"] == {"context": 1024, "generation": 4, "whitespace": "strip"}
        assert "1,024 tokens in and 4 out" in record.budget_text
        assert record.metrics["recall_nq.contains"] == 0
        assert cli("report", "table11").code == 0

    def test_a_score_on_texts_that_were_trained_on_says_so(self, cli, smoke_run, folder):
        path = smoke_run.root / "checkpoints" / "wikitext103" / smoke_run.id / "final" / "recipe.json"
        recipe = json.loads(path.read_text())
        recipe["data"]["corpus"] = "enwiki-25k"
        path.write_text(json.dumps(recipe))
        command = ("eval", smoke_run.id, "--suite", "recall_squad", "--data-dir", folder, "--recall-generation", 4)
        result = cli(*command, "--device", "cpu")
        assert result.code == 0, result.err
        assert "at least 24 of the 48 articles" in result.out

    @pytest.mark.parametrize(
        ("arguments", "names"),
        [
            (["--suite", "arc_easy,piqaa"], ["'piqaa'", "did you mean 'piqa'?", "suites: downstream, recall"]),
            (["--suite", ","], ["--suite names no task"]),
            (
                ["--suite", "hellaswag"],
                ["hellaswag.jsonl is missing", "arc_easy, lambada_openai, piqa, recall_"],
            ),
            (["--suite", "downstream"], ["is missing"]),
            (["--limit", "0"], ["--limit", "1"]),
            (["--dtype", "float8"], ["--dtype", "'float32', 'bfloat16'"]),
            (["--recall-context", "50"], ["--recall-context", "51"]),
        ],
    )
    def test_what_is_refused(self, cli, smoke_run, folder, arguments, names, monkeypatch):
        from evals.lmeval import tasks

        real, root = tasks.TaskManager, Path(tasks.lm_eval.tasks.__file__).parent
        few = {"include_path": [root / "arc", root / "piqa"], "include_defaults": False}  # All of them take seconds.
        monkeypatch.setattr(tasks, "TaskManager", lambda **given: real(**(given or few)))
        refused(cli("eval", smoke_run.id, "--data-dir", folder, *arguments), *names)
        assert not (smoke_run.root / "runs" / "eval").exists()

    def test_places_that_are_not_there(self, cli, smoke_run, folder):
        refused(cli("eval", smoke_run.id, "--data-dir", folder / "no"), "there is no folder", folder / "no")
        refused(
            cli("eval", "nobody-00000000", "--suite", "piqa", "--data-dir", folder), "no weights of 'nobody-00000000'"
        )
        refused(cli("eval", "--suite", "piqa"), "no model is named")

    def test_weights_that_diverged_have_no_record(self, cli, smoke_run, folder):
        final = smoke_run.root / "checkpoints" / "wikitext103" / smoke_run.id / "final"
        recipe, tensors = read_run(final)
        save_model(final, {name: tensor * float("nan") for name, tensor in tensors.items()}, recipe)
        for suite in ("piqa", "lambada_openai"):
            result = cli("eval", smoke_run.id, "--suite", suite, "--data-dir", folder, "--device", "cpu")
            assert result.code == 2
            said = result.err.splitlines()[-1]
            assert (
                said == f"error: {final} gives log-likelihoods that are not finite; give weights that did not diverge"
            )
        assert not (smoke_run.root / "runs" / "eval").exists() or not list((smoke_run.root / "runs" / "eval").iterdir())

    def test_one_model_of_several_that_fails(self, cli, smoke_run, folder):
        """The others are scored, and the end says that one was not."""
        command = ("eval", "nobody-00000000", smoke_run.id, "--suite", "piqa", "--data-dir", folder, "--device", "cpu")
        result = cli(*command)
        assert result.code == 2
        assert result.err.splitlines()[-1] == "error: 1 of 2 models could not be evaluated, as said above"
        assert len(load_records(experiment="eval")) == 1

    @pytest.mark.slow
    def test_offline(self, smoke_run):
        """Neither a model nor a test set of the Hub, in a process of its own, whose client reads its settings once."""
        hub = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(smoke_run.root / "hub")}
        command = [sys.executable, "-m", "rodimus_lab.cli", "eval", "nobody/nothing", smoke_run.id, "--suite", "piqa"]
        done = subprocess.run(
            [*command, "--device", "cpu"],
            cwd=PROJECT_ROOT,
            env=os.environ | hub,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        for said in (
            "nobody/nothing: 'nobody/nothing' is no run of this project, and transformers cannot read it",
            f"{smoke_run.id}: the items of piqa cannot be had from the Hub",
            "error: 2 of 2 models could not be evaluated",
        ):
            assert any(line.startswith(said) for line in done.stderr.splitlines()), done.stderr

    def test_beside_fresh_weights(self, cli, smoke_run, folder):
        result = cli(
            "eval", smoke_run.id, "--fresh-weights", "--suite", "piqa", "--data-dir", folder, "--device", "cpu"
        )
        assert result.code == 0, result.err
        trained, drawn = sorted(load_records(experiment="eval"), key=lambda record: -record.budget["steps"])[:2]
        assert drawn.budget == {"name": "untrained", "steps": 0} | {"scored": drawn.budget["scored"]}
        assert drawn.corpus == "no corpus"
        assert drawn.label == trained.label
        assert "trained_tokens" in trained.metrics
        assert "trained_tokens" not in drawn.metrics

    def test_lm_eval_is_told_of_the_model(self, tmp_path):
        """In a new process that reads the `.pth` file, lm-eval knows the name."""
        from evals.announce import announce

        announce(tmp_path)
        code = (
            f"import site; site.addsitedir({str(tmp_path)!r}); import lm_eval.models; "
            "from lm_eval.api.registry import get_model; print(get_model('rodimus-lab').__module__)"
        )
        done = subprocess.run(
            [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"],
            capture_output=True,
            text=True,
            cwd=PROJECT_ROOT,
            timeout=200,
            check=False,
        )
        assert done.stdout.split() == ["evals.lmeval.adapter"], done.stderr

    @pytest.mark.parametrize("more", ["", ",device=cpu,batch_size=2"], ids=["its device", "in model_args"])
    def test_lm_evals_own_command_line(self, smoke_run, tmp_path, own_task, monkeypatch, capsys, more):
        """A task of one's own in a YAML file, and the model by its name; the CPU where lm-eval's GPU is not there."""
        import lm_eval.tasks
        import torch

        from evals.lmeval.__main__ import main

        few = partial(lm_eval.tasks.TaskManager, include_defaults=False)  # All of lm-eval's tasks take seconds to find.
        monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        final = smoke_run.root / "checkpoints" / "wikitext103" / smoke_run.id / "final"
        command = ["run", "--model", "rodimus-lab", "--model_args", f"pretrained={final}{more}"]
        command += ["--tasks", str(own_task), "--output_path", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["lm-eval", *command])
        main()
        said = "no CUDA device is visible: the model runs on the CPU\n"
        assert capsys.readouterr().err.count(said) == (not more)
        (written,) = (tmp_path / "out").rglob("results_*.json")
        result = json.loads(written.read_text())
        assert result["n-samples"]["files"] == {"original": 2, "effective": 2}
        assert result["config"]["model"] == "rodimus-lab"

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ("pretrained=nowhere/at-all", "error: there is no checkpoint directory 'nowhere/at-all'"),
            ("pretrained=a,trust_remote_code=True", "has no trust_remote_code; it has pretrained, dtype, max_length"),
            ("dtype=float32", "give pretrained="),
        ],
    )
    def test_lm_evals_own_command_line_ends_in_a_sentence(self, own_task, arguments, sentence):
        code = (
            "import evals.announce as a; a.listen(); import runpy, functools, lm_eval.tasks as t; "
            "t.TaskManager = functools.partial(t.TaskManager, include_defaults=False); "
            "runpy.run_module('lm_eval', run_name='__main__')"
        )
        command = ["run", "--model", "rodimus-lab", "--model_args", arguments, "--tasks", str(own_task)]
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}", *command],
            capture_output=True,
            text=True,
            cwd=PROJECT_ROOT,
            timeout=200,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert sentence in line
