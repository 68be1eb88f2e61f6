"""Tempered selection in one pass, forward and backward.

Forward: keys and logits read, log alpha (in float32) and keys written. Backward: these and both gradients read, the
gradients of keys and logits written. Rows are short, and what a row needs is a dozen functions of each of its numbers,
so instructions count as much as bytes: the logarithm of 1 + e is a short series, exponentials and quotients are the
fast ones, and nothing of the forward pass is kept but its inputs.

A program walks a stretch of rows, BN at a time, with the bias, and in the backward pass its gradient, in registers.
The partial gradients are added up in a fixed order: the same inputs give the same bits.

Shapes: N rows (tokens), K keys (BK: padded to a power of two); logits of g and then of tau.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rodimus_lab.ops.fast_math import divide, fast_exp, fast_log, sigmoid
from rodimus_lab.ops.rows import Walk, as_rows, walk
from rodimus_lab.ops.tracing import opaque_operator


@triton.jit
def _log1p(e):
    """log(1 + e) of e from 0 to 1, to 2e-8 of it beside rounding: 2 artanh(s), s = e / (2 + e) at most 1/3."""
    s = divide(e, 2.0 + e)
    t = s * s
    series = 2.0 / 11 + t * (2.0 / 13)
    series = 2.0 / 7 + t * (2.0 / 9 + t * series)
    return s * (2.0 + t * (2.0 / 3 + t * (2.0 / 5 + t * series)))


@triton.jit
def _softplus(a):
    """softplus(a), its logarithm, and the derivative of that. Far below 0 they are exp(a), a and 1 to rounding."""
    low = a < -15.0
    e = fast_exp(-tl.abs(a))
    g = tl.maximum(a, 0.0) + _log1p(e)
    slope = divide(tl.where(a < 0, e, 1.0), (1.0 + e) * g)
    return g, tl.where(low, a, fast_log(g)), tl.where(low, 1.0, slope)


@triton.jit
def _forward_kernel(
    k_ptr, logits_ptr, bias_ptr, log_alpha_out, k_out, N, K, L, k_row, logits_row, eps,
    BN: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """L rows."""
    m = tl.arange(0, BM)[None, :]
    in_m = m < K
    bias_g = tl.load(bias_ptr + m, mask=in_m, other=0.0).to(tl.float32)
    bias_tau = tl.load(bias_ptr + K + m, mask=in_m, other=0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * L
    end = tl.minimum(first + L, N)
    for step in tl.range(first, end, BN, num_stages=STAGES):
        n = step + tl.arange(0, BN)[:, None]
        here = (n < end) & in_m
        k = tl.load(k_ptr + (n * k_row + m), mask=here, other=0.0).to(tl.float32)
        a = tl.load(logits_ptr + (n * logits_row + m), mask=here, other=0.0).to(tl.float32) + bias_g
        t = tl.load(logits_ptr + (n * logits_row + K + m), mask=here, other=0.0).to(tl.float32) + bias_tau
        unit = 1.0 / tl.maximum(tl.sqrt(tl.sum(k * k, 1, keep_dims=True)), eps)
        g, log_g, _ = _softplus(a)
        tau = sigmoid(t)
        tl.store(log_alpha_out + (n * K + m), -g * tau, mask=here)
        tl.store(k_out + (n * K + m), (fast_exp(tau * log_g) * (k * unit)).to(k_out.dtype.element_ty), mask=here)


@triton.jit
def _backward_kernel(
    k_ptr, logits_ptr, bias_ptr, dlog_alpha_ptr, dk_ptr, dk_out, dlogits_out, sums_out,
    N, K, L, k_row, logits_row, dlog_alpha_row, dk_row, eps,
    BN: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """L rows."""
    m = tl.arange(0, BM)[None, :]
    in_m = m < K
    bias_g = tl.load(bias_ptr + m, mask=in_m, other=0.0).to(tl.float32)
    bias_tau = tl.load(bias_ptr + K + m, mask=in_m, other=0.0).to(tl.float32)
    dbias_g = tl.zeros([BN, BM], tl.float32)
    dbias_tau = tl.zeros([BN, BM], tl.float32)
    first = tl.program_id(0).to(tl.int64) * L
    end = tl.minimum(first + L, N)
    for step in tl.range(first, end, BN, num_stages=STAGES):
        n = step + tl.arange(0, BN)[:, None]
        here = (n < end) & in_m
        k = tl.load(k_ptr + (n * k_row + m), mask=here, other=0.0).to(tl.float32)
        a = tl.load(logits_ptr + (n * logits_row + m), mask=here, other=0.0).to(tl.float32) + bias_g
        t = tl.load(logits_ptr + (n * logits_row + K + m), mask=here, other=0.0).to(tl.float32) + bias_tau
        dlog_alpha = tl.load(dlog_alpha_ptr + (n * dlog_alpha_row + m), mask=here, other=0.0).to(tl.float32)
        dtaken = tl.load(dk_ptr + (n * dk_row + m), mask=here, other=0.0).to(tl.float32)
        norm = tl.sqrt(tl.sum(k * k, 1, keep_dims=True))
        unit = 1.0 / tl.maximum(norm, eps)
        k = k * unit
        g, log_g, slope = _softplus(a)
        tau = sigmoid(t)
        dk = dtaken * fast_exp(tau * log_g)
        along = dk * k  # also the gradient of tau log g
        # A key shorter than eps is divided by a constant.
        turned = tl.where(norm > eps, tl.sum(along, 1, keep_dims=True), 0.0)
        tl.store(dk_out + (n * K + m), ((dk - k * turned) * unit).to(dk_out.dtype.element_ty), mask=here)
        da = tau * slope * (along - dlog_alpha * g)
        dt = (along * log_g - dlog_alpha * g) * (tau - tau * tau)
        dbias_g += da
        dbias_tau += dt
        at = dlogits_out + (n * 2 * K + m)
        tl.store(at, da.to(dlogits_out.dtype.element_ty), mask=here)
        tl.store(at + K, dt.to(dlogits_out.dtype.element_ty), mask=here)
    at = sums_out + tl.program_id(0).to(tl.int64) * 2 * K + m
    tl.store(at, tl.sum(dbias_g, 0, keep_dims=True), mask=in_m)
    tl.store(at + K, tl.sum(dbias_tau, 0, keep_dims=True), mask=in_m)


FORWARD = Walk(programs=8, elements=8, tile=1024, stages=1)
BACKWARD = Walk(programs=4, elements=8, tile=1024, stages=1)


@opaque_operator("tempered_selection")
def _forward(k: Tensor, logits: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """log alpha in float32, and the keys that are taken in."""
    log_alpha, taken, K = k.new_empty(k.shape, dtype=torch.float32), k.new_empty(k.shape), k.shape[-1]
    k, logits, bias = as_rows(k), as_rows(logits), bias.contiguous()
    N = k.shape[0]
    programs, each, sizes = walk(k, FORWARD)
    _forward_kernel[(programs,)](
        k, logits, bias, log_alpha, taken, N, K, each, k.stride(0), logits.stride(0), eps, **sizes
    )
    return log_alpha, taken


@_forward.register_fake
def _(k: Tensor, logits: Tensor, bias: Tensor, eps: float) -> Any:
    return k.new_empty(k.shape, dtype=torch.float32), k.new_empty(k.shape)


@opaque_operator("tempered_selection_backward")
def _backward(
    k: Tensor, logits: Tensor, bias: Tensor, eps: float, dlog_alpha: Tensor, dtaken: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the keys and the logits, and in float32 that of the bias."""
    dk, dlogits, K = k.new_empty(k.shape), logits.new_empty(logits.shape), k.shape[-1]
    k, logits, dlog_alpha, dtaken, bias = *map(as_rows, (k, logits, dlog_alpha, dtaken)), bias.contiguous()
    N = k.shape[0]
    programs, each, sizes = walk(k, BACKWARD)
    sums = k.new_empty(programs, 2 * K, dtype=torch.float32)
    _backward_kernel[(programs,)](
        k, logits, bias, dlog_alpha, dtaken, dk, dlogits, sums, N, K, each,
        k.stride(0), logits.stride(0), dlog_alpha.stride(0), dtaken.stride(0), eps, **sizes,
    )  # fmt: skip
    return dk, dlogits, sums.sum(0)


@_backward.register_fake
def _(k: Tensor, logits: Tensor, bias: Tensor, eps: float, dlog_alpha: Tensor, dtaken: Tensor) -> Any:
    return k.new_empty(k.shape), logits.new_empty(logits.shape), bias.new_empty(bias.shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward_of(ctx: Any, dlog_alpha: Tensor, dtaken: Tensor) -> Any:
    saved = ctx.saved_tensors
    dk, dlogits, dbias = _backward(*saved, ctx.eps, dlog_alpha, dtaken)
    return dk, dlogits, dbias.to(saved[2].dtype), None


_forward.register_autograd(_backward_of, setup_context=_setup_context)


def fused(k_BTn: Tensor, logits_BTr: Tensor, bias_r: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `tempered_selection`. Computes in float32."""
    return _forward(k_BTn, logits_BTr, bias_r, eps)
