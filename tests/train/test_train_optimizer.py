import pytest
import torch
from torch import nn
from train_fakes import tiny_model

from rodimus_lab.nn.block import Block
from rodimus_lab.recipe import OptimizerConfig
from rodimus_lab.train.optimizer import (
    build_optimizer,
    decay_groups,
    make_capturable,
    moments,
    set_learning_rate,
    set_updates,
)


def test_matrices_decay_and_vectors_do_not():
    groups = decay_groups(tiny_model().build())
    assert set(groups.decay) == {
        "embedding.weight",
        *(f"blocks.{block}.mixers.0.{name}_proj.weight" for block in (0, 1) for name in ("in", "out")),
    }
    assert set(groups.no_decay) == {
        "final_norm.weight",
        *(f"blocks.{block}.mixers.0.{name}_proj.bias" for block in (0, 1) for name in ("in", "out")),
        *(f"blocks.{block}.norms.0.weight" for block in (0, 1)),
    }


def test_an_embedding_decays_only_where_it_is_also_the_head():
    untied = decay_groups(tiny_model(tie_embeddings=False).build())
    assert "embedding.weight" in untied.no_decay
    assert "head.weight" in untied.decay
    with_positions = decay_groups(tiny_model().replace(max_positions=8).build())
    assert "embedding.weight" in with_positions.decay
    assert "positions.weight" in with_positions.no_decay


def test_a_module_may_name_what_is_not_to_decay(monkeypatch):
    model = tiny_model().build()
    for index, block in enumerate(model.blocks):
        block.gate = nn.Parameter(torch.ones(2, 2)) if index == 0 else None
    monkeypatch.setattr(Block, "NO_DECAY", frozenset({"gate"}), raising=False)
    groups = decay_groups(model)
    assert "blocks.0.gate" in groups.no_decay
    assert len(groups.decay) + len(groups.no_decay) == len(list(model.parameters()))
    monkeypatch.setattr(Block, "NO_DECAY", frozenset({"gaet"}))
    with pytest.raises(ValueError, match="no parameter 'gaet'"):
        decay_groups(model)


def test_two_steps_equal_the_arithmetic_of_adamw():
    """By hand, in float64: moments, bias correction, decoupled decay on matrices alone."""
    config = OptimizerConfig(lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    torch.manual_seed(0)
    model = tiny_model().build().double()
    ids = torch.randint(64, (4, 17))
    groups = decay_groups(model)
    optimizer = build_optimizer(model, groups, config)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step, lr in ((1, 0.01), (2, 0.004)):
        optimizer.zero_grad()
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        for name, p in model.named_parameters():
            g = p.grad
            decay = 0.1 if name in groups.decay else 0.0
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g * g
            update = (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            expected[name] = expected[name] * (1 - lr * decay) - lr * update
        set_learning_rate(optimizer, lr)
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-9, atol=1e-11)
    for name, moment in moments(model, optimizer).items():
        kind, _, parameter = name.partition(".")
        torch.testing.assert_close(moment, {"exp_avg": first, "exp_avg_sq": second}[kind][parameter])


def test_a_rate_on_the_device_makes_the_same_updates():
    """What a captured step needs; the rate is changed in place."""
    ids = torch.randint(64, (4, 17))
    results = []
    for on_device in (False, True):
        torch.manual_seed(0)
        model = tiny_model().build()
        optimizer = build_optimizer(model, decay_groups(model), OptimizerConfig())
        if on_device:
            make_capturable(optimizer, torch.device("cpu"))
        held = [group["lr"] for group in optimizer.param_groups]
        for lr in (0.01, 0.004):
            optimizer.zero_grad()
            model.loss(ids[:, :-1], ids[:, 1:]).backward()
            set_learning_rate(optimizer, lr)
            optimizer.step()
        assert on_device == all(mine is group["lr"] for mine, group in zip(held, optimizer.param_groups, strict=True))
        results.append([p.detach() for p in model.parameters()])
    for plain, captured in zip(*results, strict=True):
        torch.testing.assert_close(plain, captured)


def test_found_inf_suppresses_an_update():
    model = tiny_model().build()
    optimizer = build_optimizer(model, decay_groups(model), OptimizerConfig())
    set_updates(optimizer, 3)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(not moment.any() for moment in moments(model, optimizer).values())
    assert all(state["step"] == 3 for state in optimizer.state.values())
