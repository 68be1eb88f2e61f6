"""State-space duality: both forms in float64. Shapes: B batch, T time, H heads, N state expansion, P head width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rodimus_lab.errors import UserError
from rodimus_lab.ops import Segments, ssd, use_backend
from rodimus_lab.ops.backend import watch_backends


def draw(length: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    B, H, N, P = 2, 3, 5, 4
    shapes = {"x_BTHP": (B, length, H, P), "B_BTN": (B, length, N), "C_BTN": (B, length, N)}
    leaves = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    leaves |= {"dt_BTH": torch.rand(B, length, H, dtype=dtype), "A_H": -torch.tensor([0.01, 1.0, 300.0], dtype=dtype)}
    return {name: x.requires_grad_() for name, x in leaves.items()}


def outputs_and_gradients(leaves: dict[str, Tensor], backend: str) -> tuple[Any, ...]:
    outputs = ssd(**leaves, backend=backend)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs]
    return *outputs, *torch.autograd.grad(outputs, list(leaves.values()), cotangents)


@pytest.mark.parametrize("length", [1, 2, 37])
def test_the_dual_is_the_recurrence(length: int) -> None:
    """Decays that forget next to nothing and ones that forget all at once."""
    leaves = draw(length)
    with use_backend(gated_linear="naive"):
        want = outputs_and_gradients(leaves, "gated_linear")
    torch.testing.assert_close(outputs_and_gradients(leaves, "attention_form"), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [1.0, 200.0])
def test_the_dual_in_float32(steps: float) -> None:
    """Logarithms that have grown over many strong decays cost the weak ones after them no digits."""
    exact = {name: x.detach() for name, x in draw(128).items()}
    exact["dt_BTH"][:, :60] *= steps
    exact["dt_BTH"][:, 60:] /= steps
    leaves = {name: x.float().requires_grad_() for name, x in exact.items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    found, want = (outputs_and_gradients(each, "attention_form") for each in (leaves, exact))
    for got, expected in zip(found, want, strict=True):
        assert (got.double() - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("form", ["attention_form", "gated_linear"])
def test_autocast_leaves_the_dtypes(form: str) -> None:
    leaves = draw(16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        o, state = ssd(**leaves, backend=form)
    assert o.dtype == state.dtype == torch.float32


def test_both_forms_take_mixed_types() -> None:
    leaves = draw(16, torch.float32)
    for name in ("B_BTN", "C_BTN"):
        leaves[name] = leaves[name].detach().bfloat16().requires_grad_()
    with use_backend(gated_linear="naive"):
        want = outputs_and_gradients(leaves, "gated_linear")
    for got, expected in zip(outputs_and_gradients(leaves, "attention_form"), want, strict=True):
        assert got.dtype == expected.dtype
        assert (got.double() - expected).norm() <= 1e-2 * expected.double().norm()


def test_the_dual_is_for_short_whole_sequences() -> None:
    for length, wanted in ((128, "attention_form"), (129, "gated_linear")):
        with watch_backends() as chosen, torch.no_grad():
            ssd(**draw(length))
        assert chosen["ssd"] == wanted
    leaves = draw(4)
    with pytest.raises(UserError, match="from a zero state"):
        ssd(**leaves, state_BHNP=torch.zeros(2, 3, 5, 4), backend="attention_form")
    with pytest.raises(UserError, match="from a zero state"):
        ssd(**leaves, segments=Segments.from_lengths([2, 2]), backend="attention_form")
