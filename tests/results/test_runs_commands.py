"""`rodimus-lab runs`: list, filter, compare, export, sample, prune."""

from __future__ import annotations

import errno
import io
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
from committed_runs import copy_three
from filelock import FileLock

from rodimus_lab.records import load_records

RODIMUS, PLUS = "rodimus-b6357da5", "rodimus_plus-36701bfc"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The committed runs of Table 1, one of them without its record."""
    root = tmp_path / "runs"
    copy_three(root)
    cut_off = root / "wikitext103" / "rodimus-cut0ff00"
    shutil.copytree(root / "wikitext103" / RODIMUS, cut_off)
    (cut_off / "record.json").unlink()
    monkeypatch.setenv("RODIMUS_LAB_RESULTS", str(root))
    monkeypatch.setenv("RODIMUS_LAB_CHECKPOINTS", str(tmp_path / "checkpoints"))
    monkeypatch.setattr("rodimus_lab.terminal.console.width", 40)  # Nothing may depend on it.
    return root


def test_runs_are_filtered_and_sorted(cli, root: Path) -> None:
    out = cli("runs", "--where", "test_ppl<60", "--corpus", "enwiki-25k", "--sort", "-steps", "--column", "lr").out
    assert RODIMUS in out
    assert "transformer" not in out
    assert "cut0ff" not in out
    assert "2 of 3 finished runs" in out
    assert "0.0005" in out
    ids = [run["id"] for run in json.loads(cli("runs", "--where", "steps=1500", "--sort", "test_ppl", "--json").out)]
    assert ids == [PLUS, RODIMUS, "transformer_pp-9d4b7f8d"]
    assert len(json.loads(cli("runs", "--experiment", "mqar", "--json").out)) == 0
    asked = json.loads(cli("runs", "--column", "lr", "--column", "repeats", "--json").out)
    assert [run.get("lr") for run in asked] == [5e-4] * 3 + [None], "the last has no record"
    assert asked[1]["repeats"] == 6


def test_two_runs_are_compared(cli, root: Path) -> None:
    out = cli("runs", "compare", RODIMUS, PLUS).out
    assert "model.repeats" in out
    assert "-2.5254" in out
    assert "noise is known where both recipes were run with several seeds" in out
    assert "46,681,856" in out, "whole, though it is a mean over seeds"
    assert cli("runs", "compare", "wikitext103/rodimus-b6", f"wikitext103/{PLUS}").code == 0
    parts = json.loads(cli("runs", "compare", RODIMUS, PLUS, "--json").out)
    assert {"setting": "model.repeats", "first": 12, "second": 6} in parts["recipe"]


def test_scores_on_texts_that_were_trained_on_say_so(cli, root: Path) -> None:
    path = root / "wikitext103" / RODIMUS / "record.json"
    record = json.loads(path.read_text())
    record["metrics"]["recall_squad.contains"] = 0.25
    path.write_text(json.dumps(record))
    said = "at least 24 of the 48 articles of SQuAD's dev set"
    assert said in cli("runs", "compare", RODIMUS, PLUS).out
    assert said in cli("runs", "--column", "recall_squad.contains").out
    assert said not in cli("runs").out


def test_a_committed_run_has_no_weights_and_the_error_says_so(cli, root: Path) -> None:
    result = cli("generate", RODIMUS, "--prompt", "a")
    assert result.code == 2
    assert f"'{RODIMUS}' has a record, but no weights" in result.err
    assert "set RODIMUS_LAB_RESULTS to another folder" in result.err


def test_runs_are_exported(cli, root: Path, tmp_path: Path) -> None:
    result = cli("runs", "export", tmp_path / "out" / "runs.csv", "--where", "model=rodimus")
    assert (result.code, result.err) == (0, "")
    (row,) = pd.read_csv(tmp_path / "out" / "runs.csv").to_dict("records")
    assert (row["id"], row["test_ppl"], row["recipe.optimizer.lr"]) == (RODIMUS, 59.483677, 5e-4)
    pytest.importorskip("pyarrow")
    assert cli("runs", "export", tmp_path / "runs.parquet").code == 0
    table = pd.read_parquet(tmp_path / "runs.parquet")
    assert len(table) == 3
    assert table["test_ppl"].dtype.kind == "f"


def test_settings_of_several_sorts_are_text_in_parquet(cli, root: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = root / "wikitext103" / RODIMUS / "env.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dirty": "unknown", "empty": []}))
    result = cli("runs", "export", tmp_path / "runs.parquet")
    assert (result.code, result.err) == (0, "")
    table = pd.read_parquet(tmp_path / "runs.parquet").set_index("id")
    assert table.loc[RODIMUS, "env.dirty"] == "unknown"
    assert set(table["env.dirty"]) == {"unknown", "true"}
    assert table.loc[RODIMUS, "env.empty"] == "[]"
    assert table["recipe.optimizer.lr"].dtype.kind == "f"


def test_no_run_replaces_no_export(cli, root: Path, tmp_path: Path) -> None:
    there = tmp_path / "runs.csv"
    there.write_text("an older export")
    result = cli("runs", "export", there, "--where", "model=nothing")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: no finished run is chosen, so {there} is not written")
    assert there.read_text() == "an older export"


def test_a_file_is_exported_whole_or_not_at_all(cli, root: Path, tmp_path: Path, monkeypatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    there = tmp_path / "runs.csv"
    there.write_text("an older export")
    monkeypatch.setattr("os.fsync", refuse)
    result = cli("runs", "export", there)
    assert (result.code, result.err) == (
        2,
        f"error: cannot write {there} (no space left on device); free the disk or choose another place\n",
    )
    assert there.read_text() == "an older export"
    assert not list(tmp_path.glob(".runs.csv*"))


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_is_asked_for_in_one_sentence(cli, root: Path, tmp_path: Path) -> None:
    result = cli("runs", "export", tmp_path / "wandb", "--wandb")
    assert result.code == 2
    assert result.err == "error: W&B's format needs wandb, which is not installed; install it with: pip install wandb\n"
    assert not (tmp_path / "wandb").exists()


def test_wandb_gets_settings_lines_and_summary(cli, root: Path, tmp_path: Path, monkeypatch) -> None:
    """Held to a stand-in with wandb's names, for wandb itself is no part of the set-up."""
    (tmp_path / "wandb.py").write_text(
        "import json\n"
        "class Run:\n"
        "    def __init__(self, **values): self.values, self.lines, self.summary = values, [], {}\n"
        "    def log(self, values, step): self.lines.append((step, values))\n"
        "    def finish(self):\n"
        "        last, ppl = self.lines[-1][0], self.summary['test_ppl']\n"
        "        facts = dict(self.values, lines=len(self.lines), last=last, ppl=ppl)\n"
        "        open(self.values['dir'] + '/' + self.values['name'] + '.json', 'w').write(json.dumps(facts))\n"
        "def init(**values): return Run(**values)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert cli("runs", "export", tmp_path / "offline", "--wandb", "--where", "model=rodimus").code == 0
    facts = json.loads((tmp_path / "offline" / f"{RODIMUS}.json").read_text())
    assert (facts["mode"], facts["last"], facts["ppl"]) == ("offline", 1500, 59.483677)
    assert facts["config"]["recipe"]["label"] == "rodimus"
    assert facts["lines"] == len((root / "wikitext103" / RODIMUS / "metrics.jsonl").read_text().splitlines())


def test_prune_takes_unfinished_runs_and_asks(cli, root: Path, monkeypatch) -> None:
    cut_off = root / "wikitext103" / "rodimus-cut0ff00"
    monkeypatch.setattr("typer.confirm", lambda question: False)
    assert "nothing was deleted" in cli("runs", "prune").out
    assert cut_off.is_dir()
    asked = []
    monkeypatch.setattr("typer.confirm", lambda question: asked.append(question) or True)
    assert "deleted: 1" in cli("runs", "prune").out
    assert asked[0].startswith("Delete 1 of the runs under ")
    assert not cut_off.exists()
    assert "there is nothing to prune" in cli("runs", "prune", "--yes").out
    assert len(load_records(root)) == 3


def test_prune_deletes_nothing_where_nobody_can_be_asked(cli, root: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    result = cli("runs", "prune")
    assert (result.code, result.err.splitlines()[-1]) == (
        2,
        "error: nothing was deleted, for nobody is there to be asked; add --yes",
    )
    assert (root / "wikitext103" / "rodimus-cut0ff00").is_dir()


def test_finished_runs_stay_unless_told_twice(cli, root: Path) -> None:
    result = cli("runs", "prune", RODIMUS, "--yes")
    assert result.code == 2
    assert result.err == f"error: finished: {RODIMUS}; add --finished to delete a finished run's record too\n"
    assert len(load_records(root)) == 3
    assert cli("runs", "prune", RODIMUS, "--yes", "--finished").code == 0
    assert RODIMUS not in [record.id for record in load_records(root)]


def test_prune_stays_inside_the_root(cli, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(root / "wikitext103" / "rodimus-cut0ff00", outside)
    (root / "wikitext103" / "rodimus-linked00").symlink_to(outside)
    for name, said in (
        ("rodimus-linked00", "leads out of"),
        ("../../outside", "there is no run '../../outside'"),
        ("/", "there is no run '/'"),
    ):
        result = cli("runs", "prune", name, "--yes")
        assert result.code == 2
        assert said in result.err
    assert cli("runs", "prune", "--yes").code == 2, "the link among the unfinished ones"
    assert (outside / "recipe.json").is_file()


def test_a_run_under_way_is_not_pruned(cli, root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "wikitext103" / "rodimus-cut0ff00"
    folder.mkdir(parents=True)
    with FileLock(folder / "lock"):
        result = cli("runs", "prune", "--yes")
    assert (result.code, result.err) == (
        2,
        "error: wikitext103/rodimus-cut0ff00 is being trained; wait for it or stop it\n",
    )
    assert cli("runs", "prune", "--yes").code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--where", "model"], "'model' is no condition"),
        (["--where", "test_ppl<low"], "test_ppl is a number, and 'low' is none"),
        (["--where", "test_ppl<nan"], "test_ppl is a number, and 'nan' is none"),
        (["--where", "dirty=maybe"], "dirty is true or false, and 'maybe' is neither"),
        (["--sort", "qqqq"], "no run has a 'qqqq'; rodimus-lab runs export FILE.csv writes all that there is"),
        (["--sort", "test_pl"], "no run has a 'test_pl'; did you mean 'test_ppl'?"),
        (["--sort=-"], "no run has a ''"),
        (["--column", "beauty"], "no run has a 'beauty'"),
        (["--column", "", "--json"], "no run has a ''"),
        (["--corpus", ""], "no finished run on a corpus named ''"),
        (["--experiment", "wikitext3"], "no run of an experiment named 'wikitext3'; did you mean 'wikitext103'?"),
        (["--corpus", "enwiki"], "no finished run on a corpus named 'enwiki'; did you mean 'enwiki-25k'?"),
        (["export", "--experiment", "wikitext3", "runs.csv"], "no run of an experiment named 'wikitext3'"),
        (["compare", "rodimus-b", "lstm"], "there is no finished run 'lstm'; see rodimus-lab runs"),
        (["compare", "rodimus-b", "rodimus-b6357da6"], "did you mean 'rodimus-b6357da5'? see rodimus-lab runs"),
        (["compare", "wikitext103/r", "lstm"], "'wikitext103/r' names 2 runs"),
        (["export", "/proc/runs.csv"], "cannot write /proc/runs.csv (no such file or directory)"),
        (["export", "/dev/null/runs.parquet"], "cannot write /dev/null/runs.parquet ("),
        (["export", "runs.txt"], "runs.txt ends in neither .csv nor .parquet"),
        (["--where", "model=rodimus", "export", "runs.csv"], "the options go after export"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(cli, root: Path, arguments: list[str], said: str) -> None:
    result = cli("runs", *arguments)
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert said in result.err
    assert result.err.count("\n") == 1


def test_samples_are_kept_beside_the_record(cli, smoke_run) -> None:
    first = cli("runs", "sample", smoke_run.id, "--prompt", "The built-in", "--max-new-tokens", 5)
    assert (first.code, first.err) == (0, "")
    again = cli("runs", "sample", smoke_run.id, "--prompt", "A", "--max-new-tokens", 5, "--seed", 1)
    assert again.code == 0
    path = smoke_run.root / "runs" / "wikitext103" / smoke_run.id / "samples.jsonl"
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert [sample["prompt"] for sample in samples] == ["The built-in", "A"]
    assert first.out == f"The built-in{samples[0]['text']}\n"
