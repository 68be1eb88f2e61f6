"""The command line as it is meant to be used."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise

import pytest

from rodimus_lab import build_model, model_config
from rodimus_lab.data import train_bpe
from rodimus_lab.experiment import EXPERIMENTS, REPORTS
from rodimus_lab.nn.zoo import MODELS, SIZES
from rodimus_lab.records import PROJECT_ROOT, load_records
from rodimus_lab.report import FIGURES, NotRun, PaperResults, quoted_tables

COMMANDS = [
    [],
    ["wikitext103"],
    ["ablate"],
    ["memory-ppl"],
    ["mqar"],
    ["needle"],
    ["needlebench"],
    ["gates"],
    ["train"],
    ["report"],
    ["runs"],
    ["runs", "compare"],
    ["runs", "export"],
    ["runs", "prune"],
    ["params"],
    ["doctor"],
    ["generate"],
    ["data"],
    ["data", "list"],
    ["data", "prepare"],
]


def process(*arguments, launcher=(), **options):
    command = [sys.executable, "-m", *launcher, "rodimus_lab.cli", *map(str, arguments)]
    environment = dict(os.environ)
    return subprocess.Popen(
        command, cwd=PROJECT_ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(cli, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    result = cli(*command, "--help")
    assert (result.code, result.err) == (0, "")
    assert " ".join(["Usage: rodimus-lab", *command]) in result.out
    assert "…" not in result.out, "something is cut off"


def test_help_names_every_command_and_every_model(cli):
    out = cli("--help").out
    for name in [*EXPERIMENTS, *(command[0] for command in COMMANDS if command)]:
        assert re.search(rf"^│ {name} ", out, re.MULTILINE)
    out = " ".join(cli("wikitext103", "--help").out.replace("│", " ").split())
    assert f"One of {', '.join(MODELS)}." in out


def test_no_command_shows_the_help(cli):
    result = cli()
    assert result.code == 2
    assert "Usage: rodimus-lab" in result.out + result.err


def test_version(cli):
    from rodimus_lab import __version__

    assert cli("--version").out == f"rodimus-lab {__version__}\n"


@pytest.mark.parametrize("name", list(MODELS))
def test_params_are_those_of_the_built_model(cli, name):
    result = cli("params", name, "--size", "smoke", "--vocab-size", 300, "--json")
    facts = json.loads(result.out)
    model = build_model(name, size="smoke", vocab_size=300)
    assert facts["params"] == sum(parameter.numel() for parameter in model.parameters())
    whole = facts["params_embedding"] + sum(facts["params_by_sublayer"].values()) + facts["params_other"]
    assert (whole, facts["vocab_size"], facts["params_embedding"]) == (facts["params"], 300, 300 * 128)
    assert facts["context"] == SIZES["smoke"].context


def test_params_in_words(cli):
    result = cli("params", "rodimus")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("rodimus at wikitext103: 46,681,856 parameters\n")
    assert cli("params", "rodimus_plus").out.startswith("rodimus+ at wikitext103: 48,454,400 parameters\n")


def test_build_model_takes_a_size_a_vocabulary_and_overrides():
    model = build_model("transformer_pp", size="smoke", vocab_size=50, dropout=0.25, attention={"window": 8})
    config = model.config
    assert (config.vocab_size, config.dropout) == (50, 0.25)
    windows = [sub.window for block in config.blocks for sub in block.sublayers if sub.kind == "attention"]
    assert windows == [8, 8]
    assert config == model_config("transformer++", size="smoke", vocab_size=50, dropout=0.25, attention={"window": 8})


def test_runs(cli, smoke_run):
    (run,) = json.loads(cli("runs", "--json").out)
    assert (run["id"], run["budget"], run["corpus"]) == (
        smoke_run.id,
        "smoke budget 4 steps, batch 8, 8.19k tokens",
        "pydoc",
    )
    (smoke_run.root / "runs" / "wikitext103" / smoke_run.id / "record.json").unlink()
    (run,) = json.loads(cli("runs", "--json").out)
    assert (run["finished"], run["step"]) == (None, 4)
    assert "at step 4" in cli("runs").out


def test_no_runs_yet(cli, places):
    assert json.loads(cli("runs", "--json").out) == []
    result = cli("runs")
    assert (result.code, result.out) == (0, f"there is no run under {places / 'runs'} yet\n")


def test_reports_are_written_beside_the_runs(cli, smoke_run):
    before = {path: path.read_bytes() for path in (PROJECT_ROOT / "results" / "tables").iterdir()}
    result = cli("report", "table1")
    assert (result.code, result.err) == (0, "")
    tables = smoke_run.root / "tables"
    assert sorted(path.name for path in tables.iterdir()) == ["table1.csv", "table1.md", "table1.tex"]
    assert smoke_run.id in (tables / "table1.md").read_text()
    assert f"written: {tables / 'table1.md'}, " in result.out
    assert before == {path: path.read_bytes() for path in (PROJECT_ROOT / "results" / "tables").iterdir()}


def test_figures_are_drawn_beside_the_runs(cli, places):
    result = cli("figures", "figure07")
    assert (result.code, result.err) == (0, "")
    drawn = [places / "figures" / f"figure07.{suffix}" for suffix in ("svg", "pdf", "png", "csv")]
    assert result.out == f"written: {', '.join(map(str, drawn))}\n"
    assert all(path.stat().st_size for path in drawn)
    unknown = cli("figures", "figure7")
    assert (unknown.code, unknown.err.partition(" known: ")[0]) == (
        2, "error: there is no figure named 'figure7'; did you mean 'figure07'?",
    )  # fmt: skip


def test_a_figure_of_several_is_drawn_by_the_name_of_its_file(cli, places, monkeypatch):
    parts = {end: NotRun(f"Part {end}", "rodimus-lab mqar") for end in ("128", "256")}
    monkeypatch.setitem(FIGURES._things, "several", lambda records, paper: parts)
    assert cli("figures", "several-256").code == 0
    assert {path.stem for path in (places / "figures").iterdir()} == {"several-256"}
    for name, near in (("several-257", "several-256"), ("figure06", "figure06-512"), ("figure06-12", "figure06-128")):
        unknown = cli("figures", name)
        said = f"error: there is no figure named {name!r}; did you mean {near!r}?"
        assert (unknown.code, unknown.err.partition(" known: ")[0]) == (2, said)


def test_a_table_that_is_only_quoted_is_reported_by_its_name(cli, places):
    result = cli("report", "table3", "table5")
    assert (result.code, result.err) == (0, "")
    assert "# Table 3. Notation" in result.out
    there = PROJECT_ROOT / "results" / "tables" / "table3.md"
    assert (places / "tables" / "table3.md").read_text() == there.read_text()
    unknown = cli("report", "table3", "table33")
    assert unknown.code == 2
    assert unknown.err.startswith("error: there is no report named 'table33'; did you mean 'table3'? known: ")


def test_report_takes_all_by_default(cli, places):
    assert cli("report", "--no-site").code == 0
    assert {path.stem for path in (places / "tables").iterdir()} == {
        *REPORTS,
        *quoted_tables(list(REPORTS), PaperResults()),
    }
    assert not (places / "site").exists()


def test_data_list(cli, places):
    out = cli("data", "list").out
    assert "wikitext-103  Hub: Salesforce/wikitext, wikitext-103-v1" in out
    assert "pydoc         CPython" in out
    assert "A stand-in for WikiText-103" in out


def test_data_prepare(cli, places, texts):
    (places / "tokenizer.json").write_text(train_bpe(["some words"], 260).to_str())
    result = cli("data", "prepare", texts, "--tokenizer", places / "tokenizer.json", "--workers", 1)
    assert result.code == 0
    assert [line.split()[0] for line in result.out.splitlines()[:3]] == ["train", "valid", "test"]
    assert re.search(r"train +[\d,]+ tokens +1,500 words +1 documents", result.out)
    shards = {path: path.stat().st_mtime_ns for path in (places / "cache").glob("texts*/*.bin")}
    assert len(shards) == 3
    assert cli("data", "prepare", texts, "--tokenizer", places / "tokenizer.json").out == result.out
    assert {path: path.stat().st_mtime_ns for path in (places / "cache").glob("texts*/*.bin")} == shards


def tiny_recipe(smoke_run, texts, **changes):
    """The smoke run's recipe on three short texts, as a file."""
    values = json.loads((smoke_run.root / "runs" / "wikitext103" / smoke_run.id / "recipe.json").read_text())
    values["data"] |= {"corpus": str(texts), "seq_len": 16}
    values["budget"] |= {"steps": 3, "batch_size": 2}
    path = smoke_run.root / "recipe.json"
    path.write_text(json.dumps(values | changes))
    return path


def test_train_a_recipe_and_find_it_finished(cli, smoke_run, places, texts):
    recipe = tiny_recipe(smoke_run, texts)
    first = cli("train", recipe, "--device", "cpu", "--micro-batch-size", 1)
    assert first.code == 0, first.err
    (record,) = [record for record in load_records(places / "runs") if record.id != smoke_run.id]
    assert record.metrics["steps"] == 3
    assert record.env["micro_batch_size"] == 1
    assert record.id in first.out
    again = cli("train", places / "runs" / "wikitext103" / record.id / "recipe.json", "--device", "cpu")
    assert (again.code, again.err) == (0, "")
    assert "is finished; its record is" in again.out


def test_a_session_ends_as_asked_and_goes_on(cli, smoke_run, texts):
    recipe = tiny_recipe(smoke_run, texts, seed=5)
    stopped = cli("train", recipe, "--device", "cpu", "--stop-at-step", 2)
    assert stopped.code == 0
    said = stopped.err.splitlines()[-1]
    assert re.fullmatch(r"rodimus-\w{8} was stopped as asked after step 2 of 3; its checkpoint is written, .*", said)
    resumed = cli("train", recipe, "--device", "cpu")
    assert resumed.code == 0
    assert "resumed at step 2" in resumed.out


def test_an_option_given_twice_makes_two_runs(cli, places, texts):
    command = ("wikitext103", "--budget", "smoke", "--device", "cpu", "--steps", 2, "--corpus", texts, "--serial")
    first = cli(*command, "--seed", 3, "--seed", 4)
    assert first.code == 0, first.err
    records = load_records(places / "runs")
    assert {record.recipe["seed"] for record in records} == {3, 4}
    for record in records:
        assert f"{record.id}: test ppl {record.metrics['test_ppl']:.2f}" in first.out
        assert f"{record.id}  running (attempt 1)" in first.out
    assert "table1.md" in first.out
    again = cli(*command, "--seed", 3, "--seed", 4)
    assert again.code == 0
    assert "running" not in again.out
    assert load_records(places / "runs") == records


def test_a_run_that_fails_beside_a_good_one(cli, smoke_run, places, texts):
    good = tiny_recipe(smoke_run, texts)
    values = json.loads(good.read_text())
    bad = places / "bad.json"
    bad.write_text(json.dumps(values | {"data": values["data"] | {"corpus": "no/such/folder"}}))
    result = cli("train", bad, good, "--device", "cpu", "--serial")
    assert result.code == 1
    count, failed = result.err.splitlines()[-2:]
    assert count == "1 of 2 runs failed:"
    assert re.fullmatch(r"  rodimus-\w{8}: there is no corpus at 'no/such/folder'; give a file, .*", failed)
    assert len(load_records(places / "runs")) == 2, "the smoke run and the good one"


def test_the_executable(places):
    """Through a process of its own: an answer, its exit code, and nothing else said."""
    done = process("params", "rodimus", "--json")
    out, err = done.communicate(timeout=60)
    assert (done.returncode, err) == (0, "")
    assert json.loads(out)["params"] == 46681856


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_an_interrupt_leaves_a_checkpoint(cli, places):
    running = process("wikitext103", "--budget", "smoke", "--device", "cpu", "--steps", 3000)
    assert running.stdout is not None
    seen = ""
    while "parameters" not in seen:
        line = running.stdout.readline()
        assert line, running.communicate()[1]
        seen += line
    metrics = next((places / "runs" / "wikitext103").iterdir()) / "metrics.jsonl"
    while not metrics.exists() and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    step = re.fullmatch(
        r"rodimus-\w{8} was stopped by SIGINT after step (\d+) of 3000; its checkpoint is written, "
        r"and the same command goes on from there\n",
        err,
    )
    assert step, err
    resumed = cli("wikitext103", "--budget", "smoke", "--device", "cpu", "--steps", 3000, "--stop-at-step", 1)
    assert resumed.code == 0
    assert f"resumed at step {step[1]}" in resumed.out


@pytest.mark.slow
def test_two_processes_speak_once(places, texts):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), "-m")
    command = ("wikitext103", "--budget", "smoke", "--steps", 2, "--corpus", texts, "--device", "cpu")
    done = process(*command, launcher=launcher)
    out, err = done.communicate(timeout=200)
    assert done.returncode == 0, err
    assert "Traceback" not in err
    for once in ("budget: smoke", "step 2/2", "smoke budget 2 steps, batch 8, 2 x cpu", "written: "):
        assert out.count(once) == 1, once
    (record,) = load_records(places / "runs")
    assert record.env["world_size"] == 2
    assert (places / "tables" / "table1.md").exists()


def test_commands_stand_in_a_fixed_order(cli):
    """Experiments before what is made of them."""
    out = cli("--help").out
    places = [out.index(f"─ {panel} ─") for panel in ("Experiments", "Results", "Models")]
    assert all(a < b for a, b in pairwise(places))
