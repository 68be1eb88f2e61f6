"""`linear_step` in Triton: one kernel that reads each weight once for a few rows; else norm and activation in a kernel,
then the product, for some rows on tensor cores with the weights as the tall operand, for many by the vendor's library.

A program of the first takes `BE` outputs. It loads their weights before it waits for the previous kernel (see
`ops/launch.py`); the norm's factor 1/rms is the same for all inputs of a row, so it is multiplied to the sum and x is
read only once.

Shapes: B rows (BB: padded to a power of two), D inputs, E outputs, BD and BE the tile of weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rodimus_lab.ops.launch import gdc_launch_dependents, gdc_wait, launch_options
from rodimus_lab.ops.linear_step.rms import RMS


@triton.jit
def load_weights(w_ptr, row, start, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr):
    """w (BE, BD) of the outputs `row` from input `start` on."""
    col = start + tl.arange(0, BD)
    at = row.to(tl.int64)[:, None] * D + col[None, :]
    return tl.load(w_ptr + at, mask=(row < E)[:, None] & (col < D)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def weights_times_rows(
    w, w_ptr, row, x_ptr, x_stride, norm_ptr, eps,
    D: tl.constexpr, E: tl.constexpr, B: tl.constexpr, BB: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """y (BE, BB) in float32; `w` is the first tile of weights, already loaded."""
    batch = tl.arange(0, BB)
    y = tl.zeros([BE, BB], tl.float32)
    squares = tl.zeros([BB], tl.float32)
    for start in tl.static_range(0, D, BD):
        ahead = w
        if start + BD < D:
            ahead = load_weights(w_ptr, row, start + BD, D, E, BD)
        col = start + tl.arange(0, BD)
        wide = w.to(tl.float32)
        factor = tl.full([BD], 1.0, tl.float32)
        if NORM:
            factor = tl.load(norm_ptr + col, mask=col < D, other=0.0).to(tl.float32)
        for b in tl.static_range(B):
            x = tl.load(x_ptr + b * x_stride + col, mask=col < D, other=0.0).to(tl.float32)
            if GATED:
                g = tl.load(x_ptr + b * x_stride + D + col, mask=col < D, other=0.0).to(tl.float32)
                x *= g * tl.sigmoid(g)
            if NORM:
                squares += tl.where(batch == b, tl.sum(x * x, 0), 0.0)
                x *= factor
            y += tl.where((batch == b)[None, :], tl.sum(wide * x[None, :], 1)[:, None], 0.0)
        w = ahead
    if NORM:
        y *= tl.rsqrt(squares / D + eps)[None, :]
    return y


@triton.jit
def _gemv_kernel(
    x_ptr, w_ptr, bias_ptr, norm_ptr, base_ptr, y_out, x_stride, eps,
    D: tl.constexpr, E: tl.constexpr, B: tl.constexpr, BB: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, BASE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BE + tl.arange(0, BE)
    batch = tl.arange(0, BB)
    w = load_weights(w_ptr, row, 0, D, E, BD)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    y = weights_times_rows(w, w_ptr, row, x_ptr, x_stride, norm_ptr, eps, D, E, B, BB, BE, BD, NORM, GATED)
    if BIAS:
        y += tl.load(bias_ptr + row, mask=row < E, other=0.0).to(tl.float32)[:, None]
    at = batch[None, :] * E + row[:, None]
    inside = (row < E)[:, None] & (batch < B)[None, :]
    if BASE:
        y += tl.load(base_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_out + at, y.to(y_out.dtype.element_ty), mask=inside)


@triton.jit
def _ready_kernel(
    x_ptr, norm_ptr, y_out, x_stride, eps,
    D: tl.constexpr, BD: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: act(norm(x))."""
    b = tl.program_id(0)
    col = tl.arange(0, BD)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + b * x_stride + col, mask=col < D, other=0.0).to(tl.float32)
    if GATED:
        g = tl.load(x_ptr + b * x_stride + D + col, mask=col < D, other=0.0).to(tl.float32)
        x *= g * tl.sigmoid(g)
    if NORM:
        factor = tl.load(norm_ptr + col, mask=col < D, other=0.0).to(tl.float32)
        x *= tl.rsqrt(tl.sum(x * x, 0) / D + eps) * factor
    tl.store(y_out + b * D + col, x.to(y_out.dtype.element_ty), mask=col < D)


@triton.jit
def _skinny_kernel(
    x_ptr, w_ptr, bias_ptr, base_ptr, y_out, x_stride,
    D: tl.constexpr, E: tl.constexpr, B: tl.constexpr, BB: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
    STAGES: tl.constexpr, BIAS: tl.constexpr, BASE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The next kernel may start only once the one before this has ended, as in `rodimus_step`'s `narrow`."""
    row, batch = tl.program_id(0) * BE + tl.arange(0, BE), tl.arange(0, BB)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    y = tl.zeros([BE, BB], tl.float32)
    for start in tl.range(0, D, BD, num_stages=STAGES):
        col = start + tl.arange(0, BD)
        at = x_ptr + batch[:, None] * x_stride + col[None, :]
        x = tl.load(at, mask=(batch < B)[:, None] & (col < D)[None, :], other=0.0)
        y = tl.dot(load_weights(w_ptr, row, start, D, E, BD), tl.trans(x), y, input_precision="ieee")
    if BIAS:
        y += tl.load(bias_ptr + row, mask=row < E, other=0.0).to(tl.float32)[:, None]
    at = batch[None, :] * E + row[:, None]
    inside = (row < E)[:, None] & (batch < B)[None, :]
    if BASE:
        y += tl.load(base_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_out + at, y.to(y_out.dtype.element_ty), mask=inside)


def skinny_tile(inputs: int, outputs: int, itemsize: int) -> dict[str, int]:
    """Enough programs for all of the GPU, and 64 KiB of weights or more under way in each."""
    height = next((height for height in (64, 32) if outputs >= 128 * height), 16)
    width = max(16, min(triton.next_power_of_2(inputs), 512 // itemsize * min(2, 64 // height)))
    return {"BE": height, "BD": width, "STAGES": 4, "num_warps": max(2, height // 16)}


def tile(inputs: int, outputs: int, itemsize: int) -> dict[str, int]:
    """`BE`, `BD` and the warps of a program: some 16 KiB of weights a program, 16 bytes a load."""
    width = min(triton.next_power_of_2(inputs), 4096 // itemsize)
    return {"BE": 4, "BD": width, "num_warps": 4}


def gemv(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: RMS | None, gated: bool, base: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `linear_step`; sums in float32."""
    E, D = weight.shape
    B = x.shape[0]
    y = x.new_empty(B, E, dtype=dtype)
    size = tile(D, E, weight.element_size())
    _gemv_kernel[(triton.cdiv(E, size["BE"]),)](
        x, weight, weight if bias is None else bias, weight if norm is None else norm.weight_D,
        weight if base is None else base.contiguous(), y, x.stride(0), 0.0 if norm is None else norm.eps,
        D=D, E=E, B=B, BB=triton.next_power_of_2(B), NORM=norm is not None, GATED=gated, BIAS=bias is not None,
        BASE=base is not None, **size, **launch_options(x),
    )  # fmt: skip
    return y


def ready(x: Tensor, width: int, norm: RMS | None, gated: bool, dtype: torch.dtype) -> Tensor:
    """act(norm(x)), rounded to `dtype`."""
    if norm is None and not gated:
        return x.to(dtype)
    y = x.new_empty(x.shape[0], width, dtype=dtype)
    _ready_kernel[(x.shape[0],)](
        x, x if norm is None else norm.weight_D, y, x.stride(0), 0.0 if norm is None else norm.eps,
        D=width, BD=triton.next_power_of_2(width), NORM=norm is not None, GATED=gated, num_warps=8, **launch_options(x),
    )  # fmt: skip
    return y


def skinny(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: RMS | None, gated: bool, base: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `linear_step`; the inputs of the product are in the weight's dtype, its sums in float32."""
    (E, D), B = weight.shape, x.shape[0]
    x = ready(x, D, norm, gated, weight.dtype)
    y = x.new_empty(B, E, dtype=dtype)
    size = skinny_tile(D, E, weight.element_size())
    _skinny_kernel[(triton.cdiv(E, size["BE"]),)](
        x, weight, weight if bias is None else bias, weight if base is None else base.contiguous(), y, x.stride(0),
        D=D, E=E, B=B, BB=max(16, triton.next_power_of_2(B)), BIAS=bias is not None, BASE=base is not None, **size,
        **launch_options(x),
    )  # fmt: skip
    return y


def gemm(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: RMS | None, gated: bool, base: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `linear_step`; the product by the vendor's library, in the weight's dtype."""
    x = ready(x, weight.shape[1], norm, gated, weight.dtype)
    if base is not None and bias is None and base.dtype == weight.dtype:
        return torch.addmm(base, x, weight.T).to(dtype)
    y = torch.nn.functional.linear(x, weight, bias)
    return (y if base is None else base + y).to(dtype)
