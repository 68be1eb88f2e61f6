"""Runs that are ended from outside, in processes of their own."""

import json

import pytest
import torch
import train_fakes
from ranks import start_ranks
from train_fakes import checkpoint_folder, memory_feed, options, run_folder, tiny_recipe

from rodimus_lab.convert import open_checkpoint
from rodimus_lab.scoring import perplexity
from rodimus_lab.train import train


def launch(root, *, faults):
    arguments = [str(root), *(json.dumps(one) for one in ({}, {}, faults))]
    (ended,) = start_ranks(1, lambda rank: train_fakes.main(*arguments), root)
    return ended


def outcome(root, recipe):
    return (
        (run_folder(root, recipe) / "metrics.jsonl").read_bytes(),
        (checkpoint_folder(root, recipe) / "final" / "model.safetensors").read_bytes(),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("whole")
    train(tiny_recipe(), options(root), open_feed=memory_feed)
    yield outcome(root, tiny_recipe())
    torch.set_num_threads(threads)


def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, whole):
    """Killed two steps after its second checkpoint (dropout is on), in the middle of a line of its speeds."""
    killed = launch(tmp_path, faults={11: "kill"})
    assert killed.code == -9
    recipe = tiny_recipe()
    with (checkpoint_folder(tmp_path, recipe) / "timing.jsonl").open("a") as file:
        file.write('{"step": 11, "tok')
    assert not (run_folder(tmp_path, recipe) / "record.json").exists()
    train(recipe, options(tmp_path), open_feed=memory_feed)
    assert outcome(tmp_path, recipe) == whole


def test_sigterm_leaves_a_checkpoint_of_the_step(tmp_path, whole):
    stopped = launch(tmp_path, faults={6: "terminate"})
    recipe = tiny_recipe()
    assert stopped.code == 143
    assert "was stopped by SIGTERM after step 6 of 12; its checkpoint is written" in stopped.err
    assert "Traceback" not in stopped.err
    assert (checkpoint_folder(tmp_path, recipe) / "step-00000006" / "manifest.json").exists()
    train(recipe, options(tmp_path), open_feed=memory_feed)
    assert outcome(tmp_path, recipe) == whole


def test_a_second_signal_ends_the_process_at_once(tmp_path, whole):
    """Before the first checkpoint."""
    stopped = launch(tmp_path, faults={3: "terminate twice"})
    recipe = tiny_recipe()
    assert stopped.code == 143
    assert stopped.err == ""
    assert not list(checkpoint_folder(tmp_path, recipe).glob("step-*"))
    train(recipe, options(tmp_path), open_feed=memory_feed)
    assert outcome(tmp_path, recipe) == whole


def test_best_weights_are_those_of_the_best_evaluation(tmp_path):
    recipe = tiny_recipe()
    record = train(recipe, options(tmp_path), open_feed=memory_feed)
    model = open_checkpoint(checkpoint_folder(tmp_path, recipe) / "best").build()
    feed = memory_feed(recipe, train_fakes.World(0, 1, torch.device("cpu")))
    assert perplexity(model, feed.evaluation["valid"](3))["ppl"] == pytest.approx(
        record["metrics"]["best_valid_ppl"], rel=1e-6
    )
