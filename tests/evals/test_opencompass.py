"""OpenCompass beside the built-in NeedleBench: the same scores of the same predictions, and its own summary's fault."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from needle_fakes import write_files

from evals.needlebench.prompts import Example
from evals.needlebench.scores import of_cell, score, summarize
from evals.needlebench.spec import DEPTHS, Spec
from evals.opencompass.needlebench import (
    abbreviation,
    configured,
    data_sets,
    from_environment,
    main,
    read_results,
    spec_of_environment,
)
from rodimus_lab.convert import open_checkpoint
from rodimus_lab.errors import UserError
from rodimus_lab.generate import stream
from rodimus_lab.records import PROJECT_ROOT
from rodimus_lab.sampling import Sampling

PYTHON = PROJECT_ROOT / ".venv-opencompass" / "bin" / "python"
NEEDLE = "Hidden on Saint Helena Island is the legendary Dream Bubble."
# A prediction, and what is searched for in it.
SINGLE = [
    ("Hidden on Saint Helena Island is the legendary Dream Bubble.", "Dream Bubble"),
    ("It is the Dream\n Bubble, I think.", "Dream Bubble"),
    ("dream bubble", "Dream Bubble"),
    ("", "Dream Bubble"),
    ("  \n", "Dream Bubble"),
    ("隐藏在圣赫勒拿岛的是传说中的梦幻泡泡", "Dream Bubble"),
]
KEYWORDS = [f"thing {number}" for number in range(len(DEPTHS))]
PARALLEL = ["thing 0, thing 3 and thing 19", "", "Thing 1", " ".join(KEYWORDS), "thing 1"]
CHAINS = [
    ("The answer is Ada Lovelace of London.", "ada london paris"),
    ("", "ada"),
    ("ADA", "ada lovelace"),
    ("nothing of it", "ada"),
]
PROMPTS = ["The file is", "def f(x):", "import a module and then"]


def example(*keywords, reference=""):
    return Example("", keywords, reference)


@pytest.fixture(scope="module")
def theirs(finished_smoke_run, pydoc_cache):
    if not PYTHON.is_file():
        pytest.skip("OpenCompass is not installed (make setup-opencompass)")
    parallel = "*".join(KEYWORDS) + "#" + "*".join(map(str, DEPTHS))
    scored = {
        "single_retrieval": [(prediction, f"{NEEDLE}*{keyword}") for prediction, keyword in SINGLE],
        "multi_retrieval": [(prediction, parallel) for prediction in PARALLEL],
        "multi_reasoning": [(prediction, f"some answer*{words}") for prediction, words in CHAINS],
    }
    model = finished_smoke_run.root / "checkpoints" / "wikitext103" / finished_smoke_run.id / "final"
    done = subprocess.run(
        [str(PYTHON), str(Path(__file__).with_name("opencompass_side.py"))],
        input=json.dumps({"scored": scored, "model": str(model), "prompts": PROMPTS}),
        cwd=PROJECT_ROOT,
        env=os.environ | {"RODIMUS_LAB_CACHE": str(pydoc_cache), "PYTHONPATH": str(PROJECT_ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"model": model, "cache": pydoc_cache}


class TestBeside:
    def test_single_retrieval(self, theirs):
        ours = [score("single_retrieval", text, example(word, reference=NEEDLE))[0] for text, word in SINGLE]
        assert ours == pytest.approx([given["score"] for given in theirs["scores"]["single_retrieval"]])
        assert ours[0] == 100
        assert len(set(ours)) > 3

    def test_multi_retrieval(self, theirs):
        for text, given in zip(PARALLEL, theirs["scores"]["multi_retrieval"], strict=True):
            ours = of_cell("multi_retrieval", [score("multi_retrieval", text, example(*KEYWORDS))])["scores"]
            assert ours == pytest.approx([given[f"Depth{depth}"] for depth in DEPTHS])

    def test_multi_reasoning(self, theirs):
        ours = [score("multi_reasoning", text, example(*words.lower().split()))[0] for text, words in CHAINS]
        assert ours == pytest.approx([given["score"] for given in theirs["scores"]["multi_reasoning"]])
        assert 0 < ours[0] < 100

    def test_the_model_class(self, theirs, monkeypatch):
        """Prompts of unequal length in one batch, as each by itself; perplexities over the tokens that count."""
        monkeypatch.setenv("RODIMUS_LAB_CACHE", str(theirs["cache"]))
        checkpoint = open_checkpoint(theirs["model"])
        model, tokenizer = checkpoint.build(), checkpoint.tokenizer()
        encoded = [tokenizer.encode(text) for text in PROMPTS]
        assert theirs["lengths"] == list(map(len, encoded))
        for ids, text, ppl, masked in zip(encoded, theirs["texts"], theirs["ppl"], theirs["ppl_masked"], strict=True):
            new = [token for (token,) in stream(model, [ids], 6, Sampling(temperature=0), stop=[tokenizer.eos_id])]
            assert text == tokenizer.decode([token for token in new if token != tokenizer.eos_id])
            with torch.no_grad():
                log_p = model(torch.tensor([ids]))[0][0, :-1].log_softmax(-1)
            nats = -log_p[range(len(ids) - 1), ids[1:]]
            assert ppl == pytest.approx(nats.sum().item() / len(ids), abs=1e-4)
            assert masked == pytest.approx(nats[1:].sum().item() / (len(ids) - 2), abs=1e-4)


SPEC = Spec(lengths=(2000,), depths=(0, 50), languages=("en",), repeats=2, length_tokenizer="gpt2")


def write_results(folder, scores):
    for cell in SPEC.cells():
        if cell.task == "multi_retrieval":
            result = {f"Depth{depth}": scores[cell.task] for depth in SPEC.depths} | {"average_score": 0}
        else:
            result = {"score": scores[cell.task]}
        (folder / f"{abbreviation(cell)}.json").write_text(json.dumps(result | {"details": []}))


class TestSummary:
    def test_single_retrieval_is_not_averaged_over_multi_retrieval(self, tmp_path):
        """As OpenCompass's summary table has it since mid-2025. The weights are 0.4, 0.3 and 0.3."""
        write_results(tmp_path, {"single_retrieval": 80.0, "multi_retrieval": 10.0, "multi_reasoning": 20.0})
        metrics = summarize(SPEC, read_results(tmp_path, SPEC))
        assert metrics["single_retrieval"] == pytest.approx(80)
        assert metrics["multi_retrieval"] == pytest.approx(10)
        assert metrics["overall"] == pytest.approx(0.4 * 80 + 0.3 * 10 + 0.3 * 20)

    def test_a_cell_without_a_result_is_missing_and_not_0(self, tmp_path):
        write_results(tmp_path, {"single_retrieval": 80.0, "multi_retrieval": 10.0, "multi_reasoning": 20.0})
        (tmp_path / "single_retrieval_en__2000__50.json").unlink()
        metrics = summarize(SPEC, read_results(tmp_path, SPEC))
        assert metrics["single_retrieval"] == pytest.approx(80)
        assert metrics["grids"]["overall"][0][1] is None
        assert list(metrics["impossible"]) == ["single_retrieval_en/2000/50"]


class TestConfig:
    def test_a_data_set_a_cell(self, tmp_path):
        found = {each["abbr"]: each for each in data_sets(SPEC, tmp_path)}
        assert len(found) == len(SPEC.cells()) == 11
        single = found["single_retrieval_en__2000__50"]
        assert (single["length"], single["depth"], single["length_buffer"]) == (2000, 50, 600)
        assert found["multi_retrieval_en__2000"]["depths"] == [0, 50]
        assert found["multi_reasoning_5_en__2000__0"]["num_needles"] == 5
        assert json.loads(json.dumps(found)) == found

    def test_a_cell_without_a_haystack_is_none(self, tmp_path):
        spec = SPEC.replace(lengths=(1000,), tasks=("multi_retrieval",), languages=("en", "zh"))
        assert [each["abbr"] for each in data_sets(spec, tmp_path)] == ["multi_retrieval_zh__1000"]

    def test_a_config_ends_in_one_sentence(self, monkeypatch, tmp_path, capsys, finished_smoke_run):
        folder = finished_smoke_run.root / "checkpoints" / "wikitext103" / finished_smoke_run.id / "final"
        files = write_files(tmp_path / "files")
        monkeypatch.setenv("RODIMUS_LAB_MODEL", str(folder))
        monkeypatch.setenv("NEEDLEBENCH_DATA", str(files))
        assert len(configured()) == 2
        for variable, text, reason in (
            ("NEEDLEBENCH_LENGTHS", "many", "error: NEEDLEBENCH_LENGTHS: 'many'"),
            ("NEEDLEBENCH_DATA", str(tmp_path), "error: cannot read "),
            ("RODIMUS_LAB_MODEL", str(tmp_path / "none"), "error: there is no checkpoint directory "),
        ):
            with monkeypatch.context() as other:
                other.setenv(variable, text)
                with pytest.raises(SystemExit) as ended:
                    configured()
            assert ended.value.code == 2
            told = capsys.readouterr().err
            assert told.startswith(reason)
            assert told.count("\n") == 1

    def test_the_environment(self, monkeypatch, tmp_path):
        monkeypatch.delenv("RODIMUS_LAB_MODEL", raising=False)
        with pytest.raises(UserError, match="RODIMUS_LAB_MODEL is not set"):
            from_environment()
        monkeypatch.setenv("RODIMUS_LAB_MODEL", "runs/rodimus-1/final")
        monkeypatch.setenv("NEEDLEBENCH_DATA", str(tmp_path))
        monkeypatch.setenv("NEEDLEBENCH_LENGTHS", "1000,2000")
        monkeypatch.setenv("NEEDLEBENCH_TASKS", "single_retrieval")
        monkeypatch.setenv("NEEDLEBENCH_MAX_NEW_TOKENS", "16")
        sets, (model,) = from_environment()
        assert len(sets) == 2 * 20 * 2
        assert (model["abbr"], model["max_seq_len"]) == ("rodimus-1", 131072 + 16)
        monkeypatch.setenv("NEEDLEBENCH_LENGTHS", "many")
        with pytest.raises(UserError, match="NEEDLEBENCH_LENGTHS: 'many' is no whole number"):
            spec_of_environment()

    @pytest.mark.parametrize(
        ("variable", "text", "reason"),
        [
            ("BATCH_SIZE", "few", "NEEDLEBENCH_BATCH_SIZE: 'few' is no whole number"),
            ("REPEATS", "1,2", "NEEDLEBENCH_REPEATS: '1,2' is no whole number"),
            ("TASKS", "ancestry", "NEEDLEBENCH_TASKS: 'ancestry' is not in this config; choose among single_retrieval"),
            ("LANGUAGES", "fr", "'fr'"),
        ],
    )
    def test_a_variable_that_makes_no_sense_is_named(self, monkeypatch, tmp_path, variable, text, reason):
        monkeypatch.setenv("RODIMUS_LAB_MODEL", "run")
        monkeypatch.setenv("NEEDLEBENCH_DATA", str(tmp_path))
        monkeypatch.setenv(f"NEEDLEBENCH_{variable}", text)
        with pytest.raises(UserError, match=reason):
            from_environment()

    @pytest.mark.parametrize("text", ["{}", "[]", "cut off {", '{"score": "high"}'])
    def test_a_result_that_is_none_is_named(self, tmp_path, text):
        file = f"{abbreviation(SPEC.cells()[0])}.json"
        (tmp_path / file).write_text(text)
        with pytest.raises(UserError, match=f"{file} has no score in it"):
            read_results(tmp_path, SPEC)

    def test_the_summary_says_how_many_cells_have_no_score(self, monkeypatch, tmp_path, capsys):
        folder = tmp_path / "20260101" / "results" / "model"
        folder.mkdir(parents=True)
        write_results(folder, {"single_retrieval": 80.0, "multi_retrieval": 10.0, "multi_reasoning": 20.0})
        (folder / "single_retrieval_en__2000__50.json").unlink()
        for name, text in (("LENGTHS", "2000"), ("DEPTHS", "0,50"), ("LANGUAGES", "en"), ("LENGTH_TOKENIZER", "gpt2")):
            monkeypatch.setenv(f"NEEDLEBENCH_{name}", text)
        monkeypatch.setattr("sys.argv", ["needlebench", str(tmp_path)])
        main()
        told = json.loads(capsys.readouterr().out)
        assert (told["not_scored"], told["single_retrieval"]) == (1, 80)

    def test_the_summary_ends_in_one_sentence(self, monkeypatch, tmp_path, capsys):
        (tmp_path / "20260101" / "results" / "model").mkdir(parents=True)
        for arguments, variable, reason in (
            ([], "1000", "error: give one argument"),
            ([str(tmp_path / "none")], "1000", "error: there are no results under"),
            ([str(tmp_path)], "many", "error: NEEDLEBENCH_LENGTHS: 'many'"),
        ):
            monkeypatch.setattr("sys.argv", ["needlebench", *arguments])
            monkeypatch.setenv("NEEDLEBENCH_LENGTHS", variable)
            with pytest.raises(SystemExit) as ended:
                main()
            assert ended.value.code == 2
            assert capsys.readouterr().err.startswith(reason)
