"""Kimi Delta Attention: its recurrence and gate against flash-linear-attention's, its start, its size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from baselines import gated_deltanet
from baselines.kda import KDA, KDAConfig
from rodimus_lab.nn.mixer import Initializer
from rodimus_lab.nn.zoo import SIZES, model_config


def built(d_model: int = 32) -> KDA:
    mixer = KDAConfig(head_width=16).build(d_model)
    mixer.init_weights(Initializer(std=0.3))
    torch.nn.init.normal_(mixer.gate_up.bias)
    return mixer


@torch.no_grad()
def test_the_recurrence_is_flash_linear_attentions(fla_reference, delta_recurrence):
    mixer, x = built(), torch.randn(2, 130, 32)
    call = delta_recurrence(gated_deltanet, mixer, x)
    assert call["log_alpha"].dtype == torch.float32
    assert call["log_alpha"].shape == (2, 130, 2, 16)
    naive = fla_reference("kda/naive.py", "naive_recurrent_kda")
    want, _ = naive(call["q"], call["k"], call["v"], call["log_alpha"], call["beta"])
    torch.testing.assert_close(call["o"], want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_gates_are_their_formulas(delta_recurrence):
    """A step for every channel, a rate for every head; the output gate is a sigmoid after the norm."""
    mixer, x = built(), torch.randn(2, 9, 32)
    call = delta_recurrence(gated_deltanet, mixer, x)
    dt = F.softplus(x @ mixer.decay_down.weight.T @ mixer.decay_up.weight.T + mixer.dt_bias).unflatten(-1, (2, 16))
    torch.testing.assert_close(call["log_alpha"], -mixer.A_log.exp()[:, None] * dt)
    torch.testing.assert_close(call["beta"], (x @ mixer.beta_proj.weight.T).sigmoid())
    gate = (x @ mixer.gate_down.weight.T @ mixer.gate_up.weight.T + mixer.gate_up.bias).sigmoid()
    normed = call["o"] / (call["o"].square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    torch.testing.assert_close(mixer(x)[0], (gate * normed.flatten(-2)) @ mixer.out_proj.weight.T)


def test_first_weights_are_the_authors():
    mixer = KDAConfig(head_width=8).build(768)
    mixer.init_weights(Initializer(std=0.02, out_scale=0.5))
    for layer, std in ((mixer.qkv_proj, 0.02), (mixer.decay_up, 0.02), (mixer.gate_up, 0.02), (mixer.out_proj, 0.01)):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.03)
    assert mixer.conv_weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert not mixer.gate_up.bias.any()
    rate, steps = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert 1 <= rate.min() < 2.5
    assert 14.5 < rate.max() <= 16
    assert rate.mean().item() == pytest.approx(8.5, rel=0.2)
    assert 0.001 <= steps.min() < 0.0012
    assert 0.09 < steps.max() <= 0.1001
    assert steps.log().mean().item() == pytest.approx(torch.tensor([0.001, 0.1]).log().mean().item(), abs=0.2)


def test_the_state_is_128_wide():
    conv = 3 * 3 * 2048
    assert KDAConfig().state_bytes(2048, 1, 99, torch.bfloat16) == 2 * (128 * 2048 + conv)


@pytest.mark.parametrize("size", SIZES)
def test_the_count_is_transformer_pps(size):
    counts = [model_config(name, size=size).num_params() for name in ("kda", "transformer++")]
    assert counts[0] == pytest.approx(counts[1], rel=3e-3)
