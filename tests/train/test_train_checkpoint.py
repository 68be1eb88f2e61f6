import json
import re
import resource
import warnings
from pathlib import Path

import pytest
import torch
from train_fakes import checkpoint_folder, memory_feed, options, run_folder, tiny_recipe

from rodimus_lab.errors import UserError
from rodimus_lab.train import Interrupted, train
from rodimus_lab.train.checkpoint import CheckpointStore, find_damage
from rodimus_lab.train.distributed import World
from rodimus_lab.weights import write_tensors

ALONE = World(0, 1, torch.device("cpu"))


def tensors(value):
    return {"a": torch.full((3, 2), value), "b.c": torch.arange(5.0) * value}


def saved(folder, *steps, keep_last=2):
    store = CheckpointStore(folder, ALONE, keep_last=keep_last)
    for step in steps:
        torch.manual_seed(step)
        store.save(step, tensors(float(step)), {"step": step})
    return store


def test_round_trip_with_random_state(tmp_path):
    store = saved(tmp_path, 3)
    torch.manual_seed(3)
    expected = torch.rand(4)
    read = tensors(0.0)
    torch.manual_seed(99)
    assert store.restore(read, print) == {"step": 3}
    assert all(torch.equal(read[name], value) for name, value in tensors(3.0).items())
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("in_background", [False, True])
def test_nothing_is_said_of_ranks_that_there_are_none(tmp_path, in_background):
    store = CheckpointStore(tmp_path, ALONE)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        store.save(1, tensors(1.0), {"step": 1}, in_background=in_background)
        store.finish()
        store.restore(tensors(0.0), print)
    assert not [str(one.message) for one in said if "torch.distributed" in str(one.message)]


def test_nothing_to_restore(tmp_path):
    assert CheckpointStore(tmp_path / "new", ALONE).restore(tensors(0.0), print) is None


def test_the_last_k_are_kept(tmp_path):
    assert saved(tmp_path, 1, 2, 3, 4, keep_last=3).steps() == [2, 3, 4]


def test_no_pickle_in_a_checkpoint(tmp_path):
    store = saved(tmp_path, 1)
    files = {path.name for path in store.path(1).rglob("*") if path.is_file()}
    assert {name.rpartition(".")[2] for name in files} == {"safetensors", "json"}


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "manifest", "surplus"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, harm):
    store = saved(tmp_path, 1, 2)
    (shard,) = (store.path(2) / "tensors").iterdir()
    content = shard.read_bytes()
    if harm == "flip":
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    if harm == "truncate":
        shard.write_bytes(content[:-4])
    if harm == "remove":
        shard.unlink()
    if harm == "manifest":
        (store.path(2) / "manifest.json").unlink()
    if harm == "surplus":
        (store.path(2) / "tensors" / "shard-00009.safetensors").write_bytes(content)
    said = []
    read = tensors(0.0)
    assert store.restore(read, said.append) == {"step": 1}
    assert torch.equal(read["a"], tensors(1.0)["a"])
    assert len(said) == 1
    assert "step-00000002 is damaged (" in said[0]
    assert {"manifest": "manifest.json", "surplus": "shard-00009"}.get(harm, shard.name) in said[0]
    store.save(2, tensors(2.0), {"step": 2})
    assert find_damage(store.path(2)) is None


def test_all_damaged_is_an_error(tmp_path):
    store = saved(tmp_path, 1, 2)
    for step in (1, 2):
        (store.path(step) / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"step-00000002 is damaged \(state.json does not match its checksum\), and no"):
        store.restore(tensors(0.0), print)


def test_a_save_that_was_cut_off_leaves_no_checkpoint(tmp_path):
    (tmp_path / ".tmp-step-00000002" / "tensors").mkdir(parents=True)
    (tmp_path / ".tmp-step-00000002" / "tensors" / "half").write_text("x")
    store = saved(tmp_path, 1)
    assert store.steps() == [1]
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.fixture
def small_files():
    """The system itself refuses to write past 64 KiB, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("what", ["checkpoint", "weights"])
def test_a_full_disk_is_told_and_leaves_nothing_behind(tmp_path, small_files, what):
    store, large = saved(tmp_path, 1), {"a": torch.zeros(1 << 16)}
    small_files()
    if what == "checkpoint":
        with pytest.raises(UserError, match=re.escape(f"cannot write a checkpoint into {tmp_path} (")):
            store.save(2, large, {})
    else:
        with pytest.raises(UserError, match=re.escape(f"cannot write {tmp_path / 'weights.safetensors'} (")):
            write_tensors(tmp_path / "weights.safetensors", large)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert find_damage(store.path(1)) is None


def test_a_run_survives_a_damaged_checkpoint_bit_for_bit(tmp_path, capsys):
    recipe = tiny_recipe(20)
    train(recipe, options(tmp_path / "whole"), open_feed=memory_feed)
    with pytest.raises(Interrupted):
        train(recipe, options(tmp_path, stop_at_step=10), open_feed=memory_feed)
    folder = checkpoint_folder(tmp_path, recipe)
    state = folder / "step-00000010" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"surplus": 1}))
    train(recipe, options(tmp_path, progress=True), open_feed=memory_feed)
    assert "step-00000010 is damaged" in capsys.readouterr().out
    for place, name in ((run_folder, "metrics.jsonl"), (checkpoint_folder, "final/model.safetensors")):
        assert (place(tmp_path, recipe) / name).read_bytes() == (place(tmp_path / "whole", recipe) / name).read_bytes()


def test_a_checkpoint_folder_that_cannot_be_made(tmp_path):
    recipe = tiny_recipe()
    Path(tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match="choose another place for checkpoints"):
        train(recipe, options(tmp_path), open_feed=memory_feed)


def test_what_is_saved_in_the_background_is_what_was_there_when_asked(tmp_path):
    store = saved(tmp_path, 1)
    kept = tensors(2.0)
    state = {"step": 2}
    torch.manual_seed(2)
    store.save(2, kept, state, in_background=True)
    for tensor in kept.values():
        tensor.fill_(99.0)
    state["step"] = 99
    torch.rand(5)
    assert store.steps() == [1], "a checkpoint took its place before it was whole"
    store.finish()
    assert store.steps() == [1, 2]
    assert find_damage(store.path(2)) is None
    read = tensors(0.0)
    assert CheckpointStore(tmp_path, ALONE).restore(read, print) == {"step": 2}
    assert all(torch.equal(read[name], value) for name, value in tensors(2.0).items())
    torch.manual_seed(2)
    expected = torch.rand(3)
    CheckpointStore(tmp_path, ALONE).restore(read, print)
    assert torch.equal(torch.rand(3), expected)


def test_one_that_was_cut_off_in_the_background_is_not_taken(tmp_path):
    store = saved(tmp_path, 1)
    store.save(2, tensors(2.0), {"step": 2}, in_background=True)
    store._pending.written.result()
    read = tensors(0.0)
    after = CheckpointStore(tmp_path, ALONE)
    assert after.restore(read, print) == {"step": 1}
    after.save(3, tensors(3.0), {"step": 3})
    assert after.steps() == [1, 3]
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_disk_that_fails_in_the_background_is_told_at_the_next_save(tmp_path, monkeypatch):
    store = saved(tmp_path, 1)

    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("torch.distributed.checkpoint.hf_storage.save", full, raising=False)
        patch.setattr("torch.distributed.checkpoint.filesystem._write_item", full, raising=False)
        patch.setattr("torch.distributed.checkpoint.filesystem._write_files_from_queue", full, raising=False)
        store.save(2, tensors(2.0), {"step": 2}, in_background=True)
        with pytest.raises(UserError, match=r"No space left on device.*free the disk and resume the run"):
            store.finish()
    assert store.steps() == [1]
    assert not list(tmp_path.glob(".tmp-*"))
    store.save(2, tensors(2.0), {"step": 2})
    assert store.steps() == [1, 2]
