"""transformers' Trainer, gradient checkpointing and PEFT."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from rodimus_lab.hf import RodimusLabConfig, RodimusLabForCausalLM
from rodimus_lab.nn.zoo import MODELS, Size, model_config
from rodimus_lab.registry import load_plugins

load_plugins()
SIZE = Size("tiny", 1, 64, 2, 61, 24)


def tiny(name):
    torch.manual_seed(1)
    model = RodimusLabForCausalLM(RodimusLabConfig(model_config(name, size=SIZE, tie_embeddings=False)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def ids(rows=2, length=20):
    return torch.randint(1, SIZE.vocab_size, (rows, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", ["rodimus", "rodimus+", "transformer++", "mamba", "gated_deltanet"])
def test_gradient_checkpointing_changes_no_gradient(name):
    model = tiny(name).train()
    gradients, ran = [], []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable()
            assert all(block.recompute for block in model.lm.blocks)
        calls = []
        hook = model.lm.blocks[0].norms[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.zero_grad()
        model(ids(), labels=ids()).loss.backward()
        hook.remove()
        ran.append(len(calls))
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert ran == [1, 2]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    model.gradient_checkpointing_disable()
    assert not any(block.recompute for block in model.lm.blocks)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        row = (torch.arange(16) * (1 + index % 2) + index % 2) % SIZE.vocab_size
        return {"input_ids": row, "labels": row, "attention_mask": torch.ones(16, dtype=torch.long)}


def trainer(model, folder, **options):
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "max_steps": 20,
        "save_steps": 10,
        "logging_steps": 5,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return Trainer(
        model=model, args=TrainingArguments(**(arguments | options)), train_dataset=Rows(), eval_dataset=Rows()
    )


def test_trainer_learns_saves_and_resumes(tmp_path):
    model = tiny("rodimus")
    run = trainer(model, tmp_path)
    before = run.evaluate()["eval_loss"]
    run.train()
    after = run.evaluate()["eval_loss"]
    assert after < before / 2
    whole = [parameter.detach().clone() for parameter in model.parameters()]
    again = tiny("rodimus")
    trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    for a, b in zip(whole, again.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-20")
    rows = torch.stack([Rows()[index]["input_ids"] for index in range(2)])
    torch.testing.assert_close(loaded(rows).logits, model.eval()(rows).logits)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    weights = []
    for size, steps in ((4, 1), (2, 2)):
        model = tiny("rodimus")
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 2}
        trainer(model, tmp_path / str(size), optim="sgd", learning_rate=0.1, **options).train()
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b)


def adapted(model, targets):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(model, config)


def linear_names(model):
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})


@pytest.mark.parametrize("name", list(MODELS))
def test_every_linear_layer_obeys_its_adapter(name):
    """Some layers are read by their weights, which an adapter is not part of."""
    for target in linear_names(tiny(name).lm):
        model = adapted(tiny(name), [target])
        model(input_ids=ids(), labels=ids()).loss.backward()
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                assert parameter.grad is not None, key
                assert parameter.grad.abs().max() > 0, key
        model.eval()
        with torch.no_grad():
            adapted_logits = model(input_ids=ids()).logits
            merged = model.merge_and_unload()(input_ids=ids()).logits
        torch.testing.assert_close(adapted_logits, merged, rtol=1e-3, atol=1e-3)


def test_lora_trains_saves_and_decodes(tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted(tiny("rodimus"), ["fc", "state_proj", "down", "up", "out_proj"])
    frozen = {key: value.clone() for key, value in model.named_parameters() if not value.requires_grad}
    run = trainer(model, tmp_path / "run", max_steps=30, learning_rate=1e-2, gradient_checkpointing=True)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before - 0.1
    for key, value in model.named_parameters():
        assert key not in frozen or torch.equal(value, frozen[key])
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(tiny("rodimus"), tmp_path / "adapter").eval()
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.eval().generate(input_ids=ids(), **options)
    assert torch.equal(again.generate(input_ids=ids(), **options), expected)
    with torch.no_grad():
        state = model.base_model.model.lm.init_state(2)
        for index in range(20):
            logits_BV = model.base_model.model.lm.step(ids()[:, index], state)
        torch.testing.assert_close(logits_BV, model(input_ids=ids()).logits[:, -1], rtol=1e-4, atol=1e-4)
