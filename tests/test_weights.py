import json
from pathlib import Path

import pytest
import torch

from rodimus_lab.convert import open_checkpoint, write_native
from rodimus_lab.data.mqar import MqarConfig, MqarSegment
from rodimus_lab.errors import UserError
from rodimus_lab.nn.block import BlockConfig
from rodimus_lab.nn.feedforward import FeedForwardConfig
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.recipe import BudgetConfig, DataConfig, Recipe, ScheduleConfig
from rodimus_lab.weights import find_model, save_model


@pytest.fixture
def recipe():
    block = BlockConfig(hops=((FeedForwardConfig(width=8),),))
    return Recipe(
        experiment="trial",
        label="tiny",
        model=LanguageModelConfig(vocab_size=16, d_model=8, pattern=(block,), repeats=1),
        data=DataConfig(corpus="pydoc", tokenizer="gpt2", seq_len=8),
        schedule=ScheduleConfig(warmup_steps=1),
        budget=BudgetConfig(steps=2, batch_size=1),
    )


@pytest.fixture
def saved(tmp_path, recipe):
    model = recipe.model.build()
    save_model(tmp_path / "trial" / recipe.id / "final", model.state_dict(), recipe)
    return model


@pytest.mark.parametrize("how", ["id", "experiment and id", "run folder", "folder"])
def test_round_trip(tmp_path, recipe, saved, how, monkeypatch):
    monkeypatch.setenv("RODIMUS_LAB_CHECKPOINTS", str(tmp_path))
    folder = tmp_path / "trial" / recipe.id
    name = {
        "id": recipe.id,
        "experiment and id": f"trial/{recipe.id}",
        "run folder": folder,
        "folder": folder / "final",
    }
    before = torch.get_rng_state()
    checkpoint = open_checkpoint(name[how])
    model = checkpoint.build()
    assert torch.equal(torch.get_rng_state(), before)
    assert checkpoint.recipe == recipe
    assert not model.training
    for a, b in zip(model.parameters(), saved.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nobody-00000000", "no weights of 'nobody-00000000' .*; train the run first"),
        ("", "no weights of"),
        ("../trial", "there is no checkpoint directory '../trial', nor a run of that name under .*; correct the path"),
        ("trial/../../etc", "there is no checkpoint directory"),
        ("trial/nobody-00000000", "there is no checkpoint directory"),
        (Path("nowhere"), "there is no checkpoint directory 'nowhere'"),
    ],
)
def test_no_such_run(tmp_path, saved, name, said):
    with pytest.raises(UserError, match=said):
        find_model(name, tmp_path)


def test_a_run_that_is_nearly_named(tmp_path, recipe, saved):
    with pytest.raises(UserError, match=f"no weights of .* did you mean '{recipe.id}'"):
        find_model(recipe.id[:-1], tmp_path)


def test_an_id_of_two_experiments(tmp_path, recipe, saved):
    save_model(tmp_path / "other" / recipe.id / "final", saved.state_dict(), recipe)
    with pytest.raises(UserError, match="is ambiguous"):
        find_model(recipe.id, tmp_path)


def test_damaged_weights(tmp_path, recipe, saved):
    path = find_model(recipe.id, tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        open_checkpoint(tmp_path / "trial" / recipe.id).build()


def test_weights_of_another_model(tmp_path, recipe, saved):
    path = find_model(recipe.id, tmp_path) / "recipe.json"
    values = json.loads(path.read_text())
    values["model"]["d_model"] = 4
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"weight of .* is \(16, 8\), not \(16, 4\)"):
        open_checkpoint(tmp_path / "trial" / recipe.id).build()


def test_damaged_recipe(tmp_path, recipe, saved):
    (find_model(recipe.id, tmp_path) / "recipe.json").write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        open_checkpoint(tmp_path / "trial" / recipe.id).build()


def test_a_run_that_did_not_read_text(tmp_path, recipe):
    """A model, but no tokenizer."""
    examples = MqarSegment(seq_len=16, num_pairs=2, num_examples=4)
    recipe = recipe.replace(data=MqarConfig(train=(examples,), test=examples, vocab_size=32))
    save_model(tmp_path / "run", recipe.model.build().state_dict(), recipe)
    checkpoint = open_checkpoint(tmp_path / "run")
    write_native(checkpoint, tmp_path / "exported")
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == ["config.json", "model.safetensors"]
    again = open_checkpoint(tmp_path / "exported")
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in checkpoint.tensors.items())
    with pytest.raises(UserError, match="was not trained on text"):
        checkpoint.tokenizer()
