"""Asking a model: cells in common batches, an answer's end, resumption cell by cell, records and figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from needle_fakes import SOURCE, byte_tokenizer, write_files

from evals.needlebench import Spec, evaluate, runner
from evals.needlebench.prompts import Example
from evals.needlebench.runner import Generation, Question
from experiments.needlebench import (
    MODELS,
    Examined,
    figure_5,
    figures_9_to_14,
    heat_maps,
    lines,
    needlebench_table,
    score_run,
)
from rodimus_lab.convert.provenance import Provenance
from rodimus_lab.decoder import PREFILL_CHUNK
from rodimus_lab.errors import UserError
from rodimus_lab.nn.model import LanguageModel
from rodimus_lab.nn.zoo import SIZES, model_config
from rodimus_lab.records import load_records, load_unfinished
from rodimus_lab.report import FIGURES, PaperResults
from rodimus_lab.report.figure import figure_csv, write_figure

BYTES = byte_tokenizer()
SPEC = Spec(lengths=(500, 900), depths=(0, 50, 100), repeats=2, buffer=100, max_new_tokens=6, length_tokenizer="model")
SMALL = SIZES["mqar"]._replace(vocab_size=300)
CONFIG = model_config("rodimus", size=SMALL)
ORIGIN = Provenance(
    "tiny",
    {"source": "run", "name": "testing/tiny", "weights": "0" * 16},
    "made-up",
    {"name": "smoke", "steps": 2, "batch_size": 1},
)
FACTS = {"commit": "abc", "device": "cpu"}
EXAMINED = Examined(ORIGIN, BYTES, "fp32", "cpu")


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    return CONFIG.build().eval()


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RODIMUS_LAB_RESULTS", str(tmp_path / "runs"))
    return tmp_path


class Knowing:
    """Stands for a model that answers with all keywords at the first depth asked, and with nothing at others."""

    batches: list[int]

    def __init__(self, *_: Any):
        type(self).batches = []

    def __call__(self, questions: Sequence[Question]) -> list[str]:
        self.batches.append(len(questions))
        return [" ".join(question.example.keywords) for question in questions]


def test_every_cell_is_scored_and_cells_share_batches(model, monkeypatch) -> None:
    monkeypatch.setattr(runner, "Generation", Knowing)
    kept: list[str] = []
    results = evaluate(model, BYTES, SPEC, SOURCE, keep=lambda cell, _: kept.append(cell.key), batch_tokens=1 << 15)
    assert kept == [cell.key for cell in SPEC.cells()]
    assert {value for result in results.values() for value in result["scores"]} == {100}
    assert results["single_retrieval_en/500/50"]["prompts"] == 2
    assert results["single_retrieval_en/500/50"]["prompt_tokens"] > 500 - 100
    assert len(results["multi_retrieval_zh/900"]["scores"]) == 3
    assert max(Knowing.batches) > 2
    assert sum(Knowing.batches) == 2 * len(SPEC.cells())


def test_a_batch_holds_no_more_tokens_than_it_may(model, monkeypatch) -> None:
    monkeypatch.setattr(runner, "Generation", Knowing)
    evaluate(model, BYTES, SPEC, SOURCE, batch_tokens=1)
    assert set(Knowing.batches) == {1}
    evaluate(model, BYTES, SPEC, SOURCE, batch_tokens=3 * 1024)
    assert max(Knowing.batches) == 3


def test_the_batch_changes_no_answer(model) -> None:
    spec = SPEC.replace(tasks=("single_retrieval",), lengths=(300,), depths=(0, 100))
    alone = evaluate(model, BYTES, spec, SOURCE, batch_tokens=1)
    assert evaluate(model, BYTES, spec, SOURCE, batch_tokens=1 << 14) == alone
    assert all(0 <= result["scores"][0] <= 20 for result in alone.values())


def test_a_prompt_longer_than_a_piece_is_read_whole(model) -> None:
    """The answer is that of the whole prompt in one forward pass."""
    ids = torch.randint(1, 257, (PREFILL_CHUNK + 70,)).tolist()
    generated = Generation(model, BYTES, 1)([Question("single_retrieval", Example("", ("no such words",)), ids)])
    with torch.no_grad():
        logits_BTV, _ = model(torch.tensor([ids]))
    expected = int(logits_BTV[0, -1].argmax())
    assert generated == [BYTES.decode([expected] if expected != BYTES.eos_id else [])]


class Reciting(Generation):
    """Stands for a model that goes on with the same text whatever it is asked."""

    text: Sequence[int] = BYTES.encode("x" * 20 + "the brass key" + "x" * 400)

    def _tokens(self, prompts):
        self.read = 0
        for token in self.text:
            self.read += 1
            yield [token] * len(prompts)


def test_an_answer_ends_where_nothing_can_change_its_score(model) -> None:
    found, other = Example("", ("brass key",)), Example("", ("blue map",))
    reciting = Reciting(model, BYTES, 1000)
    (text,) = reciting([Question("single_retrieval", found, [1])])
    assert "brass key" in text
    assert reciting.read < 33 + 2 * runner.LOOK_EVERY
    texts = reciting([Question("single_retrieval", example, [1]) for example in (found, other)])
    assert reciting.read == len(Reciting.text)
    assert len(texts[1]) == len(Reciting.text)


def test_an_answer_ends_with_its_document(model) -> None:
    ending = Reciting(model, BYTES, 9)
    ending.text = [*BYTES.encode("one"), BYTES.eos_id, *BYTES.encode("two")]
    assert ending([Question("multi_reasoning", Example("", ("two",)), [1])]) == ["one"]


def test_impossible_cells_are_kept_as_such(model, monkeypatch) -> None:
    monkeypatch.setattr(runner, "Generation", Knowing)
    spec = Spec(lengths=(1000,), depths=(0, 100), tasks=("multi_retrieval",), languages=("en",))
    results = evaluate(model, BYTES, spec, SOURCE)
    assert list(results) == ["multi_retrieval_en/1000"]
    assert "leave no haystack" in results["multi_retrieval_en/1000"]["impossible"]
    assert Knowing.batches == []


def score(model, spec: Spec = SPEC):
    return score_run(model, EXAMINED, spec, SOURCE, BYTES, FACTS)


def test_an_interrupted_run_goes_on_with_the_cells_that_are_missing(model, monkeypatch, place) -> None:
    class Interrupting(Knowing):
        def __call__(self, questions):
            if len(self.batches) == 3:
                raise KeyboardInterrupt
            return super().__call__(questions)

    monkeypatch.setattr(runner, "Generation", Interrupting)
    with pytest.raises(KeyboardInterrupt):
        score_run(model, EXAMINED, SPEC, SOURCE, BYTES, FACTS, batch_tokens=4 * 1024)
    (broken,) = load_unfinished()
    metrics = broken.path / "metrics.jsonl"
    before = metrics.read_text()
    scored = before.count("\n")
    assert 0 < scored < len(SPEC.cells())
    metrics.write_text(before + '{"cell": "single_retri')  # As a machine that went down leaves it.
    monkeypatch.setattr(runner, "Generation", Knowing)
    record = score(model)
    assert record.id == broken.id
    assert metrics.read_text().startswith(before)
    found = [json.loads(line)["cell"] for line in metrics.read_text().splitlines()]
    assert sorted(found) == sorted(cell.key for cell in SPEC.cells())
    assert sum(Knowing.batches) == 2 * (len(SPEC.cells()) - scored)
    whole = record.metrics
    for path in (record.path / "record.json", metrics):
        path.unlink()
    assert score(model).metrics == whole


@pytest.mark.parametrize(
    "line",
    [
        {"scores": [1]},
        {"cell": "single_retrieval_en/501/0", "scores": [1]},
        {"cell": "single_retrieval_en/500/0", "scores": "x"},
        {"cell": "single_retrieval_en/500/0", "scores": [float("nan")]},
        {"cell": "multi_retrieval_en/500", "scores": [1, 2]},
        {"cell": "multi_retrieval_en/500", "impossible": None},
    ],
    ids=str,
)
def test_a_line_of_metrics_that_is_no_cell_is_named(model, monkeypatch, line) -> None:
    monkeypatch.setattr(runner, "Generation", Knowing)
    record = score(model)
    (record.path / "record.json").unlink()
    metrics = record.path / "metrics.jsonl"
    first, *rest = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join([first, json.dumps(line) + "\n", *rest[1:]]))
    with pytest.raises(UserError, match=r"^line 2 of .*metrics\.jsonl is no cell of this grid; delete"):
        score(model)


def test_two_processes_do_not_score_one_run(model, monkeypatch) -> None:
    monkeypatch.setattr(runner, "Generation", Knowing)
    record = score(model)
    assert {path.name for path in record.path.iterdir()} == {"recipe.json", "env.json", "metrics.jsonl", "record.json"}
    (record.path / "record.json").unlink()
    before = (record.path / "metrics.jsonl").read_bytes()
    with FileLock(record.path / "lock"), pytest.raises(UserError, match="another process is scoring into"):
        score(model)
    assert (record.path / "metrics.jsonl").read_bytes() == before
    assert score(model).metrics == record.metrics


def test_a_finished_run_is_left_as_it_is(model, monkeypatch) -> None:
    monkeypatch.setattr(runner, "Generation", Knowing)
    first = score(model)
    Knowing.batches.clear()
    assert score(model) == first
    assert Knowing.batches == []
    assert score(model, SPEC.replace(repeats=1)).id != first.id


def test_the_record_says_what_was_scored_and_how(model, monkeypatch) -> None:
    monkeypatch.setattr(runner, "Generation", Knowing)
    record = score(model)
    assert load_records() == [record]
    assert (record.corpus, record.tokenizer, record.device, record.commit) == ("made-up", "bytes", "cpu", "abc")
    assert record.recipe["length_tokenizer"] == {"name": "bytes", "fingerprint": BYTES.fingerprint}
    assert (record.recipe["dtype"], record.recipe["model"]) == ("fp32", ORIGIN.identity)
    assert record.recipe["spec"] == SPEC.to_dict()
    assert record.metrics["overall"] == pytest.approx(100)
    asked = "500 to 900 by 400 tokens of bytes; depths 0, 50, 100 %; en, zh; repeats 2; buffer 100; max new tokens 6"
    assert lines(record)[0] == f"{record.id}: {len(SPEC.cells())} cells; {asked}"
    assert "Overall: 100.00" in lines(record)


def test_scores_of_two_grids_are_not_ranked_together(model, monkeypatch) -> None:
    monkeypatch.setattr(runner, "Generation", Knowing)
    table = needlebench_table([score(model), score(model, SPEC.replace(lengths=(900,)))], PaperResults())
    found = [index for index, header in enumerate(table.headers) if header.startswith("Overall (made-up")]
    assert len(found) == 2
    assert not any(mark for marks in table.marks for mark in marks)
    assert any(
        "; 900 tokens of bytes;" in text.replace("smoke budget 2 steps, batch 1, ", "; ") for text in table.settings
    )


def test_figures_and_table_of_a_record(model, monkeypatch, place) -> None:
    monkeypatch.setattr(runner, "Generation", Knowing)
    spec = SPEC.replace(lengths=(150, 900))
    record = score(model, spec)
    (maps,) = figures_9_to_14([record], PaperResults()).values()
    assert maps == heat_maps(record)
    assert maps.parts[0].title == "Single-needle retrieval: 100.00"
    by_depth = maps.parts[1].values
    assert by_depth == [(None, 100)] * 3
    assert maps.parts[1].means() == [None, 100]
    rows = figure_csv(maps).splitlines()
    assert rows[0] == "panel,column,Length (tokens),Depth (%),value,source,corpus,budget,device"
    assert f'Multi-needle retrieval: 100.00,0,150,50,,{record.id},made-up,"{record.budget_text}",cpu' in rows
    assert maps.note == (
        f"{record.id}: made-up, bytes tokens, {record.budget_text}, cpu; white line: the mean over the depths, "
        "0 at the bottom and 100 at the top; hatched: cannot be asked, not scored"
    )
    assert "hatched" not in heat_maps(score(model)).note
    assert lines(record)[-1].startswith("not scored: 14 cells, such as ")
    alone = score(model, spec.replace(tasks=("multi_retrieval",), languages=("en",)))
    assert lines(alone)[-1].startswith("not scored: one cell, multi_retrieval_en/150 (150 tokens less")
    pytest.importorskip("matplotlib")
    first, again = (write_figure(maps, place / name, "maps") for name in ("first", "again"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    summary = figure_5([record], PaperResults())
    assert [line.name for line in summary.parts[0].lines] == ["Rodimus+-1.6B", record.id]
    assert summary.parts[1].lines[1].xs == [900]
    assert summary.parts[0].lines[1].told()[0] == (record.id, "made-up", record.budget_text, "cpu")
    assert "not run: Mamba-1.4B, Mamba2-1.3B" in summary.parts[0].note
    table = needlebench_table([record], PaperResults())
    texts = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    assert "19.11" in texts["Rodimus+-1.6B"]
    assert "100.00" in texts["tiny"]
    assert not any("ncestry" in header for header in table.headers)
    asked = score(model, spec.replace(tasks=(*spec.tasks, "ancestry"), names=(2, 4)))
    headers = needlebench_table([asked], PaperResults()).headers
    assert any(header.startswith("Ancestry en circular (made-up") for header in headers)


def test_figures_9_to_14_are_of_the_papers_models(model, monkeypatch) -> None:
    monkeypatch.setattr(runner, "Generation", Knowing)
    record, paper = score(model), PaperResults()
    for number, name in enumerate(MODELS, 9):
        absent = FIGURES[f"figure{number:02d}"]([record], paper)
        assert name.removesuffix("-1.6B-4K") in absent.title
        assert absent.rows()[1][1:3] == ("not run", "rodimus-lab needlebench RUN")
        named = replace(record, label=MODELS[name][0])
        drawn = FIGURES[f"figure{number:02d}"]([record, named], paper)
        assert drawn == replace(heat_maps(named), title=absent.title)
        assert name not in figure_5([named], paper).parts[0].note.partition("not run: ")[2].split(" (")[0].split(", ")


def test_the_command(cli, smoke_run, tmp_path) -> None:
    folder = write_files(tmp_path / "files")
    arguments = ["needlebench", smoke_run.id, "--data-dir", folder, "--length-tokenizer", "model", "--device", "cpu"]
    arguments += ["--task", "single_retrieval", "--task", "ancestry", "--language", "en", "--length", 200]
    arguments += ["--depth", 100, "--depth", 0, "--repeats", 1, "--buffer", 100, "--max-new-tokens", 4]
    result = cli(*arguments)
    assert result.code == 0, result.err
    (record,) = load_records(experiment="needlebench")
    assert record.recipe["model"]["name"].endswith(f"/{smoke_run.id}")
    assert record.recipe["spec"]["depths"] == [0, 100]
    assert 0 <= record.metrics["single_retrieval"] <= 100
    assert 0 <= record.metrics["ancestry_en_circular"] <= record.metrics["ancestry_en"] <= 100
    assert "overall" not in record.metrics
    assert f"{record.id}: 20 cells; 200 tokens of pydoc-4096; depths 0, 100 %; en; repeats 1" in result.out
    assert {path.suffix for path in (smoke_run.root / "figures").iterdir()} == {".svg", ".pdf", ".png", ".csv"}
    assert cli(*arguments).out == result.out
    assert len(load_records(experiment="needlebench")) == 1


def test_ancestry_alone_has_no_heat_map(cli, smoke_run, tmp_path) -> None:
    folder = write_files(tmp_path / "files")
    arguments = ["needlebench", smoke_run.id, "--data-dir", folder, "--length-tokenizer", "model", "--device", "cpu"]
    arguments += ["--task", "ancestry", "--language", "en", "--repeats", 1, "--max-new-tokens", 2]
    before = sorted((smoke_run.root / "figures").glob("*"))
    result = cli(*arguments)
    assert result.code == 0, result.err
    assert "ancestry en" in result.out
    assert sorted((smoke_run.root / "figures").glob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--preset", "2k"], ["--preset", "'2k'", "'16k'"]),
        (["--task", "reading"], ["--task", "'reading'", "single_retrieval", "ancestry"]),
        (["--language", "de"], ["--language", "'de'", "en, zh"]),
        (["--length", "0"], ["--length", "1"]),
        (["--length", "500", "--length", "500"], ["--length names 500 twice; give it once"]),
        (["--depth", "0", "--depth", "5", "--depth", "0"], ["--depth names 0 twice; give it once"]),
        (["--task", "ancestry", "--task", "ancestry"], ["--task names ancestry twice"]),
        (["--language", "en", "--language", "en"], ["--language names en twice"]),
        (["--depth", "101"], ["--depth", "100"]),
        (["--length-tokenizer", "gpt9"], ["no tokenizer named 'gpt9'", "gpt-4"]),
        (["--dtype", "fp8"], ["--dtype", "'fp8'"]),
        (["--nope"], ["--nope", "rodimus-lab needlebench --help"]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_bad_arguments(cli, smoke_run, tmp_path, arguments, names) -> None:
    folder = write_files(tmp_path / "files")
    given = ["--data-dir", folder, "--device", "cpu", "--length-tokenizer", "model", *arguments]
    result = cli("needlebench", smoke_run.id, *given)
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    for name in names:
        assert name in result.err
    assert not load_records(experiment="needlebench")


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("needles.jsonl", None, "No such file"),
        ("needles.jsonl", b'{"needle": "x"}\n', "line 1 of needles.jsonl"),
        ("PaulGrahamEssays.jsonl", b"[1]\n", "line 1 of PaulGrahamEssays.jsonl"),
        ("PaulGrahamEssays.jsonl", b"\xff\n", "not UTF-8"),
        ("multi_needle_reasoning_en.json", b"{}", "multi_needle_reasoning_en.json"),
        (
            "multi_needle_reasoning_en.json",
            b'[{"derivation_count": "2", "derivations": ["a", "b"], "question": "c", "answer": "d"}]',
            "multi_needle_reasoning_en.json",
        ),
        (
            "multi_needle_reasoning_en.json",
            b'[{"derivation_count": 2, "derivations": "ab", "question": "c", "answer": "d"}]',
            "multi_needle_reasoning_en.json",
        ),
        ("names.json", b"[]", "names.json"),
    ],
)
def test_bad_files(cli, smoke_run, tmp_path, file, text, reason) -> None:
    folder = write_files(tmp_path / "files")
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_bytes(text)
    tasks = [part for task in ("single_retrieval", "multi_reasoning", "ancestry") for part in ("--task", task)]
    result = cli(
        "needlebench", smoke_run.id, "--data-dir", folder, "--language", "en", "--length-tokenizer", "model", *tasks,
        "--length", 200, "--max-new-tokens", 2,
    )  # fmt: skip
    assert result.code == 2
    assert reason in result.err
    assert result.err.count("\n") == 1


def test_questions_that_cannot_be_joined(cli, smoke_run, tmp_path) -> None:
    """Only multi-needle retrieval needs a format of the answer between quotes."""
    source = replace(SOURCE, needles=[needle._replace(question="What was hidden?") for needle in SOURCE.needles])
    folder = write_files(tmp_path / "files", source)
    arguments = ["needlebench", smoke_run.id, "--data-dir", folder, "--length-tokenizer", "model", "--device", "cpu"]
    arguments += ["--language", "en", "--length", 200, "--depth", 0, "--repeats", 1, "--buffer", 100]
    result = cli(*arguments, "--task", "multi_retrieval")
    assert result.code == 2
    assert "the question 'What was hidden?' of needles.jsonl has no format of its answer" in result.err
    assert result.err.count("\n") == 1
    assert not load_unfinished()
    assert cli(*arguments, "--task", "single_retrieval", "--max-new-tokens", 2).code == 0


def test_the_order_of_options_makes_no_other_run(cli, smoke_run, tmp_path) -> None:
    folder = write_files(tmp_path / "files")
    shared = ["needlebench", smoke_run.id, "--data-dir", folder, "--length-tokenizer", "model", "--device", "cpu"]
    shared += ["--depth", 50, "--repeats", 1, "--buffer", 100, "--max-new-tokens", 2]
    pairs = (("--length", "300", "200"), ("--task", "multi_retrieval", "single_retrieval"), ("--language", "zh", "en"))
    for turn in (1, -1):
        options = [part for option, *values in pairs for value in values[::turn] for part in (option, value)]
        assert cli(*shared, *options).code == 0
    (record,) = load_records(experiment="needlebench")
    assert record.recipe["spec"]["lengths"] == [200, 300]
    assert record.recipe["spec"]["tasks"] == ["single_retrieval", "multi_retrieval"]
    assert record.recipe["spec"]["languages"] == ["en", "zh"]


def test_files_are_read_as_they_were_written(tmp_path, monkeypatch) -> None:
    from evals.needlebench import open_source

    tasks = ("single_retrieval", "multi_reasoning", "ancestry")
    source = open_source(write_files(tmp_path / "needlebench"), tasks, ("en", "zh"))
    assert (source.haystacks, source.needles) == (SOURCE.haystacks, SOURCE.needles)
    assert (source.chains, source.names, source.origin) == (SOURCE.chains, SOURCE.names, "local files")
    monkeypatch.setenv("RODIMUS_LAB_DATA", str(tmp_path))
    assert open_source(None, tasks, ("zh", "en")) == source
    assert open_source(None, ("single_retrieval",), ("en",)).digest != source.digest
    assert open_source(None, ("ancestry",), ("en",)).haystacks == {}
