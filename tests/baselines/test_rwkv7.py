"""RWKV-7: its recurrence against flash-linear-attention's, both layers against the authors' formulas, their start."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from baselines import rwkv7
from baselines.rwkv7 import RWKV7, RWKV7ChannelConfig, RWKV7Config
from rodimus_lab.nn.mixer import Initializer
from rodimus_lab.nn.zoo import SIZES, build_model, model_config
from rodimus_lab.train.optimizer import decay_groups


def built(d_model: int = 32, head_width: int = 16) -> RWKV7:
    """With every weight moved off its start, where many are 0."""
    mixer = RWKV7Config(head_width=head_width).build(d_model)
    mixer.init_weights(Initializer())
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


@torch.no_grad()
def test_the_recurrence_is_flash_linear_attentions(fla_reference, delta_recurrence):
    mixer, x = built(), torch.randn(2, 130, 32)
    call = delta_recurrence(rwkv7, mixer, x)
    assert call["scale"] == 1
    reference = fla_reference("generalized_delta_rule/dplr/naive.py", "dplr_recurrence")
    # Theirs has heads before time, reads with alpha, writes along beta, and scales by the root of the width.
    inputs = (call[name].transpose(1, 2) for name in ("q", "k", "v", "b", "a", "log_alpha"))
    want, _ = reference(*inputs)
    torch.testing.assert_close(call["o"], 4 * want.transpose(1, 2), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_layer_is_the_authors():
    """Written after the plain version in the comments of their code, with its x_c = 1 - mu_c."""
    d, H, T = 32, 2, 19
    m, x = built().double(), torch.randn(T, d, dtype=torch.float64)
    delta = F.pad(x, (0, 0, 1, -1)) - x
    xr, xw, xk, xv, xa, xg = (x + delta * (1 - mu) for mu in m.mix)
    decay = torch.exp(-torch.exp(-F.softplus(-(m.w_0 + torch.tanh(xw @ m.w_1) @ m.w_2)) - 0.5))
    r, k, v = xr @ m.receptance.weight.T, xk @ m.key.weight.T, xv @ m.value.weight.T
    a = torch.sigmoid(m.a_0 + xa @ m.a_1 @ m.a_2)
    g = torch.sigmoid(xg @ m.g_1) @ m.g_2
    kk = F.normalize((k * m.k_k).view(T, H, -1), dim=-1).view(T, d)
    k = k * (1 + (a - 1) * m.k_a)
    heads = [part.view(T, H, -1) for part in (r, decay, k, v, kk, a)]
    S = torch.zeros(H, d // H, d // H, dtype=torch.float64)  # values by keys
    rows: list[Tensor] = []
    for t in range(T):
        r_t, w_t, k_t, v_t, kk_t, a_t = (part[t] for part in heads)
        removed = (S @ -kk_t.unsqueeze(-1)) @ (kk_t * a_t).unsqueeze(-2)
        S = S * w_t.unsqueeze(-2) + removed + v_t.unsqueeze(-1) @ k_t.unsqueeze(-2)
        rows.append((S @ r_t.unsqueeze(-1)).flatten())
    o = F.group_norm(torch.stack(rows), H, m.norm_weight, m.norm_bias, eps=1e-5 * d / H)
    r_h, k_h, v_h = heads[0], heads[2], heads[3]
    o = o + ((r_h * k_h * m.r_k).sum(-1, keepdim=True) * v_h).view(T, d)
    torch.testing.assert_close(m(x[None])[0][0], (o * g) @ m.output.weight.T, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_channel_mixing_is_the_authors():
    channel = RWKV7ChannelConfig(layer=1, layers=3).build(16).double()
    channel.init_weights(Initializer())
    torch.nn.init.normal_(channel.value.weight)
    x = torch.randn(9, 16, dtype=torch.float64)
    mixed = x + (F.pad(x, (0, 0, 1, -1)) - x) * (1 - channel.mix_k)
    want = torch.relu(mixed @ channel.key.weight.T) ** 2 @ channel.value.weight.T
    torch.testing.assert_close(channel(x[None])[0][0], want)


def test_first_weights_are_the_authors():
    d, layers, N = 256, 6, 64
    for layer in (0, 3, 5):
        m = RWKV7Config(layer=layer, layers=layers).build(d)
        channel = RWKV7ChannelConfig(layer=layer, layers=layers).build(d)
        for module in (m, channel):
            module.init_weights(Initializer())
        ratio, fading = layer / 5, 1 - layer / 6
        for n in (0, 1, 63, 64, 200, 255):
            linear = n / (d - 1) - 0.5
            zigzag = (n % N - (N - 1) / 2) / ((N - 1) / 2)
            zigzag *= abs(zigzag)
            www = -6 + 6 * (n / (d - 1)) ** (1 + ratio**0.3)
            assert m.w_0[n].item() == pytest.approx(www + 0.5 + zigzag * 2.5, abs=1e-5)
            assert m.a_0[n].item() == pytest.approx(-0.19 + zigzag * 0.3 + linear * 0.4, abs=1e-6)
            assert m.k_k[n].item() == pytest.approx(0.71 - linear * 0.1, abs=1e-6)
            for row, power in zip(m.mix, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
                assert row[n].item() == pytest.approx((n / d) ** (power * fading), abs=1e-6)
            assert channel.mix_k[n].item() == pytest.approx((n / d) ** fading**4, abs=1e-6)
        torch.testing.assert_close(m.k_a, torch.full((d,), 1.02))
        torch.testing.assert_close(m.r_k, torch.full((d // N, N), -0.04))
        torch.testing.assert_close(m.norm_weight, torch.full((d,), ((layer + 1) / 6) ** 0.7))
        for zero in (m.w_1, m.a_1, m.g_1, m.norm_bias, m.output.weight, channel.value.weight):
            assert not zero.any()
        for up in (m.w_2, m.a_2, m.g_2):
            torch.testing.assert_close(up @ up.T, 0.01 * torch.eye(len(up)), atol=1e-6, rtol=0)
        for linear_layer, bound in ((m.receptance, 0.5), (m.key, 0.05), (m.value, 0.5), (channel.key, 0.5)):
            weight, bound = linear_layer.weight, bound / math.sqrt(d)
            assert 0.99 * bound < weight.abs().max() <= bound
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_ranks_are_the_authors():
    ranks = {d: [RWKV7Config().rank(name, d) for name in "wag"] for d in (512, 768, 2048)}
    assert ranks == {512: [64, 64, 128], 768: [64, 64, 128], 2048: [128, 128, 224]}


def test_what_is_not_decayed():
    """The authors decay the weights of linear layers and nothing else."""
    groups = decay_groups(build_model("rwkv7", size="mqar"))
    layers = ("receptance", "key", "value", "output")
    linear = {f"blocks.0.mixers.0.{name}.weight" for name in layers}
    assert set(groups.decay) == linear | {"blocks.0.mixers.1.key.weight", "blocks.0.mixers.1.value.weight"} | {
        "embedding.weight"
    }


@pytest.mark.parametrize("size", SIZES)
def test_the_count_is_near_transformer_pps(size):
    """As in RWKV-4, the authors' widths are kept."""
    counts = [model_config(name, size=size).num_params() for name in ("rwkv7", "transformer++")]
    assert counts[0] == pytest.approx(counts[1], rel=0.08 if size in ("smoke", "mqar") else 0.041)
