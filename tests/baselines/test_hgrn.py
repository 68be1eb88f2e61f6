"""HGRN: flash-linear-attention's recurrence and gates, and the lower bounds of a whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from baselines.hgrn import HGRN, HGRNConfig
from rodimus_lab.nn.mixer import Initializer
from rodimus_lab.nn.zoo import MODELS, Size, model_config
from rodimus_lab.train.optimizer import decay_groups

L, D = 4, 32
SIZE = Size("tiny", num_layers=L, d_model=D, num_heads=2, vocab_size=50, context=16)


@torch.no_grad()
def test_it_is_flash_linear_attentions(fla_reference: Callable[[str, str], Callable[..., Any]]) -> None:
    """Layer by layer, with the gates by its formula and its gated norm."""
    model, x = MODELS["hgrn"](SIZE).build(), torch.randn(2, 65, D)
    bounds = model.get_parameter("shared.HGRN.weight")
    torch.nn.init.normal_(bounds)
    share = bounds.softmax(0)
    for layer, block in enumerate(model.blocks):
        mixer: HGRN = block.mixers[0]
        for linear in (mixer.ifz_proj, mixer.out_proj):
            torch.nn.init.normal_(linear.weight, std=0.3)
        i, f, z = (x @ mixer.ifz_proj.weight.T).chunk(3, dim=-1)
        f, bound = F.logsigmoid(f), share[1 : layer + 1].sum(0)
        if layer:
            f = torch.logaddexp(bound.log(), torch.log1p(-bound) + f)
        h, _ = fla_reference("hgrn/naive.py", "naive_recurrent_hgrn")(F.silu(i) * (1 - f.exp()), f)
        want = (F.rms_norm(h, (D,), eps=1e-5) * F.silu(z)) @ mixer.out_proj.weight.T
        torch.testing.assert_close(mixer(x)[0], want, rtol=1e-5, atol=1e-5)


def test_the_bounds_are_one_parameter_of_the_model() -> None:
    model = MODELS["hgrn"](SIZE).build()
    assert model.get_parameter("shared.HGRN.weight").shape == (L, D)
    assert "shared.HGRN.weight" in decay_groups(model).no_decay
    model.loss(torch.randint(0, 50, (2, 9)), torch.randint(0, 50, (2, 9))).backward()
    assert model.get_parameter("shared.HGRN.weight").grad.any()


def test_it_is_as_large_as_hgrn2() -> None:
    assert model_config("hgrn").num_params() == model_config("hgrn2").num_params() == 46_195_712


def test_a_strong_input_gives_finite_gradients() -> None:
    mixer = HGRNConfig().build(D)
    mixer.init_weights(Initializer())
    x = (1e4 * torch.randn(1, 9, D)).requires_grad_()
    mixer(x)[0].sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_the_first_weights() -> None:
    model = MODELS["hgrn"](SIZE._replace(d_model=256)).build()
    assert not model.get_parameter("shared.HGRN.weight").any()
    assert model.blocks[1].mixers[0].ifz_proj.weight.std().item() == pytest.approx(0.02, rel=0.03)
