"""The linear cross entropy against torch's, and what it holds in memory.

Shapes: N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rodimus_lab.ops import cross_entropy

N, D, V = 23, 4, 11
implementation = importlib.import_module("rodimus_lab.ops.cross_entropy.linear_cross_entropy")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for the logits of five tokens, so that chunks are many and the last one short."""
    monkeypatch.setattr(implementation, "CHUNK_ELEMENTS", {"cpu": 5 * V})


def draw(ignored: str = "some", dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, bias = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in ((N, D), (V, D), (V,)))
    targets = torch.randint(0, V, (N,))
    ignore = {"none": slice(0, 0), "some": slice(3, 9), "all": slice(None)}[ignored]
    targets[ignore] = -100
    return x, weight, targets, bias


def expected(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, reduction: str) -> Tensor:
    losses = F.cross_entropy(F.linear(x, weight, bias), targets, reduction="none")
    count = max(1, int((targets != -100).sum()))
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / count}[reduction]


@pytest.mark.parametrize("backend", ["chunked", "naive"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_and_gradients(backend: str, reduction: Any, ignored: str, with_bias: bool) -> None:
    x, weight, targets, bias = draw(ignored)
    leaves = (x, weight, bias) if with_bias else (x, weight)
    used = bias if with_bias else None
    loss = cross_entropy(x, weight, targets, bias_V=used, reduction=reduction, backend=backend)
    want = expected(x, weight, targets, used, reduction)
    torch.testing.assert_close(loss, want, rtol=0, atol=1e-12)
    upstream = torch.randn_like(want)
    got = torch.autograd.grad(loss, leaves, upstream)
    torch.testing.assert_close(got, torch.autograd.grad(want, leaves, upstream), rtol=0, atol=1e-12)


def test_any_leading_shape_and_any_ignore_index() -> None:
    x, weight, targets, _ = draw("none")
    targets = targets[:20].reshape(4, 5)
    targets[0, 0] = targets[2, 3] = 3
    for ignore_index in (3, -1, V + 5):
        marked = targets.masked_fill(targets == 3, ignore_index)
        loss = cross_entropy(x[:20].reshape(4, 5, D), weight, marked, ignore_index=ignore_index, reduction="none")
        (gradient,) = torch.autograd.grad(cross_entropy(x[:20], weight, marked, ignore_index=ignore_index), x)
        want = expected(x[:20], weight, targets.masked_fill(targets == 3, -100).flatten(), None, "none")
        assert loss.shape == (4, 5)
        torch.testing.assert_close(loss.flatten(), want)
        want_mean = expected(x[:20], weight, targets.masked_fill(targets == 3, -100).flatten(), None, "mean")
        torch.testing.assert_close(gradient, torch.autograd.grad(want_mean, x)[0])


@pytest.mark.parametrize("backend", ["chunked", "naive"])
def test_half_precision_inputs_give_a_float32_loss(backend: str) -> None:
    x, weight, targets, bias = (y.detach() for y in draw())
    x, weight = x.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    loss = cross_entropy(x, weight, targets, bias_V=bias.float(), backend=backend)
    loss.backward()
    wide = [y.detach().double().requires_grad_() for y in (x, weight)]
    want = expected(*wide, targets, bias, "mean")
    want.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=5e-3, atol=0)
    for got, y in zip((x, weight), wide, strict=True):
        assert got.grad.dtype == torch.bfloat16
        assert (got.grad.double() - y.grad).norm() / y.grad.norm() < 1e-2


def test_autocast_runs_the_products_in_its_dtype() -> None:
    x, weight, targets, _ = draw(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), Recorder() as recorder:
        loss = cross_entropy(x, weight, targets)
    assert loss.dtype == torch.float32
    assert recorder.product_dtypes == {torch.bfloat16}
    loss.backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


class Recorder(TorchDispatchMode):
    """The largest tensor that any operator returns, and the dtypes of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.product_dtypes, self.products = 0, set(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *(tensor.numel() for tensor in tensors)])
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.products += 1
            self.product_dtypes.add(tensors[0].dtype)
        return out


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_logits_are_never_all_in_memory(reduction: Any) -> None:
    tokens = 400
    x, weight = (torch.randn(shape, requires_grad=True) for shape in ((tokens, D), (V, D)))
    targets = torch.randint(0, V, (tokens,))
    peaks = {}
    for backend in ("chunked", "naive"):
        with Recorder() as recorder:
            cross_entropy(x, weight, targets, reduction=reduction, backend=backend).sum().backward()
        peaks[backend] = recorder.largest
    assert peaks["naive"] == tokens * V
    assert peaks["chunked"] == tokens * D


def test_without_gradients_only_the_loss_is_computed() -> None:
    x, weight, targets, _ = draw()
    with Recorder() as training:
        loss = cross_entropy(x, weight, targets)
    with torch.no_grad(), Recorder() as scoring:
        same = cross_entropy(x, weight, targets)
    torch.testing.assert_close(loss, same)
    assert training.products == 3 * scoring.products > 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_tokens_at_all(reduction: Any) -> None:
    _, weight, _, _ = draw()
    loss = cross_entropy(weight[:0], weight, torch.zeros(0, dtype=torch.long), reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert loss.dtype == torch.float64
    assert loss.sum() == 0


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    x, weight, targets, _ = draw()
    (once,) = torch.autograd.grad(cross_entropy(x, weight, targets).square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice; use backend='naive'"):
        torch.autograd.grad(once.sum(), x)
    loss = cross_entropy(x, weight, targets, backend="naive")
    (once,) = torch.autograd.grad(loss.square(), x, create_graph=True)
    once.sum().backward()


def test_an_unknown_reduction_is_named() -> None:
    x, weight, targets, _ = draw()
    with pytest.raises(ValueError, match="no reduction 'avg'; take 'mean', 'sum' or 'none'"):
        cross_entropy(x, weight, targets, reduction="avg")  # type: ignore[arg-type]
