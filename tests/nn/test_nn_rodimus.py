"""The Rodimus mixer against a direct reading of the authors' block, and the statistics of its first weights.

Shapes: T time, D model width, M = m inner width, n state expansion.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rodimus_lab.config import ConfigError
from rodimus_lab.nn.mixer import Initializer
from rodimus_lab.nn.rodimus import RodimusConfig, SelectionGate, TemperatureGate, ValueDecay, ValueGate
from rodimus_lab.nn.zoo import build_model

D, T = 12, 9
BASE = RodimusConfig(n=5, beta_hat=ValueGate(rank=3))
ABLATIONS = {
    "full": BASE,
    "no_tau": BASE.replace(tau=None),
    "no_g": BASE.replace(g=None, tau=None),
    "fixed_tau": BASE.replace(tau=TemperatureGate(fixed=0.25)),
    "no_beta_hat": BASE.replace(beta_hat=None),
    "beta": BASE.replace(beta=ValueDecay(rank=2, temperature=4.0)),
    "no_key_norm": BASE.replace(key_norm=False),
    "no_feedthrough": BASE.replace(feedthrough=False),
    "no_conv": BASE.replace(conv_width=0),
    "conv_2": BASE.replace(conv_width=2),
}


def reference(config: RodimusConfig, w: dict[str, Tensor], u: Tensor) -> Tensor:
    """The block, line by line and token by token, from the raw weights; u is (T, D), y is (T, D)."""
    n, m = config.n, w["out_proj.weight"].shape[1]
    x = u @ w["fc.weight"][:m].T
    g = u @ w["fc.weight"][m:].T
    S = torch.zeros(n, m, dtype=u.dtype)
    y = []
    for t in range(len(u)):
        conv = x[t]
        if config.conv_width:
            conv = w["conv_bias"].clone()
            for back in range(min(config.conv_width, t + 1)):
                conv = conv + w["conv_weight"][:, config.conv_width - 1 - back] * x[t - back]
        x1 = conv / (1 + torch.exp(-conv))
        q, k = w["state_proj.weight"][:n] @ x1, w["state_proj.weight"][n : 2 * n] @ x1
        s, tau = torch.ones(n, dtype=u.dtype), torch.ones(n, dtype=u.dtype)
        if config.g is not None:
            s = torch.log1p(torch.exp(w["state_proj.weight"][2 * n : 3 * n] @ x1 + w["gate_bias"][:n]))
        if config.tau is not None and config.tau.fixed is not None:
            tau = tau * config.tau.fixed
        elif config.tau is not None:
            tau = 1 / (1 + torch.exp(-(w["state_proj.weight"][3 * n :] @ x1 + w["gate_bias"][n:])))
        alpha = torch.exp(-s * tau) if config.g is not None else torch.ones_like(s)
        if config.key_norm:
            k = k / k.norm().clamp(min=1e-12)
        k = k * s**tau
        v = x[t]
        if config.beta_hat is not None:
            low = w["value_gate.down.weight"] @ x[t]
            v = v / (1 + torch.exp(-(w["value_gate.up.weight"] @ low + w["value_gate.up.bias"])))
        beta = torch.ones(m, dtype=u.dtype)
        if config.beta is not None:
            low = w["value_decay.down.weight"] @ x[t]
            beta = 1 / (1 + torch.exp(-(w["value_decay.up.weight"] @ low + w["value_decay.up.bias"])))
            beta = beta ** (1 / config.beta.temperature)
        S = torch.outer(alpha, beta) * S + torch.outer(k, v)
        o = (q / math.sqrt(n)) @ S
        if config.feedthrough:
            o = o + w["feedthrough"] * x1
        gated = o * g[t] / (1 + torch.exp(-g[t]))
        normed = gated / torch.sqrt((gated**2).mean() + config.norm_eps) * w["norm.weight"]
        y.append(w["out_proj.weight"] @ normed)
    return torch.stack(y)


def built(config: RodimusConfig, d_model: int = D) -> Any:
    mixer = config.build(d_model).double()
    mixer.init_weights(Initializer())
    return mixer


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("name", ABLATIONS)
def test_the_mixer_is_the_reference(name: str, noise: float) -> None:
    config = ABLATIONS[name]
    mixer = built(config)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    u = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    weights = dict(mixer.named_parameters())
    y, _ = mixer(u)
    want = torch.stack([reference(config, weights, row) for row in u])
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    probe, leaves = torch.randn_like(y), [u, *weights.values()]
    got = torch.autograd.grad((y * probe).sum(), leaves, retain_graph=True)
    expected = torch.autograd.grad((want * probe).sum(), leaves)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


def test_gates_far_from_their_start_stay_exact_and_finite() -> None:
    """softplus and sigmoid at logits where the naive forms under- or overflow; also in float32."""
    mixer = built(BASE)
    for logit in (-500.0, -40.0, -29.9, -30.1, 19.0, 21.0, 300.0):
        with torch.no_grad():
            mixer.gate_bias.fill_(logit)
        for dtype in (torch.float32, torch.float64):
            u = torch.randn(1, T, D, dtype=dtype, requires_grad=True)
            y, _ = mixer.to(dtype)(u)
            y.sum().backward()
            assert y.isfinite().all()
            assert u.grad is not None
            assert u.grad.isfinite().all()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
        mixer.double()


@pytest.mark.parametrize("bias", [-25.0, -32.0])
def test_small_selection_gates_keep_their_temperature(bias: float) -> None:
    """g^tau is exp(tau log g), on both sides of the place where log softplus changes form."""
    mixer = built(BASE)
    with torch.no_grad():
        mixer.gate_bias[: BASE.n] = bias
        mixer.state_proj.weight[2 * BASE.n : 3 * BASE.n] = 0.0
    u = torch.randn(T, D, dtype=torch.float64)
    y, _ = mixer(u[None])
    torch.testing.assert_close(y[0], reference(BASE, dict(mixer.named_parameters()), u), rtol=1e-8, atol=1e-12)


def test_tau_without_g_is_refused() -> None:
    with pytest.raises(ConfigError, match="tau tempers g"):
        BASE.replace(g=None)


@pytest.mark.parametrize(("d_model", "rank"), [(64, 16), (1024, 16), (1536, 24), (2048, 32)])
def test_automatic_rank_is_the_authors(d_model: int, rank: int) -> None:
    assert RodimusConfig.rank_of(ValueGate(rank="auto"), d_model) == rank


@pytest.mark.parametrize(("d_model", "expand", "m"), [(512, 2.0, 1024), (10, 2.0, 24), (12, 1.0, 16)])
def test_inner_width_is_a_multiple_of_8(d_model: int, expand: float, m: int) -> None:
    assert RodimusConfig(expand=expand).inner_width(d_model) == m


# The first weights.


def test_gate_biases_start_in_their_ranges() -> None:
    n = 2048
    bias = built(RodimusConfig(n=n), 8).gate_bias.detach()
    g, tau = F.softplus(bias[:n]), bias[n:].sigmoid()
    assert 0.001 * (1 - 1e-6) <= g.min() < 0.0011
    assert 0.095 < g.max() <= 0.1 * (1 + 1e-6)
    assert g.log().mean() == pytest.approx(math.log(0.01), abs=5 * math.log(100) / math.sqrt(12 * n))
    assert 1 / 16 - 1e-6 <= tau.min() < 0.065
    assert 0.895 < tau.max() <= 0.9 + 1e-6
    assert tau.mean() == pytest.approx((1 / 16 + 0.9) / 2, abs=5 * (0.9 - 1 / 16) / math.sqrt(12 * n))


def test_the_selection_gate_starts_at_least_at_1e_4() -> None:
    config = RodimusConfig(n=256, g=SelectionGate(init_min=1e-6, init_max=1e-3))
    g = F.softplus(built(config, 8).gate_bias.detach()[:256])
    assert g.min() == pytest.approx(1e-4, rel=1e-6)


def assert_uniform(weight: Tensor, bound: float) -> None:
    largest = weight.detach().abs().max().item()
    assert 0.98 * bound < largest <= bound * (1 + 1e-6)
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def xavier(fan_in: int, fan_out: int) -> float:
    return 2**-2.5 * math.sqrt(6 / (fan_in + fan_out))


@pytest.mark.parametrize("tau", [TemperatureGate(), None])
def test_state_projections_are_xavier_uniform_each_by_itself(tau: TemperatureGate | None) -> None:
    n, d_model, rank = 24, 64, 16
    m = 2 * d_model
    mixer = built(RodimusConfig(n=n, tau=tau, beta_hat=ValueGate(rank=rank), beta=ValueDecay(rank=rank)), d_model)
    assert_uniform(mixer.state_proj.weight[: 2 * n], xavier(m, 2 * n))
    assert_uniform(mixer.state_proj.weight[2 * n :], xavier(m, 2 * n if tau else n))
    for low_rank in (mixer.value_gate, mixer.value_decay):
        assert_uniform(low_rank.down.weight, xavier(m, rank))
        assert_uniform(low_rank.up.weight, xavier(rank, m))
        assert (low_rank.up.bias == 0).all()


def test_the_convolution_starts_as_torchs() -> None:
    mixer = built(RodimusConfig(n=4), 256)
    assert_uniform(mixer.conv_weight, 0.5)
    assert_uniform(mixer.conv_bias, 0.5)
    assert (mixer.feedthrough == 1).all()
    assert (mixer.norm.weight == 1).all()


@pytest.mark.parametrize(("name", "residual_writes"), [("rodimus", 4), ("rodimus+", 2 * 3)])
def test_linears_are_normal_and_those_onto_the_residual_stream_smaller(name: str, residual_writes: int) -> None:
    model = build_model(name, size="smoke")
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)
    scale = 1 / math.sqrt(residual_writes)
    for block in model.blocks:
        for mixer in block.mixers:
            assert mixer.out_proj.weight.std().item() == pytest.approx(0.02 * scale, rel=0.05)
            for inner in ("fc", "qkv_proj", "in_proj"):
                if hasattr(mixer, inner):
                    assert getattr(mixer, inner).weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_an_inner_width_of_nothing_is_refused() -> None:
    config = RodimusConfig(expand=0.01)
    with pytest.raises(ConfigError, match=r"expand=0\.01 leaves nothing of d_model=64"):
        config.build(64)
    with pytest.raises(ConfigError, match="leaves nothing"):
        config.num_params(64)
    assert config.inner_width(100) == 8
