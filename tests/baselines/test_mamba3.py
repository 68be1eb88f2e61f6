"""Mamba-3: the whole layer against its definition with a complex state, its start, what it carries when it decodes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.mamba3 import Mamba3, Mamba3Config, turned
from rodimus_lab.nn.mixer import Initializer
from rodimus_lab.nn.zoo import SIZES, build_model, model_config
from rodimus_lab.ops import use_backend
from rodimus_lab.train.optimizer import decay_groups

SMALL = Mamba3Config(state=12, head_width=16)


def built(config: Mamba3Config = SMALL, d_model: int = 16) -> Mamba3:
    mixer = config.build(d_model)
    mixer.init_weights(Initializer())
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer.double()


def by_definition(m: Mamba3, x: Tensor) -> Tensor:
    """y of one sequence x_TD: the trapezoidal rule for a diagonal system with complex entries, head by head.

    A pair of channels is one complex number, which the state turns the other way than B and C in the layer.
    """
    config, heads = m.config, m.shape.heads
    turning = 2 * config.angles
    z, u, B, C, dt, A, trapezoid, theta = (x @ m.in_proj.weight.T).split(m.splits, dim=-1)

    def normed(y: Tensor, weight: Tensor) -> Tensor:
        return y / (y.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight

    def complex_of(y: Tensor) -> Tensor:
        """(..., K) to A complex numbers and then the K - 2A that do not turn."""
        pairs = torch.view_as_complex(y[..., :turning].unflatten(-1, (-1, 2)).contiguous())
        return torch.cat([pairs, y[..., turning:].to(pairs.dtype)], dim=-1)

    dt = F.softplus(dt + m.dt_bias)
    A = -F.softplus(A).clamp(min=config.a_floor)
    share = trapezoid.sigmoid()
    frequency = F.pad(math.pi * theta.tanh(), (0, config.state - turning))
    values = u.unflatten(-1, (heads, -1))
    rows = []
    for h in range(heads):
        b = complex_of(normed(B, m.B_norm.weight) + m.B_bias[h])
        c = complex_of(normed(C, m.C_norm.weight) + m.C_bias[h])
        state = torch.zeros(b.shape[1], values.shape[-1], dtype=b.dtype)
        outputs = []
        for t in range(len(x)):
            decay = torch.exp(dt[t, h] * (A[t, h] - 1j * frequency[t])).unsqueeze(-1)
            state = decay * state
            if t:
                state = state + (1 - share[t, h]) * dt[t, h] * decay * torch.outer(b[t - 1], values[t - 1, h] + 0j)
            state = state + share[t, h] * dt[t, h] * torch.outer(b[t], values[t, h] + 0j)
            outputs.append((c[t].conj() @ state).real + m.D[h] * values[t, h])
        rows.append(torch.stack(outputs))
    return (torch.cat(rows, dim=-1) * F.silu(z)) @ m.out_proj.weight.T


@pytest.mark.parametrize("rotary_share", [0.5, 1.0])
@pytest.mark.parametrize("length", [1, 7, 65, 130])
@torch.no_grad()
def test_the_layer_is_its_definition(length: int, rotary_share: float) -> None:
    mixer, x = built(SMALL.replace(rotary_share=rotary_share)), torch.randn(length, 16, dtype=torch.float64)
    want = by_definition(mixer, x)
    torch.testing.assert_close(mixer(x[None])[0][0], want, rtol=1e-11, atol=1e-11)
    y, state = [], mixer.init_state(1)
    for row in x:
        y_11D, state = mixer(row[None, None], state)
        y.append(y_11D[0, 0])
    torch.testing.assert_close(torch.stack(y), want, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(mixer.float()(x[None].float())[0][0], want.float(), rtol=1e-4, atol=1e-4)


def test_gradients_are_the_definitions() -> None:
    mixer, x = built(), torch.randn(70, 16, dtype=torch.float64, requires_grad=True)
    leaves = [x, *mixer.parameters()]
    weight = torch.randn(70, 16, dtype=torch.float64)
    want = torch.autograd.grad((by_definition(mixer, x) * weight).sum(), leaves)
    with use_backend(gated_linear="chunked"):
        got = torch.autograd.grad((mixer(x[None])[0][0] * weight).sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * max(1.0, b.abs().max().item()))


def test_no_later_token_is_felt_in_half_precision() -> None:
    """The write of a token needs the next one's Delta and lambda, and must not be read before that."""
    mixer, x = built().bfloat16(), torch.randn(1, 9, 16, dtype=torch.bfloat16, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer(x)[0][0, 5].sum(), x)
    assert not gradient[0, 6:].any()
    assert gradient[0, :6].abs().amax(-1).all()


def test_turning_is_a_complex_product() -> None:
    x, angle = torch.randn(2, 3, 2, 10, dtype=torch.float64), torch.randn(2, 3, 2, 4, dtype=torch.float64)
    got = turned(x, angle)
    want = torch.view_as_complex(x[..., :8].unflatten(-1, (4, 2)).contiguous()) * torch.exp(1j * angle)
    torch.testing.assert_close(got[..., :8], torch.view_as_real(want).flatten(-2))
    torch.testing.assert_close(got[..., 8:], x[..., 8:])


@torch.no_grad()
def test_angles_do_not_grow_while_decoding() -> None:
    mixer, state = built(), None
    state = mixer.init_state(1)
    for _ in range(50):
        _, state = mixer(torch.randn(1, 9, 16, dtype=torch.float64), state)
        assert state.angle_BHA.min() >= 0
        assert state.angle_BHA.max() <= 2 * math.pi


def test_first_weights_are_the_authors() -> None:
    mixer = Mamba3Config(head_width=16).build(512)
    mixer.init_weights(Initializer(std=0.02, out_scale=0.25))
    for ones in (mixer.B_bias, mixer.C_bias, mixer.D, mixer.B_norm.weight, mixer.C_norm.weight):
        assert (ones == 1).all()
    steps = F.softplus(mixer.dt_bias)
    assert 0.001 <= steps.min() < 0.0015
    assert 0.07 < steps.max() <= 0.1001
    assert steps.log().mean().item() == pytest.approx(torch.tensor([0.001, 0.1]).log().mean().item(), abs=0.5)
    # Uniform within fan_in^-1/2, as torch draws a linear layer; the way out a quarter of that here.
    for weight, bound in ((mixer.in_proj.weight, 512**-0.5), (mixer.out_proj.weight, 0.25 * 1024**-0.5)):
        assert 0.98 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    plain = Mamba3Config(init="fla").build(256)
    plain.init_weights(Initializer(std=0.02, out_scale=0.25))
    for weight, std in ((plain.in_proj.weight, 0.02), (plain.out_proj.weight, 0.005)):
        assert weight.std().item() == pytest.approx(std, rel=0.02)


def test_what_is_not_decayed() -> None:
    groups = decay_groups(build_model("mamba3", size="mqar"))
    for name in ("dt_bias", "D", "B_norm.weight", "C_norm.weight", "B_bias", "C_bias"):
        assert f"blocks.0.mixers.0.{name}" in groups.no_decay


def test_the_mixer_is_of_the_authors_size() -> None:
    """Their way in and out, norms, biases and the rest at d = 768, by their formula."""
    d, inner, heads = 768, 1536, 24
    rows = 2 * inner + 2 * 128 + 3 * heads + 32
    assert Mamba3Config().num_params(d) == d * rows + inner * d + 2 * 128 + heads * (2 * 128 + 2)
    assert Mamba3Config().shape(d) == (24, 128, 64)


@pytest.mark.parametrize("size", SIZES)
def test_the_count_is_transformer_pps(size: str) -> None:
    counts = [model_config(name, size=size).num_params() for name in ("mamba3", "transformer++")]
    assert counts[0] == pytest.approx(counts[1], rel=3e-3)
