"""A list of recipes over Ray: side by side, with workers that die, and stopped in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import sweep_fakes
from sweep_fakes import attempts, recipe
from train_fakes import checkpoint_folder, options, run_folder

from rodimus_lab.errors import UserError
from rodimus_lab.records import PROJECT_ROOT
from rodimus_lab.sweep import SweepOptions, sweep

ray = pytest.importorskip("ray", reason="needs Ray: pip install -e '.[sweep]'")
LABELS = ("slow1", "slow2")


@pytest.fixture(scope="module")
def cluster():
    """Ray with two CPUs and two GPUs that are only counted, as the caller of a sweep may have started it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def metrics(root, recipe):
    return (run_folder(root, recipe) / "metrics.jsonl").read_bytes()


def weights(root, recipe):
    return (checkpoint_folder(root, recipe) / "final" / "model.safetensors").read_bytes()


def test_runs_end_by_themselves_and_as_in_one_process(tmp_path, cluster):
    """One worker is killed two steps after its second checkpoint, another is told to end, a third run is hopeless."""
    recipes = [recipe(label) for label in ("good", "killed", "terminated", "hopeless", "fragile")]
    outcomes = sweep(recipes, SweepOptions(), options(tmp_path / "ray"), run=sweep_fakes.run)
    good, killed, terminated, hopeless, fragile = outcomes
    assert [run.state for run in outcomes] == ["finished", "finished", "finished", "failed", "finished"]
    assert [run.attempts for run in outcomes] == [1, 2, 2, 1, 2]
    assert hopeless.reason == "the corpus is corrupt; fetch it again"
    sweep([good.recipe], SweepOptions(serial=True), options(tmp_path / "serial"), run=sweep_fakes.run)
    alone = metrics(tmp_path / "serial", good.recipe)
    for run in (good, killed, terminated, fragile):
        assert metrics(tmp_path / "ray", run.recipe) == alone, run.recipe.id
        assert run.record["metrics"]["steps"] == 12
        assert attempts(tmp_path / "ray", run.recipe) == run.attempts
    assert weights(tmp_path / "ray", good.recipe) == weights(tmp_path / "serial", good.recipe)
    assert killed.record["metrics"]["test_ppl"] == good.record["metrics"]["test_ppl"]


def test_a_worker_lost_for_good_is_a_failure_with_its_reason(tmp_path, cluster):
    (outcome,) = sweep([recipe("killed")], SweepOptions(retries=0), options(tmp_path), run=sweep_fakes.run)
    assert (outcome.state, outcome.attempts) == ("failed", 1)
    assert outcome.reason.startswith("its worker was lost (The worker died unexpectedly")


def test_workers_have_the_sweeps_places_and_run_side_by_side(tmp_path, cluster, monkeypatch):
    """Two shares of a GPU, too: the runs are told to use it."""
    variables = {"cache": "CACHE", "data": "DATA", "runs": "RESULTS", "checkpoints": "CHECKPOINTS"}
    for name, variable in variables.items():
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"RODIMUS_LAB_{variable}", name)
    monkeypatch.chdir(tmp_path)
    settings = SweepOptions(runs_per_gpu=2, cpus_per_run=1)
    pair = sweep([recipe("pair1"), recipe("pair2")], settings, run=sweep_fakes.places)
    assert [(run.state, run.reason) for run in pair] == [("finished", "")] * 2
    for run in pair:
        for name in variables:
            assert run.record[f"{name}_root"] == str(tmp_path / name)
        assert (run.record["cwd"], run.record["device"]) == (str(tmp_path), "cuda")
    assert len({os.getpid(), *(run.record["pid"] for run in pair)}) == 3
    single = sweep([recipe("single1"), recipe("single2")], replace(settings, jobs=1), run=sweep_fakes.places)
    assert [(run.state, run.reason) for run in single] == [("finished", "")] * 2


def test_what_no_machine_can_give_is_refused(tmp_path, cluster):
    with pytest.raises(UserError, match="cpus_per_run is 64, but no machine has more than 2 CPUs to give"):
        sweep([recipe("good")], SweepOptions(cpus_per_run=64), options(tmp_path), run=sweep_fakes.run)


@pytest.mark.slow
def test_from_the_command_line_over_a_cluster(places, texts, cluster):
    command = (
        "wikitext103 --budget smoke --device cpu --steps 2 --model transformer++ --model rodimus "
        f"--ray-address {cluster} --corpus {texts}"
    )
    done = subprocess.run(
        [sys.executable, "-m", "rodimus_lab.cli", *command.split()],
        cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list((places / "runs" / "wikitext103").glob("*/record.json"))) == 2
    assert done.stdout.count("test ppl") == 2
    assert (places / "tables" / "table1.md").exists()


@pytest.mark.slow
def test_ctrl_c_leaves_every_runs_checkpoint_of_its_step(tmp_path):
    recipes = [recipe(label, 30) for label in LABELS]
    # Its own process group, as a shell gives it: Ctrl-C reaches all of it, the engine and the workers too.
    process = subprocess.Popen(
        [sys.executable, sweep_fakes.__file__, str(tmp_path), *LABELS],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for each in recipes:
        file = run_folder(tmp_path, each) / "metrics.jsonl"
        while process.poll() is None and not (file.exists() and file.stat().st_size > 0):
            time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (out, err)
    assert "the sweep was stopped by SIGINT with 0 of 2 runs finished; the same command goes on" in err
    assert "Traceback" not in out + err
    for each in recipes:
        newest = max(checkpoint_folder(tmp_path, each).glob("step-*"))
        step = int(newest.name.removeprefix("step-"))
        assert 0 < step < 30
        # A line for each step, and one more for each evaluation: nothing was done that the checkpoint has not.
        assert len(metrics(tmp_path, each).splitlines()) == step + step // 5
    serial = SweepOptions(serial=True)
    (whole,) = sweep([recipe("good", 30)], serial, options(tmp_path), run=sweep_fakes.run)
    resumed = sweep(recipes, serial, options(tmp_path), run=sweep_fakes.run)
    assert [run.state for run in resumed] == ["finished", "finished"]
    for each in recipes:
        assert metrics(tmp_path, each) == metrics(tmp_path, whole.recipe)
