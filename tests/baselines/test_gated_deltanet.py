"""Gated DeltaNet: its recurrence against flash-linear-attention's, the whole layer against its formula, its start."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from baselines import gated_deltanet
from baselines.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig
from rodimus_lab.nn.mixer import Initializer
from rodimus_lab.nn.zoo import SIZES, build_model, model_config
from rodimus_lab.train.optimizer import decay_groups


def built(d_model: int = 32, std: float = 0.3, **fields: int) -> GatedDeltaNet:
    mixer = GatedDeltaNetConfig(num_heads=2, **fields).build(d_model)
    mixer.init_weights(Initializer(std=std))
    return mixer


@torch.no_grad()
def test_the_recurrence_is_flash_linear_attentions(fla_reference, delta_recurrence):
    """Its reference is in float32; so are the 130 tokens of ours, in chunks."""
    mixer, x = built(), torch.randn(2, 130, 32)
    call = delta_recurrence(gated_deltanet, mixer, x)
    assert call["log_alpha"].dtype == torch.float32
    naive = fla_reference("gated_delta_rule/naive.py", "naive_recurrent_gated_delta_rule")
    want, _ = naive(call["q"], call["k"], call["v"], call["beta"], call["log_alpha"].squeeze(-1))
    torch.testing.assert_close(call["o"], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beta_max", [1, 2])
@torch.no_grad()
def test_the_layer_is_its_formula(beta_max):
    """Token by token and head by head, as the docstring has it."""
    mixer, x = built(beta_max=beta_max).double(), torch.randn(1, 23, 32, dtype=torch.float64)
    W = {name: parameter.T for name, parameter in mixer.named_parameters() if parameter.ndim == 2}
    padded = F.pad(x[0] @ W["qkv_proj.weight"], (0, 0, 3, 0))
    conv = F.silu(sum(padded[i : i + 23] * W["conv_weight"][i] for i in range(4)))
    q, k, v = (part.unflatten(-1, (2, -1)) for part in conv.split([24, 24, 48], dim=-1))
    q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    dt, logit = (x[0] @ W["step_proj.weight"]).chunk(2, dim=-1)
    alpha = torch.exp(-mixer.A_log.exp() * F.softplus(dt + mixer.dt_bias))
    beta = beta_max * logit.sigmoid()
    outputs = []
    S: list[Tensor] = [torch.zeros(12, 24, dtype=torch.float64) for _ in range(2)]
    for t in range(23):
        heads = []
        for h in range(2):
            held = k[t, h] @ (alpha[t, h] * S[h])
            S[h] = alpha[t, h] * S[h] + beta[t, h] * torch.outer(k[t, h], v[t, h] - held)
            o = q[t, h] @ S[h] / 12**0.5
            heads.append(o / (o.square().mean() + 1e-5).sqrt() * mixer.norm.weight)
        outputs.append(torch.cat(heads))
    want = (F.silu(x[0] @ W["gate_proj.weight"]) * torch.stack(outputs)) @ W["out_proj.weight"]
    torch.testing.assert_close(mixer(x)[0][0], want, rtol=1e-11, atol=1e-11)


def test_first_weights_are_the_authors():
    mixer = GatedDeltaNetConfig(num_heads=96).build(768)
    mixer.init_weights(Initializer(std=0.02, out_scale=0.5))
    for weight, std in (
        (mixer.qkv_proj.weight, 0.02),
        (mixer.conv_weight, 0.02),
        (mixer.step_proj.weight, 0.02),
        (mixer.gate_proj.weight, 0.02),
        (mixer.out_proj.weight, 0.01),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.03)
    rate, steps = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert 0 < rate.min() < 1.5
    assert 14.5 < rate.max() <= 16
    assert rate.mean().item() == pytest.approx(8, rel=0.2)
    assert 0.001 <= steps.min() < 0.0015
    assert 0.07 < steps.max() <= 0.1001
    assert steps.log().mean().item() == pytest.approx(torch.tensor([0.001, 0.1]).log().mean().item(), abs=0.5)


def test_what_is_not_decayed():
    spared = decay_groups(build_model("gated_deltanet", size="mqar")).no_decay
    for name in ("A_log", "dt_bias", "norm.weight"):
        assert f"blocks.0.mixers.0.{name}" in spared
    assert "blocks.0.mixers.0.conv_weight" not in spared


def test_the_mixer_is_of_the_authors_size():
    """Heads of 256 x 512, six of them, and some 6d^2 at d = 2048."""
    config = GatedDeltaNetConfig()
    assert config.shape(2048) == (6, 256, 512)
    assert 6 <= config.num_params(2048) / 2048**2 < 6.03


@pytest.mark.parametrize("size", SIZES)
def test_the_count_is_transformer_pps(size):
    counts = [model_config(name, size=size).num_params() for name in ("gated_deltanet", "transformer++")]
    assert counts[0] == pytest.approx(counts[1], rel=3e-3)
