"""Whatever is wrong ends in one sentence that names it, exit code 2, and nothing lost or half-written."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from rodimus_lab.experiment import EXPERIMENTS
from rodimus_lab.records import PROJECT_ROOT

SMOKE = ("wikitext103", "--budget", "smoke", "--device", "cpu", "--steps", 2)


def files(root):
    """Every file below `root` and what is in it; locks are empty and stay."""
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and "lock" not in path.name}


def refused(result, *names):
    """One sentence that holds `names`, and exit code 2."""
    assert result.code == 2, result
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1, result.err
    assert "Traceback" not in result.err
    assert result.err.lower().count("did you mean") <= 1, result.err
    for name in names:
        assert str(name) in result.err
    return True


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--nope"], ["--nope", "--help"]),
        (["wikitext103", "--nope"], ["--nope", "rodimus-lab wikitext103 --help"]),
        (["wikitext13"], ["'wikitext13'", "did you mean 'wikitext103'?", "params"]),
        (["data", "fetch"], ["'fetch'", "list, prepare", "rodimus-lab data --help"]),
        (["params"], ["'name'", "rodimus-lab params --help"]),
        (["params", "rodimsu"], ["no model named 'rodimsu'", "did you mean 'rodimus'?", "transformer++"]),
        (["params", "rodimus", "--size", "xxl"], ["no size named 'xxl'", "wikitext103"]),
        (["params", "rodimus", "--vocab-size", "1"], ["--vocab-size", "2"]),
        (["params", "rodimus", "--vocab-size", "many"], ["--vocab-size", "integer"]),
        (["wikitext103", "--model", "bert"], ["no model named 'bert'", "rodimus"]),
        (["wikitext103", "--budget", "huge"], ["--budget", "'huge'", "'paper', 'short', 'smoke'"]),
        ([*SMOKE, "--corpus", "pydocs"], ["no corpus named 'pydocs'", "did you mean 'pydoc'?", "wikitext-103"]),
        ([*SMOKE, "--corpus", "no/such/folder"], ["no corpus at 'no/such/folder'", "give a file, a folder or one of"]),
        (["data", "prepare", "pydocs"], ["no corpus named 'pydocs'"]),
        (["data", "prepare", "pydoc:5g"], ["no corpus named 'pydoc:5g'", "CORPUS:COUNT[@SEED], such as pile:7b@1"]),
        (["data", "prepare", ""], ["the corpus has no name", "pydoc"]),
        (["data", "prepare", "pydoc", "--tokenizer", "gpt9"], ["no tokenizer named 'gpt9'", "pydoc-4096"]),
        (["data", "prepare", "pydoc", "--workers", "0"], ["--workers", "1"]),
        (["report", "table0"], ["no report named 'table0'", "table1"]),
        (["report", "table1", "table0"], ["no report named 'table0'"]),
        (["generate", "rodimus-00000000", "--prompt", "a"], ["'rodimus-00000000'", "train the run first"]),
        (["generate", "any", "--prompt", "a", "--seed", 2**63], ["--seed", "9223372036854775807"]),
        (["chat", "any", "--seed", 2**63], ["--seed", "9223372036854775807"]),
        (["wikitext103", "--steps", "x"], ["--steps", "integer"]),
        (["wikitext103", "--steps", "1.5"], ["--steps", "integer"]),
        (["wikitext103", "--steps", "-3"], ["--steps", "greater than or equal to 1", "-3"]),
        (["wikitext103", "--budget", "short", "--steps", "0"], ["--steps", "greater than or equal to 1"]),
        (["wikitext103", "--budget", "paper", "--steps", "25001"], ["--steps", "25,001", "25,000"]),
        (["wikitext103", "--dropout", "2"], ["--dropout", "less than 1", "2.0"]),
        (["wikitext103", "--dropout", "nan"], ["--dropout"]),
        (["wikitext103", "--dropout", "much"], ["--dropout", "number"]),
        (["wikitext103", "--seed", "-1"], ["--seed", "greater than or equal to 0"]),
        (["wikitext103", "--seed", 2**63], ["seed", "less than 9223372036854775808"]),
        (["mqar", "--budget", "smoke", "--seed", 2**63], ["seed", "less than 9223372036854775808"]),
        ([*SMOKE, "--micro-batch-size", "0"], ["micro_batch_size", "at least 1"]),
        ([*SMOKE, "--checkpoint-every", "0"], ["checkpoint_every", "at least 1"]),
        ([*SMOKE, "--stop-at-step", "-1"], ["stop_at_step", "at least 1"]),
        (["scaling-laws", "--ratio", "inf"], ["--ratio", "finite"]),
        (["scaling-laws", "--json"], ["--json lists the runs", "add --dry-run"]),
        ([*SMOKE, "--max-seconds", "-1"], ["max_seconds is -1", "not be negative"]),
        ([*SMOKE, "--max-seconds", "soon"], ["--max-seconds", "number"]),
        (["bench", "ops", "--only", "scan"], ["no operator benchmark named 'scan'", "gated_linear", "mixers"]),
        (["needlebench", "rodimus-00000000"], ["'rodimus-00000000'", "train the run first"]),
        (["mqar", "--figure", "7"], ["--figure", "'7'", "'6', '1b'"]),
        (["mqar", "--budget", "paper", "--length", "64"], ["--length", "64", "128, 256, 512"]),
        (["mqar", "--budget", "paper", "--width", "65"], ["--width", "65", "64, 128, 256, 512"]),
        (["mqar", "--budget", "paper", "--expansion", "64"], ["--expansion", "--figure 1b"]),
        (["mqar", "--figure", "1b", "--budget", "paper", "--model", "rwkv4"], ["rwkv4", "rodimus+"]),
        (["mqar", "--budget", "smoke", "--model", "bert"], ["no model named 'bert'"]),
        (["mqar", "--lr", "0"], ["--lr", "greater than 0"]),
        (["mqar", "--lr", "fast"], ["--lr", "number"]),
        (["wikitext103", "--device", "tpu"], ["--device", "'tpu'", "'cpu', 'cuda'"]),
        (["wikitext103", "--model", "rodimus", "--model", "bert"], ["no model named 'bert'"]),
        (["wikitext103", "--jobs", "0"], ["jobs is 0", "at least 1"]),
        (["wikitext103", "--jobs", "many"], ["--jobs", "integer"]),
        (["wikitext103", "--runs-per-gpu", "-2"], ["runs_per_gpu is -2", "at least 1"]),
        (["wikitext103", "--cpus-per-run", "0"], ["cpus_per_run is 0", "at least 1"]),
        (["wikitext103", "--retries", "-1"], ["retries is -1", "at least 0"]),
        (["wikitext103", "--serial", "--jobs", "2"], ["leave out serial or jobs"]),
        (["wikitext103", "--ray-adress", "auto"], ["--ray-adress", "--ray-address"]),
        (["ablate"], ["nothing to ablate", "--table 12 to 18", "--gate"]),
        (["ablate", "--table", "9"], ["--table", "'9'", "12, 13, 14, 15, 16, 17, 18"]),
        (["ablate", "--gate", "alpha"], ["--gate", "'alpha'", "g, tau, beta-hat, beta"]),
        (["ablate", "--rank", "1,3"], ["--rank", "'3'", "1, 2, 4, 8, 16, 32, 64, 128"]),
        (["ablate", "--table", "15", "--layers", "24"], ["--layers", "'24'", "6"]),
        (["ablate", "--hops", "three"], ["--hops", "'three'", "two, one"]),
        (["memory-ppl", "--model", "rodimsu"], ["--model", "'rodimsu'", "rodimus+, mamba"]),
        (["memory-ppl", "--artefact", "table7", "--amount", "3"], ["--amount", "'3'", "1.2, 2.3, 4.7, 9.4"]),
        (["memory-ppl", "--model", "mamba", "--amount", "512"], ["--amount", "'512'", "16, 32, 64, 128"]),
        (["train", "no/such/recipe.json"], ["no/such/recipe.json", "No such file", "give a run's recipe.json"]),
        (["train", "."], ["cannot read .", "directory"]),
    ],
    ids=lambda value: (
        " ".join(map(str, value)) if value and value[0] in ("train", "params", "wikitext103", "mqar") else ""
    ),
)
def test_bad_arguments(cli, places, arguments, names):
    before = files(places)
    refused(cli(*arguments), *names)
    assert files(places) == before


@pytest.fixture
def recipe(smoke_run):
    """A good recipe's values; every test spoils one."""
    path = smoke_run.root / "runs" / "wikitext103" / smoke_run.id / "recipe.json"
    return json.loads(path.read_text())


def spoiled(values, path, value):
    *parents, last = path
    inner = values
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "names"),
    [
        (["sede"], 1, ["no key 'sede'", "did you mean 'seed'?"]),
        (["optimizer", "learning_rate"], 1, ["OptimizerConfig has no key 'learning_rate'", "lr"]),
        (["model", "pattern", 0, "hops", 0, 0, "nn"], 1, ["nn'"]),
        (["model", "pattern", 0, "hops", 0, 0, "kind"], "rodimsu", ["unknown kind 'rodimsu'", "'rodimus'"]),
        (["model", "pattern", 0, "hops", 0, 0, "kind"], [], ["unknown kind []"]),
        (["model", "pattern"], [], ["LanguageModelConfig.pattern", "at least 1"]),
        (["model", "d_model"], "wide", ["LanguageModelConfig.d_model", "'wide'"]),
        (["budget", "steps"], -1, ["BudgetConfig.steps", "-1"]),
        (["budget", "steps"], 2.5, ["BudgetConfig.steps", "2.5"]),
        (["schedule", "warmup_steps"], 2000, ["the warm-up takes 2000 steps, but the budget is 4", "shorten"]),
        (["optimizer", "lr"], None, ["OptimizerConfig.lr", "number"]),
        (["precision"], "fp8", ["precision", "'fp8'", "'bf16'"]),
        (["experiment"], "../elsewhere", ["experiment"]),
        (["data", "corpus"], "pydocs", ["no corpus named 'pydocs'"]),
        (["data", "tokenizer"], "gpt9", ["no tokenizer named 'gpt9'"]),
        (["data", "seq_len"], 10**6, ["shorten the sequence or choose a larger corpus"]),
        (["model", "vocab_size"], 4000, ["4096 tokens", "4000"]),
    ],
    ids=str,
)
def test_a_bad_recipe(cli, places, recipe, path, value, names):
    file = places / "recipe.json"
    file.write_text(json.dumps(spoiled(recipe, path, value)))
    before = files(places)
    refused(cli("train", file, "--device", "cpu"), *names)
    assert files(places) == before


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (b"", ["not JSON"]),
        (b"{", ["not JSON"]),
        (b"\xff\xfe\x00", ["not JSON"]),
        (b"[]", ["no JSON object"]),
        (b"null", ["no JSON object"]),
        (b"{}", ["experiment", "required"]),
    ],
)
def test_a_file_that_is_no_recipe(cli, places, text, names):
    file = places / "recipe.json"
    file.write_bytes(text)
    refused(cli("train", file), file, *names)


def flip(path, offset=-100):
    text = bytearray(path.read_bytes())
    text[offset] ^= 0xFF
    path.write_bytes(text)


def test_a_corrupt_shard(cli, places):
    shard = places / "cache" / "pydoc--pydoc-4096" / "valid-00000.bin"
    flip(shard)
    refused(cli(*SMOKE), f"the shard {shard} is corrupt", "delete it, and preparing or training makes it again")
    assert not (places / "runs").exists()
    shard.write_bytes(shard.read_bytes()[:-7])
    refused(cli(*SMOKE), f"the shard {shard} is corrupt", "bytes for")
    shard.unlink()
    assert cli("data", "prepare", "pydoc", "--workers", 1).code == 0
    assert shard.exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_corrupt_manifest(cli, places, text):
    manifest = places / "cache" / "pydoc--pydoc-4096" / "manifest.json"
    manifest.write_text(text)
    refused(cli(*SMOKE), manifest, "delete it")


def test_a_corrupt_tokenizer(cli, smoke_run):
    (tokenizer,) = (smoke_run.root / "cache" / "tokenizers").iterdir()
    tokenizer.write_text("{}")
    refused(cli("generate", smoke_run.id, "--prompt", "a"), tokenizer, "is not a tokenizer.json", "delete it")


@pytest.mark.parametrize(
    "spoil",
    [
        flip,
        lambda path: flip(path, 20),
        lambda path: path.write_bytes(path.read_bytes()[:-50]),
        lambda path: path.write_bytes(b""),
    ],
    ids=["a weight", "the header", "cut off", "empty"],
)
def test_damaged_weights(cli, smoke_run, spoil):
    weights = smoke_run.root / "checkpoints" / "wikitext103" / smoke_run.id / "final" / "model.safetensors"
    spoil(weights)
    result = cli("generate", smoke_run.id, "--prompt", "a")
    refused(result, f"{weights} is damaged", "train the run again")
    assert result.out == ""


def test_weights_without_their_recipe(cli, smoke_run):
    recipe = smoke_run.root / "checkpoints" / "wikitext103" / smoke_run.id / "final" / "recipe.json"
    recipe.unlink()
    refused(cli("generate", smoke_run.id, "--prompt", "a"), recipe.parent, "neither config.json nor recipe.json")


def test_a_damaged_checkpoint(cli, places):
    """The only one: the run says so, and does not begin afresh by itself."""
    assert cli(*SMOKE, "--stop-at-step", 1).code == 0
    (checkpoint,) = (places / "checkpoints" / "wikitext103").glob("*/step-*")
    flip(next((checkpoint / "tensors").iterdir()))
    before = files(places)
    refused(cli(*SMOKE), f"the checkpoint {checkpoint} is damaged", "checksum", "delete")
    assert files(places) == before


def test_a_run_whose_folder_was_pruned_and_its_checkpoint_not(cli, places):
    assert cli(*SMOKE, "--stop-at-step", 1).code == 0
    assert cli("runs", "prune", "--yes").code == 0
    refused(cli(*SMOKE, "--stop-at-step", 1), "metrics.jsonl", "fewer than", "--no-resume")
    assert cli(*SMOKE, "--stop-at-step", 1, "--no-resume").code == 0


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"metrics": 1}'])
@pytest.mark.parametrize("command", [("report", "table1"), ("runs",)], ids=" ".join)
def test_a_corrupt_record(cli, smoke_run, text, command):
    record = smoke_run.root / "runs" / "wikitext103" / smoke_run.id / "record.json"
    record.write_text(text)
    refused(cli(*command), record, "restore the file")
    assert not (smoke_run.root / "tables").exists()


@pytest.mark.parametrize("variable", ["RODIMUS_LAB_RESULTS", "RODIMUS_LAB_CHECKPOINTS", "RODIMUS_LAB_CACHE"])
def test_a_folder_that_cannot_be_written(cli, places, monkeypatch, variable):
    """A file stands where the folder should be, which stops even the superuser."""
    (places / "file").write_text("")
    monkeypatch.setenv(variable, str(places / "file" / "runs"))
    refused(cli(*SMOKE), places / "file")
    assert (places / "file").read_text() == ""


def test_a_data_root_that_is_no_folder(cli, places, monkeypatch):
    monkeypatch.setenv("RODIMUS_LAB_DATA", str(places / "nowhere"))
    refused(cli("wikitext103", "--budget", "short", "--steps", 2), "RODIMUS_LAB_DATA", places / "nowhere")


@contextmanager
def files_of_at_most(size):
    """A disk that is full once a file has so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 200_000], ids=["record", "metrics", "weights"])
def test_a_full_disk_in_training(cli, places, texts, size):
    assert cli("data", "prepare", texts, "--tokenizer", "pydoc-4096", "--workers", 1).code == 0
    with files_of_at_most(size):
        result = cli(*SMOKE, "--corpus", texts)
    refused(result, places, "free the disk")
    assert not list(places.rglob("*.tmp"))
    assert not list(places.rglob("record.json"))
    assert not list(places.rglob("model.safetensors"))


def test_a_full_disk_in_preparation(cli, places, monkeypatch):
    cache = places / "second cache"
    monkeypatch.setenv("RODIMUS_LAB_CACHE", str(cache))
    (cache / "tokenizers").mkdir(parents=True)
    (tokenizer,) = (places / "cache" / "tokenizers").iterdir()
    (cache / "tokenizers" / tokenizer.name).write_bytes(tokenizer.read_bytes())
    with files_of_at_most(tokenizer.stat().st_size * 2):
        result = cli("data", "prepare", "pydoc", "--workers", 1)
    lines = result.err.splitlines()
    assert result.code == 2
    assert lines[-1].startswith("error: the disk is full while writing ")
    assert "train-00000.bin" in lines[-1]
    assert not [path for path in cache.rglob("*") if path.suffix == ".tmp" or path.name == "train-00000.bin"]


def test_a_full_disk_in_reporting(cli, smoke_run):
    with files_of_at_most(10):
        refused(cli("report", "table1"), smoke_run.root / "tables" / "table1.md", "free the disk")
    assert not list((smoke_run.root / "tables").iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_no_gpu(cli, places):
    refused(cli(*SMOKE, "--device", "cuda"), "no CUDA device is visible", "choose the device cpu")
    refused(cli(*SMOKE, "--runs-per-gpu", 2), "no CUDA device is visible")


def test_no_network(places):
    """In a process of its own, as the Hub's client reads its settings once."""
    done = subprocess.run(
        [sys.executable, "-m", "rodimus_lab.cli", *map(str, SMOKE), "--corpus", "wikitext-103"],
        cwd=PROJECT_ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(places / "hub")},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: the train split of wikitext-103 is not local")
    assert "set RODIMUS_LAB_DATA to a folder that holds wikitext-103/wiki.train.tokens" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (places / "runs").exists()


def test_a_keyboard_interrupt_outside_training(cli, places, monkeypatch):
    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("rodimus_lab.cli.prepare", interrupted)
    result = cli("data", "prepare", "pydoc")
    assert (result.code, result.out) == (130, "")
    assert result.err == "interrupted; the same command goes on with what was finished\n"


def test_a_shadowed_package_is_named(cli, monkeypatch):
    from rodimus_lab.errors import UserError

    def shadowed():
        raise UserError("the package 'experiments' was found at /elsewhere, not in this project; uninstall it")

    monkeypatch.setattr("rodimus_lab.cli.commands", shadowed)
    refused(cli("runs"), "the package 'experiments' was found at /elsewhere")


def test_a_fault_of_our_own_is_not_hidden(cli, monkeypatch):
    """What no user can mend keeps its traceback."""

    def broken():
        raise ZeroDivisionError

    monkeypatch.setattr("rodimus_lab.cli.examine", broken)
    with pytest.raises(ZeroDivisionError):
        cli("doctor")


def test_every_experiment_checks_its_options():
    from rodimus_lab.errors import UserError

    for name in EXPERIMENTS:
        with pytest.raises(UserError, match="--nonsense: unexpected keyword argument"):
            EXPERIMENTS[name].recipes(nonsense=1)
