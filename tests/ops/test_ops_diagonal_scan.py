"""The diagonal recurrences: the definitions against loops written here, every backend against the definitions.

Shapes: B batch, T time, M channels, N state expansion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rodimus_lab.errors import UserError
from rodimus_lab.ops import Segments
from rodimus_lab.ops.diagonal_scan import chunked as chunked_module
from rodimus_lab.ops.diagonal_scan import diagonal_scan, selective_chunked, selective_scan

M, N = 3, 4
LENGTHS = (1, 2, 17, 64, 130)
KINDS = ("none", "padded", "packed", "both")


def segments_for(kind: str, length: int) -> Segments | None:
    """Ids of two rows; `both` pads and packs."""
    if kind == "none":
        return None
    index = torch.arange(length)
    padding = torch.tensor([min(3, length - 1), 0]) if kind in ("padded", "both") else torch.tensor([0, 0])
    cuts = [length // 3, length // 3 + 1, 2 * length // 3] if kind in ("packed", "both") else []
    ids = sum((index >= cut).long() for cut in cuts if cut > 3) + torch.zeros(2, length, dtype=torch.long)
    ids[1] = ids[1].clamp(max=1)
    return Segments(ids.masked_fill(index < padding[:, None], -1))


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def diagonal_inputs(length: int, *, gate: tuple[int, ...] = (2, -1, M, N), state: bool = True) -> dict[str, Any]:
    """`gate` is the shape of log_a, -1 standing for the length."""
    shape = [length if size == -1 else size for size in gate]
    return {
        "x_BTX": leaf(2, length, M, N),
        "log_a_BTX": (-torch.rand(shape, dtype=torch.float64)).requires_grad_(),
        "state_BX": leaf(2, M, N) if state else None,
    }


def selective_inputs(length: int, *, fixed: str = "", state: bool = True) -> dict[str, Any]:
    """`fixed` names what is constant in time."""
    return {
        "u_BTM": leaf(2, length, M),
        "dt_BTM": torch.rand((1, 1, M) if "dt" in fixed else (2, length, M), dtype=torch.float64).requires_grad_(),
        "A_MN": (-torch.rand(M, N, dtype=torch.float64)).requires_grad_(),
        "B": leaf(M, N) if "B" in fixed else leaf(2, length, N),
        "C": leaf(M, N) if "C" in fixed else leaf(2, length, N),
        "D_M": leaf(M),
        "state_BMN": leaf(2, M, N) if state else None,
    }


def outputs_and_gradients(
    operator: Callable[..., Any], inputs: dict[str, Any], segments: Segments | None, backend: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The output, the final state and the gradient of each input of a fixed random function of both."""
    leaves = {name: None if x is None else x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    o, state = operator(**leaves, segments=segments, backend=backend)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype) for x in (o, state)]
    ((o * weights[0]).sum() + (state * weights[1]).sum()).backward()
    gradients = {f"d_{name}": x.grad for name, x in leaves.items() if x is not None}
    return {"o": o.detach(), "state": state.detach()} | gradients


def assert_agree(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        error = (got[name].double() - x.double()).abs().max().item() / max(1.0, x.abs().max().item())
        assert error <= tolerance, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("kind", KINDS)
def test_naive_is_the_definition(kind: str) -> None:
    segments = segments_for(kind, 11)
    inputs = {name: x.detach() for name, x in selective_inputs(11).items()}
    u, dt, A, B, C, D, state = inputs.values()
    x = dt[..., None] * u[..., None] * B[:, :, None]
    h, last = diagonal_scan(x, dt[..., None] * A, state_BX=state, segments=segments, backend="naive")
    y, selective_last = selective_scan(**inputs, segments=segments, backend="naive")
    for b in range(2):
        now, document = state[b], 0
        for t in range(11):
            here = 0 if segments is None else int(segments.ids_BT[b, t])
            if here < 0:
                assert not h[b, t].any()
                assert not y[b, t].any()
                continue
            if here != document:
                now, document = torch.zeros_like(now), here
            now = (dt[b, t, :, None] * A).exp() * now + x[b, t]
            torch.testing.assert_close(h[b, t], now, rtol=0, atol=1e-13)
            torch.testing.assert_close(y[b, t], now @ C[b, t] + D * u[b, t], rtol=0, atol=1e-13)
        torch.testing.assert_close(last[b], now, rtol=0, atol=1e-13)
        torch.testing.assert_close(selective_last[b], now, rtol=0, atol=1e-13)


@pytest.mark.parametrize("wide_row", [1, 10**9])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", LENGTHS)
def test_the_parallel_scan_equals_naive(length: int, kind: str, wide_row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one walk and in chunks."""
    monkeypatch.setattr(chunked_module, "WIDE_ROW", wide_row)
    inputs, segments = diagonal_inputs(length), segments_for(kind, length)
    want = outputs_and_gradients(diagonal_scan, inputs, segments, "naive", torch.float64)
    assert_agree(outputs_and_gradients(diagonal_scan, inputs, segments, "chunked", torch.float64), want, 1e-12)
    assert_agree(outputs_and_gradients(diagonal_scan, inputs, segments, "chunked", torch.float32), want, 1e-5)


@pytest.mark.parametrize("backend", ["naive", "chunked"])
@pytest.mark.parametrize("gate", [(2, -1, M, 1), (1, 1, M, N), (1, -1, 1, 1), (2, 1, 1, N)])
def test_gates_broadcast(gate: tuple[int, ...], backend: str) -> None:
    inputs, segments = diagonal_inputs(9, gate=gate, state=False), segments_for("both", 9)
    whole = inputs | {"log_a_BTX": inputs["log_a_BTX"].expand(2, 9, M, N)}
    want = outputs_and_gradients(diagonal_scan, whole, segments, "naive", torch.float64)
    gradient = want["d_log_a_BTX"]
    want["d_log_a_BTX"] = gradient.sum_to_size([9 if size == -1 else size for size in gate])
    assert_agree(outputs_and_gradients(diagonal_scan, inputs, segments, backend, torch.float64), want, 1e-12)


@pytest.mark.parametrize("states_at_once", [1, 7 * 2 * M * N, 10**9])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fixed", ["", "B", "C", "dt B C"])
def test_the_chunked_selective_scan_equals_naive(
    fixed: str, kind: str, states_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selective_chunked, "STATES_AT_ONCE", states_at_once)
    inputs, segments = selective_inputs(33, fixed=fixed, state=kind != "packed"), segments_for(kind, 33)
    want = outputs_and_gradients(selective_scan, inputs, segments, "naive", torch.float64)
    assert_agree(outputs_and_gradients(selective_scan, inputs, segments, "chunked", torch.float64), want, 1e-12)
    assert_agree(outputs_and_gradients(selective_scan, inputs, segments, "chunked", torch.float32), want, 1e-5)


@pytest.mark.parametrize("kind", ["none", "packed"])
@pytest.mark.parametrize(("operator", "draw"), [(diagonal_scan, diagonal_inputs), (selective_scan, selective_inputs)])
def test_one_step_equals_naive(operator: Any, draw: Any, kind: str) -> None:
    inputs = draw(1)
    segments = None if kind == "none" else Segments(torch.tensor([[0], [1]]))
    want = outputs_and_gradients(operator, inputs, segments, "naive", torch.float64)
    assert_agree(outputs_and_gradients(operator, inputs, segments, "step", torch.float64), want, 1e-13)
    with pytest.raises(UserError, match="one token at a time"):
        operator(**draw(2), backend="step")


@pytest.mark.parametrize("backend", ["naive", "chunked"])
@pytest.mark.parametrize("wide_row", [1, 10**9])
def test_no_gate_is_too_small_or_too_large(backend: str, wide_row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates of 1, of nothing, and both by turns, over a state that is kept or forgotten exactly."""
    monkeypatch.setattr(chunked_module, "WIDE_ROW", wide_row)
    x, state = torch.zeros(1, 300, 4), torch.ones(1, 4)
    x[:, 100] = 1.0
    log_a = torch.zeros(1, 300, 4)
    log_a[..., 1] = -1e4
    log_a[..., 2] = float("-inf")
    log_a[:, 50, 3] = -1e30
    leaves = [z.requires_grad_() for z in (x, log_a, state)]
    h, last = diagonal_scan(leaves[0], leaves[1], state_BX=leaves[2], backend=backend)
    assert h[0, 99].tolist() == [1, 0, 0, 0]
    assert h[0, 100].tolist() == [2, 1, 1, 1]
    assert last[0].tolist() == [2, 0, 0, 1]
    gradients = torch.autograd.grad(h.sum() + last.sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[2][0].tolist() == [301, 0, 0, 50]


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_the_selective_scan_takes_any_step(backend: str) -> None:
    u, dt = torch.randn(1, 40, 2), torch.tensor([0.0, 1e4]).expand(1, 40, 2)
    A, B = -torch.arange(1.0, 4).expand(2, 3), torch.ones(1, 40, 3)
    leaves = [z.clone().requires_grad_() for z in (u, dt, A, B, B, torch.ones(1, 2, 3))]
    y, state = selective_scan(*leaves[:5], state_BMN=leaves[5], backend=backend)
    torch.testing.assert_close(y[0, :, 0], torch.full((40,), 3.0))
    torch.testing.assert_close(y[0, :, 1], 3e4 * u[0, :, 1])
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum() + state.sum(), leaves))


def test_half_precision_keeps_a_wide_state() -> None:
    x, log_a = torch.randn(1, 50, 3).bfloat16(), -torch.rand(1, 50, 3)
    want, want_state = diagonal_scan(x.double(), log_a.double())
    h, state = diagonal_scan(x, log_a)
    assert h.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    torch.testing.assert_close(state.double(), want_state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(h.double(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("operator", ["diagonal_scan", "selective_scan"])
def test_what_it_cannot_do_is_said(operator: str) -> None:
    run, inputs = (diagonal_scan, diagonal_inputs(3)) if operator == "diagonal_scan" else (
        selective_scan, selective_inputs(3)
    )  # fmt: skip
    with pytest.raises(UserError, match=f"{operator} has no backend 'chunk'; did you mean 'chunked'"):
        run(**inputs, backend="chunk")
    with pytest.raises(UserError, match="no float64"):
        run(**inputs, backend="triton")


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("selective", [False, True])
def test_a_second_derivative_is_refused_and_not_wrong(selective: bool, power: int) -> None:
    """Also where it goes through what was saved alone, the loss being linear in the outputs."""
    x = torch.randn(1, 5, 3, dtype=torch.float64, requires_grad=True)

    def output(backend: str) -> Tensor:
        if selective:
            return selective_scan(x, x.square(), -torch.ones_like(x[0, :3]), x, x, backend=backend)[0]
        return diagonal_scan(x, -x.square(), backend=backend)[0]

    for backend in ("naive", "chunked"):
        (once,) = torch.autograd.grad(output(backend).pow(power).sum(), x, create_graph=True)
        if backend == "naive":
            torch.autograd.grad(once.sum(), x)
            continue
        with pytest.raises(RuntimeError, match="cannot be differentiated twice; use backend='naive'"):
            torch.autograd.grad(once.sum(), x)


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_the_selective_scan_is_exact_under_autocast(backend: str) -> None:
    u, B, C = torch.randn(2, 9, 3), torch.randn(2, 9, 4), torch.randn(2, 9, 4)
    arguments = (u, u.abs(), -torch.rand(3, 4), B, C)
    want = selective_scan(*arguments, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = selective_scan(*arguments, backend=backend)
    torch.testing.assert_close(got, want)
