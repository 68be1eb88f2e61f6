"""A list of recipes, run one after another in this process."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from contextlib import ExitStack

import pytest
import sweep_fakes
import torch
from rich.console import Console
from sweep_fakes import attempts, recipe
from train_fakes import checkpoint_folder, options, run_folder

from rodimus_lab.errors import UserError
from rodimus_lab.sweep import Outcome, SweepOptions, failures, sweep
from rodimus_lab.sweep.board import Board, progress
from rodimus_lab.train import Interrupted, train

SERIAL = SweepOptions(serial=True)


def metrics(root, recipe):
    return (run_folder(root, recipe) / "metrics.jsonl").read_bytes()


def serially(root, labels, settings=SERIAL, *, steps=12, **changes):
    return sweep([recipe(label, steps) for label in labels], settings, options(root, **changes), run=sweep_fakes.run)


def test_every_run_ends_by_itself(tmp_path):
    good, fragile, broken, hopeless, last = serially(tmp_path, ["good", "fragile", "broken", "hopeless", "last"])
    assert [run.state for run in (good, fragile, broken, hopeless, last)] == [
        "finished", "finished", "failed", "failed", "finished",
    ]  # fmt: skip
    assert [run.attempts for run in (good, fragile, broken, hopeless, last)] == [1, 2, 3, 1, 1]
    assert good.record["metrics"]["steps"] == 12
    assert (run_folder(tmp_path, last.recipe) / "record.json").exists()
    assert metrics(tmp_path, fragile.recipe) == metrics(tmp_path, good.recipe)
    assert failures([good, fragile, broken, hopeless, last]) == (
        "2 of 5 runs failed:\n"
        f"  {broken.recipe.id}: RuntimeError: out of luck (3 attempts)\n"
        f"  {hopeless.recipe.id}: the corpus is corrupt; fetch it again"
    )
    assert failures([good, last]) is None


def test_finished_runs_are_skipped_and_no_recipe_is_run_twice(tmp_path):
    (first,) = serially(tmp_path, ["good", "good"])
    assert attempts(tmp_path, first.recipe) == 1
    again, other = serially(tmp_path, ["good", "other"])
    assert attempts(tmp_path, first.recipe) == 1
    assert (again.state, again.attempts, again.record) == ("finished", 0, first.record)
    assert other.attempts == 1


@pytest.mark.parametrize("text", ["{", "[]", "null", "{}", '{"metrics": {}, "device": "cpu"}'])
def test_a_corrupt_record(tmp_path, text):
    (first,) = serially(tmp_path, ["good"])
    record = run_folder(tmp_path, first.recipe) / "record.json"
    record.write_text(text)
    with pytest.raises(UserError, match=r"record\.json (is not|has no) .*; restore the file, or delete it and run"):
        serially(tmp_path, ["good"])
    with pytest.raises(UserError, match=r"record\.json (is not|has no) .*; restore the file, or delete it and run"):
        train(first.recipe, options(tmp_path))
    assert record.read_text() == text
    record.unlink()
    (again,) = serially(tmp_path, ["good"])
    assert again.record["metrics"]["steps"] == 12


def test_no_retries(tmp_path):
    (fragile,) = serially(tmp_path, ["fragile"], SweepOptions(serial=True, retries=0))
    assert (fragile.state, fragile.attempts) == ("failed", 1)


def test_a_second_attempt_does_not_start_afresh(tmp_path):
    """`resume=False` is about what an earlier sweep left."""
    asked = []

    def run(recipe, options):
        asked.append(options.resume)
        raise RuntimeError

    sweep([recipe("good")], SERIAL, options(tmp_path, resume=False), run=run)
    assert asked == [False, True, True]


def test_a_stop_that_was_asked_for_is_every_runs_own(tmp_path):
    outcomes = serially(tmp_path, ["good", "other"], stop_at_step=5)
    assert [outcome.state for outcome in outcomes] == ["stopped", "stopped"]
    assert failures(outcomes) is None
    assert [outcome.state for outcome in serially(tmp_path, ["good", "other"])] == ["finished", "finished"]


def test_a_signal_stops_the_sweep_and_nothing_is_lost(tmp_path):
    with pytest.raises(Interrupted, match="stopped by SIGTERM with 1 of 3 runs finished") as stop:
        serially(tmp_path, ["good", "terminated", "last"])
    assert stop.value.exit_code == 143
    assert (checkpoint_folder(tmp_path, recipe("terminated")) / "step-00000006").exists()
    assert not run_folder(tmp_path, recipe("last")).exists()
    outcomes = serially(tmp_path, ["good", "terminated", "last"])
    assert [outcome.attempts for outcome in outcomes] == [0, 1, 1]
    assert metrics(tmp_path, recipe("terminated")) == metrics(tmp_path, recipe("good"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_training(tmp_path, number):
    """While a run still reads its data, say."""

    def run(recipe, options):
        os.kill(os.getpid(), number)
        time.sleep(60)

    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=f"stopped by {number.name} with 0 of 1") as stop:
        sweep([recipe("good")], SERIAL, options(tmp_path), run=run)
    assert stop.value.exit_code == 128 + number
    assert signal.getsignal(signal.SIGTERM) is former


def test_outside_the_main_thread(tmp_path):
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.extend(serially(tmp_path, ["good"])))
    thread.start()
    thread.join()
    assert [outcome.state for outcome in outcomes] == ["finished"]


def test_a_second_sweep_leaves_a_run_under_way_alone(tmp_path):
    from rodimus_lab.train.checkpoint import hold

    with hold(checkpoint_folder(tmp_path, recipe("good"))):
        good, other = serially(tmp_path, ["good", "other"])
    assert (good.state, other.state) == ("failed", "finished")
    assert "another process is training into" in good.reason


def test_a_run_that_another_sweep_finished_meanwhile_is_no_failure(tmp_path):
    from rodimus_lab.train.checkpoint import hold

    elsewhere = ExitStack()
    elsewhere.enter_context(hold(checkpoint_folder(tmp_path, recipe("good"))))

    def run(asked, options):
        if asked.label == "other":  # By now the run that was under way elsewhere has come to its end there.
            elsewhere.close()
            sweep_fakes.run(recipe("good"), options)
        return sweep_fakes.run(asked, options)

    outcomes = sweep([recipe("good"), recipe("other")], SERIAL, options(tmp_path), run=run)
    assert [outcome.state for outcome in outcomes] == ["finished", "finished"]
    assert failures(outcomes) is None


def test_without_ray_it_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rodimus_lab.sweep.engine.find_spec", lambda name: None)
    (outcome,) = serially(tmp_path, ["good"], SweepOptions(jobs=2))
    assert outcome.state == "finished"
    assert "Ray is not installed, so the runs go one after another; pip install" in capsys.readouterr().out
    with pytest.raises(UserError, match="Ray is not installed, so there is no cluster to join"):
        serially(tmp_path, ["other"], SweepOptions(ray_address="auto"))


def test_torchrun_and_a_sweep_exclude_one_another(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="use one of them"):
        serially(tmp_path, ["good"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_no_gpu_to_share(tmp_path):
    with pytest.raises(UserError, match="no CUDA device is visible"):
        serially(tmp_path, ["good"], SweepOptions(runs_per_gpu=2))


def shown(board, width=120, height=20):
    console = Console(width=width, height=height, file=io.StringIO(), force_terminal=False)
    board._console = console
    console.print(board.table())
    return console.file.getvalue()


def test_the_table(tmp_path):
    settings = options(tmp_path)
    good, broken = serially(tmp_path, ["good", "broken"])
    waiting = Outcome.of(recipe("waiting"), settings)
    lines = shown(Board([good, broken, waiting])).splitlines()
    (row,) = [line for line in lines if good.recipe.id in line]
    rate = progress(good)[2]
    assert float(rate.replace(",", "")) > 0
    for text in ("12/12", "loss ", rate, "finished", " 1 "):
        assert text in row
    (row,) = [line for line in lines if broken.recipe.id in line]
    assert row.count(" - ") == 3
    assert " 3 " in row
    assert "1 failed, 1 waiting, 1 finished" in lines[-1]


def test_the_table_of_a_run_that_measures_accuracy(tmp_path):
    outcome = Outcome.of(recipe("good"), options(tmp_path))
    outcome.run.create({})
    for step in range(300):
        outcome.run.append_metrics({"step": step, "accuracy": step / 1000, "note": "x" * 100})
    with (outcome.run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 300, "accu')
    assert progress(outcome) == ("299/12", "accuracy 0.2990", "-")


def test_on_a_low_terminal_runs_under_way_come_first(tmp_path):
    outcomes = [Outcome.of(recipe(f"run{number}"), options(tmp_path)) for number in range(50)]
    outcomes[40].state = "running"
    out = shown(Board(outcomes), height=12)
    assert outcomes[40].recipe.id in out
    assert len(out.splitlines()) <= 12
    assert "1 running, 49 waiting" in out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jobs": 0}, "jobs is 0; it must be at least 1"),
        ({"runs_per_gpu": -1}, "runs_per_gpu is -1; it must be at least 1"),
        ({"cpus_per_run": 0}, "cpus_per_run is 0; it must be at least 1"),
        ({"retries": -1}, "retries is -1; it must be at least 0"),
        ({"serial": True, "jobs": 2}, "leave out serial or jobs"),
        ({"serial": True, "ray_address": "auto"}, "leave out serial or ray_address"),
    ],
)
def test_bad_options(settings, message):
    with pytest.raises(UserError, match=message):
        SweepOptions(**settings)
