"""Two processes with gloo against one."""

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import train_fakes
from train_fakes import checkpoint_folder, memory_feed, options, run_folder, tiny_recipe

from rodimus_lab.convert import open_checkpoint
from rodimus_lab.errors import UserError
from rodimus_lab.records import RunDir
from rodimus_lab.train import Interrupted, train
from rodimus_lab.train.distributed import session

CHANGES = {"dropout": 0.0}  # The ranks drop other activations than one process does.
RECIPE = tiny_recipe(**CHANGES)


def torchrun(root, *, settings=None, faults=None, changes=CHANGES, restarts=0):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command += ["--max-restarts", str(restarts)]
    command += [
        train_fakes.__file__,
        str(root),
        json.dumps(changes),
        json.dumps(settings or {}),
        json.dumps(faults or {}),
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)


def metrics(root, recipe=RECIPE):
    return RunDir(root / "runs", recipe.experiment, recipe.id).read_metrics()


def same(parts, whole):
    assert [line["step"] for line in parts] == [line["step"] for line in whole]
    for a, b in zip(parts, whole, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    train(RECIPE, options(root), open_feed=memory_feed)
    return root


def test_from_two_processes_to_one(tmp_path, whole):
    done = torchrun(tmp_path, settings={"stop_at_step": 6, "micro_batch_size": 3})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("was stopped as asked after step 6") == 1
    shards = list((checkpoint_folder(tmp_path, RECIPE) / "step-00000006" / "tensors").iterdir())
    assert len(shards) == 2
    same(metrics(tmp_path), [line for line in metrics(whole) if line["step"] <= 6])
    train(RECIPE, options(tmp_path), open_feed=memory_feed)
    same(metrics(tmp_path), metrics(whole))


def test_from_one_process_to_two(tmp_path, whole):
    with pytest.raises(Interrupted):
        train(RECIPE, options(tmp_path, stop_at_step=6), open_feed=memory_feed)
    done = torchrun(tmp_path)
    assert done.returncode == 0, done.stderr
    same(metrics(tmp_path), metrics(whole))
    record = json.loads((run_folder(tmp_path, RECIPE) / "record.json").read_text())
    assert record["device"] == "2 x cpu"
    parts, once = (open_checkpoint(checkpoint_folder(root, RECIPE)).build() for root in (tmp_path, whole))
    for a, b in zip(parts.parameters(), once.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-5


def test_a_failing_rank_speaks_alone(tmp_path):
    done = torchrun(tmp_path, faults={3: "fail on rank 1"})
    assert done.returncode != 0
    assert done.stderr.count("rank 1: the shard train-00003.bin is corrupt; delete it") == 1
    assert "Traceback (most recent call last)" not in done.stderr.split("elastic")[0]
    assert not (run_folder(tmp_path, RECIPE) / "record.json").exists()


def test_a_killed_rank_and_a_full_disk_are_named_and_the_job_goes_on_by_itself(tmp_path, whole):
    """Killed at batch 7, after the checkpoint of step 4; started again, that of step 8 finds no room on rank 1."""
    done = torchrun(tmp_path, faults={7: "kill rank 1, then fill its disk"}, restarts=2)
    assert done.returncode == 0, done.stderr
    lost = "rank 1 of 2 ended without a word; the last checkpoint is kept, and the same command goes on from there"
    assert done.stderr.count(lost) == 1
    assert done.stderr.count("random-00001.safetensors (") == done.stderr.count("free the disk or") == 1
    assert "Traceback (most recent call last)" not in done.stderr
    assert (run_folder(tmp_path, RECIPE) / "record.json").exists()
    same(metrics(tmp_path), metrics(whole))


def test_ranks_that_do_not_meet_say_where(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("rodimus_lab.train.distributed.MEETING", timedelta(seconds=1))
    with pytest.raises(UserError, match=f"rank 1 of 2 does not meet the others at 127.0.0.1:{port}"), session("cpu"):
        pass


def test_ranks_are_grouped_by_divisors_of_their_number():
    for groups, told in (({"parts": 2}, "sequence_parallel is 2"), ({"replicas": 3}, "replicas is 3")):
        with pytest.raises(UserError, match=f"{told}, which does not divide 1 rank;"), session("cpu", **groups):
            pass


def test_from_split_sequences_and_two_replicas_to_one_process(tmp_path):
    """Two ranks that hold the model each (HSDP) and half of every sequence, saving as they go."""
    changes = CHANGES | {"mixing": True}
    recipe = tiny_recipe(**changes)
    train(recipe, options(tmp_path / "whole"), open_feed=memory_feed)
    settings = {"sequence_parallel": 2, "replicas": 2, "async_save": True, "stop_at_step": 6}
    done = torchrun(tmp_path, settings=settings, changes=changes)
    assert done.returncode == 0, done.stderr
    expected = metrics(tmp_path / "whole", recipe)
    same(metrics(tmp_path, recipe), [line for line in expected if line["step"] <= 6])
    train(recipe, options(tmp_path), open_feed=memory_feed)
    same(metrics(tmp_path, recipe), expected)
