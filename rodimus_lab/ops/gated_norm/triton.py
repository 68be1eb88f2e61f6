"""Feedthrough, output gate and RMSNorm in one pass, forward and backward.

A trip is one tensor of tokens x M read or written. Forward: o, x' and z read, y written, and one number a token kept.
Backward: dy, o, x' and z read, do and dz written. dx' is feedthrough * do: it is left to torch, whose compiler makes it
part of the sum with the other gradient of x' and never writes it.

A program walks a stretch of rows, BN at a time, with the parameters, and in the backward pass their gradients, in
registers. The partial gradients are added up in a fixed order: the same inputs give the same bits.

Shapes: N rows (tokens), M width (BM: padded to a power of two).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rodimus_lab.ops.fast_math import sigmoid, times_sigmoid
from rodimus_lab.ops.rows import Walk, as_rows, walk
from rodimus_lab.ops.tracing import opaque_operator


@triton.jit
def _forward_kernel(
    o_ptr, x_ptr, z_ptr, feed_ptr, weight_ptr, y_out, rstd_out, N, M, L, o_row, x_row, z_row, eps,
    BN: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """L rows."""
    m = tl.arange(0, BM)[None, :]
    in_m = m < M
    feed = tl.load(feed_ptr + m, mask=in_m, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + m, mask=in_m, other=0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * L
    end = tl.minimum(first + L, N)
    for step in tl.range(first, end, BN, num_stages=STAGES):
        n = step + tl.arange(0, BN)[:, None]
        in_n = n < end
        here = in_n & in_m
        o = tl.load(o_ptr + (n * o_row + m), mask=here, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + (n * x_row + m), mask=here, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + (n * z_row + m), mask=here, other=0.0).to(tl.float32)
        u = (o + feed * x) * times_sigmoid(z, z)
        rstd = tl.rsqrt(tl.sum(u * u, 1, keep_dims=True) / M + eps)
        tl.store(y_out + (n * M + m), (u * rstd * weight).to(y_out.dtype.element_ty), mask=here)
        tl.store(rstd_out + n, rstd, mask=in_n)


@triton.jit
def _backward_kernel(
    dy_ptr, o_ptr, x_ptr, z_ptr, feed_ptr, weight_ptr, rstd_ptr, do_out, dz_out, sums_out,
    N, M, L, dy_row, o_row, x_row, z_row,
    BN: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """L rows."""
    m = tl.arange(0, BM)[None, :]
    in_m = m < M
    feed = tl.load(feed_ptr + m, mask=in_m, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + m, mask=in_m, other=0.0).to(tl.float32)
    dfeed = tl.zeros([BN, BM], tl.float32)
    dweight = tl.zeros([BN, BM], tl.float32)
    first = tl.program_id(0).to(tl.int64) * L
    end = tl.minimum(first + L, N)
    for step in tl.range(first, end, BN, num_stages=STAGES):
        n = step + tl.arange(0, BN)[:, None]
        in_n = n < end
        here = in_n & in_m
        dy = tl.load(dy_ptr + (n * dy_row + m), mask=here, other=0.0).to(tl.float32)
        o = tl.load(o_ptr + (n * o_row + m), mask=here, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + (n * x_row + m), mask=here, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + (n * z_row + m), mask=here, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + n, mask=in_n, other=0.0)
        gate = sigmoid(z)
        silu = z * gate
        fed = o + feed * x
        normed = fed * silu * rstd
        dweight += dy * normed
        dnormed = dy * weight
        du = rstd * (dnormed - normed * (tl.sum(dnormed * normed, 1, keep_dims=True) / M))
        do = du * silu
        dfeed += do * x
        dz = du * fed * (gate + silu * (1 - gate))
        tl.store(do_out + (n * M + m), do.to(do_out.dtype.element_ty), mask=here)
        tl.store(dz_out + (n * M + m), dz.to(dz_out.dtype.element_ty), mask=here)
    at = sums_out + tl.program_id(0).to(tl.int64) * 2 * M + m
    tl.store(at, tl.sum(dfeed, 0, keep_dims=True), mask=in_m)
    tl.store(at + M, tl.sum(dweight, 0, keep_dims=True), mask=in_m)


FORWARD = Walk(programs=4, elements=32, tile=8192, stages=1)
BACKWARD = Walk(programs=1, elements=16, tile=4096, stages=3)


@opaque_operator("gated_norm")
def _forward(o: Tensor, x: Tensor, z: Tensor, feedthrough: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, and 1 / root of each row's mean square."""
    y, M = o.new_empty(o.shape), o.shape[-1]
    rstd = o.new_empty(o.shape[:-1], dtype=torch.float32)
    o, x, z, feedthrough, weight = as_rows(o), as_rows(x), as_rows(z), feedthrough.contiguous(), weight.contiguous()
    N = o.shape[0]
    programs, each, sizes = walk(o, FORWARD)
    _forward_kernel[(programs,)](
        o, x, z, feedthrough, weight, y, rstd, N, M, each, o.stride(0), x.stride(0), z.stride(0), eps, **sizes
    )
    return y, rstd


@_forward.register_fake
def _(o: Tensor, x: Tensor, z: Tensor, feedthrough: Tensor, weight: Tensor, eps: float) -> Any:
    return o.new_empty(o.shape), o.new_empty(o.shape[:-1], dtype=torch.float32)


@opaque_operator("gated_norm_backward")
def _backward(
    o: Tensor, x: Tensor, z: Tensor, feedthrough: Tensor, weight: Tensor, rstd: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of o and z, and in float32 those of the feedthrough and the weight, one below the other."""
    do, dz, M = o.new_empty(o.shape), z.new_empty(z.shape), o.shape[-1]
    o, x, z, dy = as_rows(o), as_rows(x), as_rows(z), as_rows(dy)
    feedthrough, weight = feedthrough.contiguous(), weight.contiguous()
    N = o.shape[0]
    programs, each, sizes = walk(o, BACKWARD)
    sums = o.new_empty(programs, 2, M, dtype=torch.float32)
    _backward_kernel[(programs,)](
        dy, o, x, z, feedthrough, weight, rstd, do, dz, sums, N, M, each,
        dy.stride(0), o.stride(0), x.stride(0), z.stride(0), **sizes,
    )  # fmt: skip
    return do, dz, sums.sum(0)


@_backward.register_fake
def _(o: Tensor, x: Tensor, z: Tensor, feedthrough: Tensor, weight: Tensor, rstd: Tensor, dy: Tensor) -> Any:
    return o.new_empty(o.shape), z.new_empty(z.shape), o.new_empty(2, o.shape[-1], dtype=torch.float32)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:5], output[1])


def _backward_of(ctx: Any, dy: Tensor, drstd: Tensor) -> Any:
    """rstd is handed out for this pass only."""
    saved = ctx.saved_tensors  # Once: under recomputation the second look would be refused.
    _, x, _, feedthrough, weight, _ = saved
    do, dz, sums = _backward(*saved, dy)
    return do, (do * feedthrough).to(x.dtype), dz, sums[0].to(feedthrough.dtype), sums[1].to(weight.dtype), None


_forward.register_autograd(_backward_of, setup_context=_setup_context)


def fused(o_BTM: Tensor, x_BTM: Tensor, z_BTM: Tensor, feedthrough_M: Tensor, weight_M: Tensor, eps: float) -> Tensor:
    """See `gated_norm`. Computes in float32."""
    return _forward(o_BTM, x_BTM, z_BTM, feedthrough_M, weight_M, eps)[0]
