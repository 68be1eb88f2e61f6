"""S4D: its first weights, and the convolution that it is."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from baselines.s4d import S4D, S4DConfig
from rodimus_lab.nn.mixer import Initializer
from rodimus_lab.nn.zoo import model_config


def drawn(d_model: int) -> S4D:
    mixer = S4DConfig().build(d_model)
    mixer.init_weights(Initializer())
    return mixer


def test_first_weights() -> None:
    mixer = drawn(512)
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(512, 16))
    steps = mixer.dt_log.exp()
    assert 0.001 <= steps.min() < 0.0015
    assert 0.07 < steps.max() <= 0.1001
    for weight in (mixer.C, mixer.D):
        assert abs(weight.std().item() - 1) < 0.1
    assert abs(mixer.out_proj.weight.std().item() / 0.02 - 1) < 0.05


@torch.no_grad()
def test_it_is_a_convolution() -> None:
    """With the kernel K_l = sum_n C_n (exp(Delta A_n) - 1) / A_n exp(Delta A_n l), made here in float64."""
    mixer, length = drawn(24), 70
    u = torch.randn(2, length, 24)
    A, dt = -mixer.A_log.double().exp(), mixer.dt_log.double().exp()[:, None]
    powers = torch.exp(dt * A * torch.arange(length)[:, None, None])
    kernel = (mixer.C * (torch.exp(dt * A) - 1) / A * powers).sum(-1)
    y = mixer.D * u.double()
    for t in range(length):
        y[:, t] += (kernel[: t + 1].flip(0) * u[:, : t + 1]).sum(1)
    want = F.glu(mixer.out_proj.double()(F.gelu(y)), dim=-1)
    got, _ = mixer.float()(u)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


def test_it_is_as_large_as_transformer_pp() -> None:
    ours, theirs = (model_config(name, size="350m").num_params() for name in ("s4d", "transformer++"))
    assert abs(ours / theirs - 1) < 0.01


@pytest.mark.parametrize("dt_log", [-5.0, -12.0, -30.0, -200.0])
def test_steps_of_next_to_nothing(dt_log):
    """Down to where they are 0 in float32."""
    mixer = S4DConfig().build(4)
    mixer.init_weights(Initializer())
    torch.nn.init.constant_(mixer.dt_log, dt_log)
    exact = copy.deepcopy(mixer).double()
    x = torch.randn(2, 7, 4)
    for module, inputs in ((mixer, x), (exact, x.double())):
        y, _ = module(inputs)
        y.sum().backward()
    for parameter, wanted in zip(mixer.parameters(), exact.parameters(), strict=True):
        atol = 1e-5 * wanted.grad.abs().max().item() + torch.finfo(torch.float32).tiny
        torch.testing.assert_close(parameter.grad, wanted.grad.float(), rtol=0, atol=atol)
