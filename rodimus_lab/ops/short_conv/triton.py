"""The short convolution, with SiLU or without, in one pass over x forward and one over x and dy backward.

It slides along time (`sliding`). A trip is one tensor of tokens x M read or written. Forward: x read, y written.
Backward: x and dy read, dx written; what SiLU saw is worked out again. The sums over tokens for the parameters stay in
registers, and each program's are added up after it in a fixed order: the same inputs give the same bits.

Shapes: B batch, T time, M width, W convolution width, S x BM a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rodimus_lab.ops.fast_math import sigmoid, times_sigmoid
from rodimus_lab.ops.rows import as_rows, push
from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.short_conv.sliding import (
    apart,
    convolve,
    document_at,
    fit,
    input_at,
    inputs_before,
    load_taps,
    rows_of_tile,
    steps,
)
from rodimus_lab.ops.short_conv.state import last_inputs
from rodimus_lab.ops.tracing import opaque_operator


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, id_ptr, y_out, B, T, M, L, x_row,
    W: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, U: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
    STATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    b, first, end = rows_of_tile(B, T, L, W, S, False)
    m = (tl.program_id(0) * BM + tl.arange(0, BM))[None, :]
    in_m = m < M
    taps = load_taps(weight_ptr, m, in_m, W)
    bias = tl.load(bias_ptr + m, mask=in_m, other=0.0).to(tl.float32) if BIAS else 0.0
    token = b * T + first
    x_at = x_ptr + (token[:, None] * x_row + m)
    y_at = y_out + (token[:, None] * M + m)
    state_at = state_ptr + (b * (W - 1) + W - 1)[:, None] * M + m
    xs, ids = inputs_before(x_at, state_at, id_ptr + token, first, end, in_m, M, x_row, W, STATE, PACKED)
    for step in range(0, L, U):
        # All that the next U steps read is asked for before anything is written.
        news = (0.0,) * U
        for u in tl.static_range(U):
            in_tile = (first + step + u < end)[:, None] & in_m
            news = push(news, tl.load(x_at + (step + u) * x_row, mask=in_tile, other=0.0))
        for u in tl.static_range(U):
            i = step + u
            xs = push(xs, news[U - 1 - u].to(tl.float32))
            if PACKED:
                ids = push(ids, document_at(id_ptr + token + i, first + i, end))
            y = convolve(taps, bias, xs, ids, W, PACKED)
            if SILU:
                y = times_sigmoid(y, y)
            tl.store(y_at + i * M, y.to(y_out.dtype.element_ty), mask=(first + i < end)[:, None] & in_m)


@triton.jit
def _backward_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, id_ptr, dy_ptr, dx_out, dstate_out, sums_out, B, T, M, L, x_row, dy_row,
    W: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, U: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
    STATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dx_t needs the gradient dc of the convolution up to token t + W-1: step s reads token s and finishes token
    i = s - (W-1). The W-1 tokens behind the stretch are worked out for that alone."""
    b, first, end = rows_of_tile(B, T, L, W, S, STATE)
    begin = tl.maximum(first, 0)
    m = (tl.program_id(0) * BM + tl.arange(0, BM))[None, :]
    in_m = m < M
    taps = load_taps(weight_ptr, m, in_m, W)
    bias = tl.load(bias_ptr + m, mask=in_m, other=0.0).to(tl.float32) if BIAS else 0.0
    token = b * T + first
    x_at = x_ptr + (token[:, None] * x_row + m)
    dy_at = dy_ptr + (token[:, None] * dy_row + m)
    dx_at = dx_out + (token[:, None] * M + m)
    in_state = (b * (W - 1) + W - 1)[:, None] * M + m
    state_at = state_ptr + in_state
    xs, ids = inputs_before(x_at, state_at, id_ptr + token, first, end, in_m, M, x_row, W, STATE, PACKED)
    zero = tl.zeros([S, BM], tl.float32)
    dcs, dbias, dtaps = (zero,) * W, zero, (zero,) * W
    for step in range(0, L + W - 1, U):
        news, dys = (0.0,) * U, (0.0,) * U
        for u in tl.static_range(U):
            s = step + u
            in_s = (first + s >= begin) & (first + s < end)
            news = push(news, input_at(x_at + s * x_row, state_at, first + s, end, in_m, M, W, STATE))
            dys = push(dys, tl.load(dy_at + s * dy_row, mask=in_s[:, None] & in_m, other=0.0))
        for u in tl.static_range(U):
            s = step + u
            xs = push(xs, news[U - 1 - u].to(tl.float32))
            if PACKED:
                ids = push(ids, document_at(id_ptr + token + s, first + s, end))
            dc = dys[U - 1 - u].to(tl.float32)
            if SILU:
                conv = convolve(taps, bias, xs, ids, W, PACKED)
                silu = sigmoid(conv)
                dc *= silu * (1 + conv * (1 - silu))
            dcs = push(dcs, dc)

            own = tl.where(s < L, dc, 0.0)
            dbias += own
            sums = dtaps
            for back in tl.static_range(W):
                x = xs[back]
                if PACKED:
                    x = tl.where((ids[back] == ids[0])[:, None], x, 0.0)
                sums = push(sums, dtaps[W - 1 - back] + x * own)
            dtaps = sums

            i = s - (W - 1)
            dx = zero
            for ahead in tl.static_range(W):
                later = dcs[W - 1 - ahead]
                if PACKED:
                    later = tl.where((ids[W - 1 - ahead] == ids[W - 1])[:, None], later, 0.0)
                dx += taps[ahead] * later
            in_t = (i >= 0) & (i < L) & (first + i >= begin) & (first + i < end)
            tl.store(dx_at + i * M, dx.to(dx_out.dtype.element_ty), mask=in_t[:, None] & in_m)
            if STATE:
                before = (i >= 0) & (first + i < tl.minimum(end, 0))
                target = dstate_out + in_state + (first + i)[:, None] * M
                tl.store(target, dx.to(dstate_out.dtype.element_ty), mask=before[:, None] & in_m)

    sums_out += tl.program_id(1).to(tl.int64) * M * (W + 1)
    for tap in tl.static_range(W):
        tl.store(sums_out + (m * W + tap), tl.sum(dtaps[tap], 0)[None, :], mask=in_m)
    tl.store(sums_out + M * W + m, tl.sum(dbias, 0)[None, :], mask=in_m)


# A row of a tile is 256 and 128 bytes of a 16-bit type.
FORWARD_TILE = {"S": 4, "BM": 128, "U": 8, "num_warps": 4}
BACKWARD_TILE = {"S": 8, "BM": 64, "U": 8, "num_warps": 4}
# Programs a multiprocessor that stretches may be cut short for: a stretch reads W-1 tokens too many.
PROGRAMS, BACKWARD_PROGRAMS = 16, 4


def _given(x: Tensor, *others: Tensor | None) -> list[Tensor]:
    """The others as the kernels read them; x stands for what there is none of."""
    return [x if other is None else other.contiguous() for other in others]


def _constants(weight: Tensor, bias: Tensor | None, state: Tensor | None, ids: Tensor | None, silu: bool) -> Any:
    flags = {"BIAS": bias is not None, "SILU": silu, "STATE": state is not None, "PACKED": ids is not None}
    return {"W": weight.shape[1]} | flags


@opaque_operator("short_conv")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, ids: Tensor | None, silu: bool
) -> Tensor:
    B, T, M = x.shape
    rows, y = as_rows(x), x.new_empty(x.shape)
    tile = fit(FORWARD_TILE, x)
    L = steps(x, tile, PROGRAMS)
    _forward_kernel[(triton.cdiv(M, tile["BM"]), triton.cdiv(B * triton.cdiv(T, L), tile["S"]))](
        rows, *_given(x, weight, bias, state, ids), y, B, T, M, L, rows.stride(0),
        **tile, **_constants(weight, bias, state, ids, silu),
    )  # fmt: skip
    return y


@_forward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, ids: Tensor | None, silu: bool
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape)


@opaque_operator("short_conv_backward")
def _backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, ids: Tensor | None, silu: bool, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of x; those of weight and bias, one after another in float32; the state's, empty without one."""
    B, T, M = x.shape
    rows, dy, W = as_rows(x), as_rows(dy), weight.shape[1]
    tile = fit(BACKWARD_TILE, x)
    L = steps(x, tile, BACKWARD_PROGRAMS)
    groups = triton.cdiv(B * triton.cdiv(T + (0 if state is None else W - 1), L), tile["S"])
    dx, dstate = x.new_empty(x.shape), x.new_empty(0) if state is None else state.new_empty(state.shape)
    sums = x.new_empty(groups, M * (W + 1), dtype=torch.float32)
    _backward_kernel[(triton.cdiv(M, tile["BM"]), groups)](
        rows, *_given(x, weight, bias, state, ids), dy, dx, dstate, sums, B, T, M, L, rows.stride(0), dy.stride(0),
        **tile, **_constants(weight, bias, state, ids, silu),
    )  # fmt: skip
    return dx, sums.sum(0), dstate


@_backward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, ids: Tensor | None, silu: bool, dy: Tensor
) -> Any:
    sums = x.new_empty(weight.shape[0] * (weight.shape[1] + 1), dtype=torch.float32)
    return x.new_empty(x.shape), sums, x.new_empty(0) if state is None else state.new_empty(state.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _backward_of(ctx: Any, dy: Tensor) -> Any:
    saved = ctx.saved_tensors  # Once: under recomputation the second look would be refused.
    _, weight, bias, state, _ = saved
    dx, sums, dstate = _backward(*saved, ctx.silu, dy)
    dweight, dbias = apart(sums, weight, weight[:, 0] if bias is None else bias)
    return dx, dweight, None if bias is None else dbias, None if state is None else dstate, None, None


_forward.register_autograd(_backward_of, setup_context=_setup_context)


def fused(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    state_BWD: Tensor | None,
    segments: Segments | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """See `short_conv`. Sums in float32."""
    ids = None if segments is None else segments.ids_BT.int()
    y_BTD = _forward(x_BTD, weight_DW, bias_D, state_BWD, ids, silu)
    return y_BTD, last_inputs(x_BTD, weight_DW.shape[1] - 1, state_BWD, ids)
