"""Two processes with gloo against one."""

import json
import os
import signal
import socket
import threading
import time
from datetime import timedelta

import pytest
import train_fakes
from ranks import start_ranks
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils._python_dispatch import TorchDispatchMode
from train_fakes import checkpoint_folder, memory_feed, options, run_folder, tiny_recipe

from rodimus_lab.convert import open_checkpoint
from rodimus_lab.errors import UserError
from rodimus_lab.records import RunDir
from rodimus_lab.train import Interrupted, train
from rodimus_lab.train.distributed import end_process, session
from rodimus_lab.train.optimizer import build_optimizer, decay_groups
from rodimus_lab.train.signals import StopSignal
from rodimus_lab.train.step import Stepper

CHANGES = {"dropout": 0.0}  # The ranks drop other activations than one process does.
RECIPE = tiny_recipe(**CHANGES)


def two_ranks(root, *, settings=None, faults=None, changes=CHANGES):
    arguments = [str(root), *(json.dumps(one or {}) for one in (changes, settings, faults))]
    return start_ranks(2, lambda rank: train_fakes.main(*arguments), root)


def torchrun(root, *, faults, restarts):
    """As `torchrun --nproc-per-node 2 --max-restarts RESTARTS` does, but for copying this process."""
    arguments = [str(root), *(json.dumps(one) for one in (CHANGES, {}, faults))]
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=restarts,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=root.name,
        start_method="fork",
        monitor_interval=0.1,
    )

    def agent(_rank):
        elastic_launch(config, rank_of_torchrun)(*arguments)
        return 0

    (ended,) = start_ranks(1, agent, root)
    return ended


def rank_of_torchrun(*arguments):
    code = train_fakes.main(*arguments)
    return end_process(code) if code else 0


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
    ranks = two_ranks(tmp_path, settings={"stop_at_step": 6, "micro_batch_size": 3})
    assert [rank.code for rank in ranks] == [0, 0], ranks
    assert "".join(rank.err for rank in ranks).count("was stopped as asked after step 6") == 1
    shards = list((checkpoint_folder(tmp_path, RECIPE) / "step-00000006" / "tensors").iterdir())
    assert len(shards) == 2
    same(metrics(tmp_path), [line for line in metrics(whole) if line["step"] <= 6])
    train(RECIPE, options(tmp_path), open_feed=memory_feed)
    same(metrics(tmp_path), metrics(whole))


def test_from_one_process_to_two(tmp_path, whole):
    with pytest.raises(Interrupted):
        train(RECIPE, options(tmp_path, stop_at_step=6), open_feed=memory_feed)
    ranks = two_ranks(tmp_path)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    same(metrics(tmp_path), metrics(whole))
    record = json.loads((run_folder(tmp_path, RECIPE) / "record.json").read_text())
    assert record["device"] == "2 x cpu"
    parts, once = (open_checkpoint(checkpoint_folder(root, RECIPE)).build() for root in (tmp_path, whole))
    for a, b in zip(parts.parameters(), once.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-5


def test_ranks_train_one_run_after_another(tmp_path):
    """What the first left in the store that they met at is not the second's."""
    steps = [{**CHANGES, "steps": 3}, {**CHANGES, "steps": 4}]

    def main(rank):
        return sum(train_fakes.main(str(tmp_path), json.dumps(changes), "{}", "{}") for changes in steps)

    ranks = start_ranks(2, main, tmp_path)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    for changes in steps:
        assert (run_folder(tmp_path, tiny_recipe(**changes)) / "record.json").exists()


def test_a_failing_rank_speaks_alone(tmp_path):
    ranks = two_ranks(tmp_path, faults={3: "fail on rank 1"})
    assert all(rank.code for rank in ranks)
    said = "".join(rank.err for rank in ranks)
    assert said.count("rank 1: the shard train-00003.bin is corrupt; delete it") == 1
    assert "Traceback (most recent call last)" not in said
    assert not (run_folder(tmp_path, RECIPE) / "record.json").exists()


def test_a_killed_rank_and_a_full_disk_are_named_and_the_job_goes_on_by_itself(tmp_path, whole):
    """Killed at batch 7, after the checkpoint of step 4; started again, that of step 8 finds no room on rank 1."""
    done = torchrun(tmp_path, faults={7: "kill rank 1, then fill its disk"}, restarts=2)
    assert done.code == 0, done.err
    lost = "rank 1 of 2 ended without a word; the last checkpoint is kept, and the same command goes on from there"
    assert done.err.count(lost) == 1
    assert done.err.count("random-00001.safetensors (") == done.err.count("free the disk or") == 1
    assert "Traceback (most recent call last)" not in done.err
    assert (run_folder(tmp_path, RECIPE) / "record.json").exists()
    same(metrics(tmp_path), metrics(whole))


def test_a_killed_rank_is_named_by_one_that_hangs(tmp_path, monkeypatch):
    """As one does in a collective on a GPU, where nothing fails; torchrun tells it to end."""
    monkeypatch.setattr("rodimus_lab.train.failures.SILENT_SECONDS", 1.0)

    def main(rank):
        with session("cpu"), StopSignal():
            if rank:
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
            time.sleep(20)
        return 0

    ranks = start_ranks(2, main, tmp_path)
    assert [rank.code for rank in ranks] == [1, -signal.SIGKILL]
    lost = "rank 1 of 2 ended without a word; the last checkpoint is kept, and the same command goes on from there"
    assert ranks[0].err == f"{lost}\n"


def test_ranks_that_are_told_to_end_and_live_are_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr("rodimus_lab.train.failures.SILENT_SECONDS", 1.0)

    def main(rank):
        with session("cpu") as world, StopSignal() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(3)
            return 0 if world.any(signals.received is not None) else 3

    ranks = start_ranks(2, main, tmp_path)
    assert [(rank.code, rank.err) for rank in ranks] == [(0, "")] * 2


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
    ranks = two_ranks(tmp_path, settings=settings, changes=changes)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    expected = metrics(tmp_path / "whole", recipe)
    same(metrics(tmp_path, recipe), [line for line in expected if line["step"] <= 6])
    train(recipe, options(tmp_path), open_feed=memory_feed)
    same(metrics(tmp_path, recipe), expected)


def reductions_of_a_step(rows, folder):
    """How often two ranks that have 4 rows of a batch each reduce gradients, `rows` rows being a micro-batch."""
    found = []

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found.append("reduce_scatter" in str(function))
            return function(*args, **(kwargs or {}))

    def main(rank):
        with session("cpu") as world:
            model = RECIPE.model.build()
            groups = decay_groups(model)
            world.place(model)
            stepper = Stepper(model, build_optimizer(model, groups, RECIPE.optimizer), RECIPE, world, rows)
            batch = next(memory_feed(RECIPE, world).train)
            with Counted():
                stepper.backward(*batch)
        return sum(found)

    ranks = start_ranks(2, main, folder)
    assert ranks[0].code == ranks[1].code, ranks
    return ranks[0].code


def test_gradients_are_shared_once_a_step(tmp_path):
    """Once a block and once for the rest, however many micro-batches there are."""
    assert [reductions_of_a_step(rows, tmp_path) for rows in (4, 1)] == [RECIPE.model.repeats + 1] * 2
