"""The short convolution and the value gate in one pass over x forward and in two backward.

The convolution slides along time (`short_conv.sliding`), and the sums over tokens for its parameters stay in registers
as well. The gate's logits, and what its gradient adds to dx, are products of rank R for the rows at hand. The loads of
the next U steps are under way while U are worked on.

A trip is one tensor of tokens x M read or written; the narrow tensors (h of rank R, the parameters' partial sums) are
small beside it. Forward: x read, x' and v written. Backward: x and dv read for dh, which is a sum over all of M; then
x, dx' and dv read and dx written, with dh W_1 in it. Convolution and logits are worked out again.

Each program's partial sums are added up after it in a fixed order: the same inputs give the same bits.

Shapes: B batch, T time, M width, W convolution width, R rank (BR: padded), S x BM or BT x BM a tile.
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
from rodimus_lab.ops.triton_facts import dot_precision


@triton.jit
def _forward_kernel(
    x_ptr, h_ptr, up_ptr, up_bias_ptr, weight_ptr, bias_ptr, state_ptr, id_ptr, conv_out, v_out, B, T, M, L, x_row,
    W: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, U: tl.constexpr,
    STAGES: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, first, end = rows_of_tile(B, T, L, W, S, False)
    m, r = (tl.program_id(0) * BM + tl.arange(0, BM))[None, :], tl.arange(0, BR)
    in_m, in_r = m < M, r < R
    up = tl.load(up_ptr + m * R + r[:, None], mask=in_m & in_r[:, None], other=0.0).to(x_ptr.dtype.element_ty)
    up_bias = tl.load(up_bias_ptr + m, mask=in_m, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + m, mask=in_m, other=0.0).to(tl.float32)
    taps = load_taps(weight_ptr, m, in_m, W)
    token = b * T + first
    x_at = x_ptr + (token[:, None] * x_row + m)
    h_at = h_ptr + (token[:, None] * R + r[None, :])
    state_at = state_ptr + (b * (W - 1) + W - 1)[:, None] * M + m
    at = token[:, None] * M + m
    xs, ids = inputs_before(x_at, state_at, id_ptr + token, first, end, in_m, M, x_row, W, STATE, PACKED)
    for step in tl.range(0, L, U, num_stages=STAGES):
        for u in tl.static_range(U):
            i = step + u
            in_t = first + i < end
            in_tile = in_t[:, None] & in_m
            x = tl.load(x_at + i * x_row, mask=in_tile, other=0.0).to(tl.float32)
            h = tl.load(h_at + i * R, mask=in_t[:, None] & in_r[None, :], other=0.0)
            xs = push(xs, x)
            if PACKED:
                ids = push(ids, document_at(id_ptr + token + i, first + i, end))
            conv = convolve(taps, bias, xs, ids, W, PACKED)
            tl.store(conv_out + (at + i * M), times_sigmoid(conv, conv).to(conv_out.dtype.element_ty), mask=in_tile)
            v = times_sigmoid(x, tl.dot(h, up, input_precision=PRECISION) + up_bias)
            tl.store(v_out + (at + i * M), v.to(v_out.dtype.element_ty), mask=in_tile)


@triton.jit
def _gate_kernel(
    x_ptr, h_ptr, up_ptr, up_bias_ptr, dv_ptr, dh_out, sums_out, N, M, L, x_row, dv_row,
    R: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward, first: what the gate's logits owe to h, W_2 and b, over BM of the width and L of the N = B T tokens,
    which here are taken in plain tiles."""
    block, stretch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    m, r, i = block * BM + tl.arange(0, BM), tl.arange(0, BR), tl.arange(0, BT)
    in_m, in_r = m < M, r < R
    in_up = in_m[:, None] & in_r[None, :]
    up = tl.load(up_ptr + m[:, None] * R + r[None, :], mask=in_up, other=0.0).to(x_ptr.dtype.element_ty)
    up_bias = tl.load(up_bias_ptr + m, mask=in_m, other=0.0).to(tl.float32)
    x_at = x_ptr + stretch * L * x_row + (i[:, None] * x_row + m[None, :])
    dv_at = dv_ptr + stretch * L * dv_row + (i[:, None] * dv_row + m[None, :])
    dup = tl.zeros([BM, BR], tl.float32)
    # The sum over tokens for b is a product as well, each of its columns the sum: less work than adding across threads.
    dup_bias, ones = dup, tl.full([BT, BR], 1.0, up.dtype)
    for step in tl.range(0, L, BT, num_stages=STAGES):
        t = stretch * L + step + i
        in_t = t < N
        in_tile = in_t[:, None] & in_m[None, :]
        in_h = in_t[:, None] & in_r[None, :]
        at = t[:, None] * R + r[None, :]
        h = tl.load(h_ptr + at, mask=in_h, other=0.0)
        x = tl.load(x_at + step * x_row, mask=in_tile, other=0.0).to(tl.float32)
        dv = tl.load(dv_at + step * dv_row, mask=in_tile, other=0.0).to(tl.float32)
        gate = sigmoid(tl.dot(h, tl.trans(up), input_precision=PRECISION) + up_bias[None, :])
        dlogit = (dv * x * gate * (1 - gate)).to(h.dtype)
        dup_bias = tl.dot(tl.trans(dlogit), ones, dup_bias, input_precision=PRECISION)
        dup = tl.dot(tl.trans(dlogit), h, dup, input_precision=PRECISION)
        dh = tl.dot(dlogit, up, input_precision=PRECISION)
        tl.store(dh_out + (block.to(tl.int64) * N * R + at), dh.to(dh_out.dtype.element_ty), mask=in_h)
    sums_out += stretch * M * (R + 1)
    tl.store(sums_out + (m[:, None] * R + r[None, :]), dup, mask=in_up)
    tl.store(sums_out + M * R + m, tl.sum(dup_bias, 1) / BR, mask=in_m)


@triton.jit
def _backward_kernel(
    x_ptr, h_ptr, dh_ptr, down_ptr, up_ptr, up_bias_ptr, weight_ptr, bias_ptr, state_ptr, id_ptr, dconv_ptr, dv_ptr,
    dx_out, dstate_out, sums_out, B, T, M, L, x_row, dconv_row, dv_row,
    W: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, U: tl.constexpr,
    STAGES: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward, second: dx, W_1 and the convolution's parameters. dx_t needs the gradient dc of what SiLU saw up to
    token t + W-1, so that step i reads token s = i + W-1 of the stretch and finishes token i."""
    b, first, end = rows_of_tile(B, T, L, W, S, STATE)
    begin = tl.maximum(first, 0)
    m, r = (tl.program_id(0) * BM + tl.arange(0, BM))[None, :], tl.arange(0, BR)
    in_m, in_r = m < M, r < R
    in_gate = in_m & in_r[:, None]
    up = tl.load(up_ptr + m * R + r[:, None], mask=in_gate, other=0.0).to(x_ptr.dtype.element_ty)
    down = tl.load(down_ptr + r[:, None] * M + m, mask=in_gate, other=0.0).to(x_ptr.dtype.element_ty)
    up_bias = tl.load(up_bias_ptr + m, mask=in_m, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + m, mask=in_m, other=0.0).to(tl.float32)
    taps = load_taps(weight_ptr, m, in_m, W)
    token = b * T + first
    x_at = x_ptr + (token[:, None] * x_row + m)
    dconv_at = dconv_ptr + (token[:, None] * dconv_row + m)
    dv_at = dv_ptr + (token[:, None] * dv_row + m)
    in_state = (b * (W - 1) + W - 1)[:, None] * M + m
    narrow = token[:, None] * R + r[None, :]
    at = token[:, None] * M + m

    # As a product, it brings what is added to it into the products' arrangement over the threads, where a thread has
    # two rows of four columns, not one of eight: fewer registers for the parameters, and no tile changes sides.
    zero = tl.dot(tl.zeros([S, BR], up.dtype), up, input_precision=PRECISION)
    bias += zero
    EARLY: tl.constexpr = (W - 2 + U) // U * U
    xs, ids = (0.0,) * W, (0,) * W
    for p in tl.static_range(-1 - EARLY, W - 1 - EARLY):
        past = input_at(x_at + p * x_row, state_ptr + in_state, first + p, end, in_m, M, W, STATE)
        xs = push(xs, past.to(tl.float32) + zero)
        if PACKED:
            ids = push(ids, document_at(id_ptr + token + p, first + p, end))
    dcs, dbias, dtaps = (zero,) * W, zero, (zero,) * W
    ddown = tl.zeros([BM, BR], tl.float32)
    for step in tl.range(-EARLY, L, U, num_stages=STAGES):
        for u in tl.static_range(U):
            i = step + u
            s = i + W - 1
            new = input_at(x_at + s * x_row, state_ptr + in_state, first + s, end, in_m, M, W, STATE)
            in_s = (first + s >= begin) & (first + s < end)
            dconv = tl.load(dconv_at + s * dconv_row, mask=in_s[:, None] & in_m, other=0.0).to(tl.float32)
            own = in_s & (s < L)
            dh = tl.load(dh_ptr + (narrow + s * R), mask=own[:, None] & in_r[None, :], other=0.0)
            ddown = tl.dot(tl.trans(new), dh, ddown, input_precision=PRECISION)

            xs = push(xs, new.to(tl.float32))
            if PACKED:
                ids = push(ids, document_at(id_ptr + token + s, first + s, end))
            conv = convolve(taps, bias, xs, ids, W, PACKED)
            silu = sigmoid(conv)
            dcs = push(dcs, dconv * silu * (1 + conv * (1 - silu)))

            in_t = (first + i >= begin) & (first + i < end)
            in_tile = in_t[:, None] & in_m
            in_h = in_t[:, None] & in_r[None, :]
            dv = tl.load(dv_at + i * dv_row, mask=in_tile, other=0.0).to(tl.float32)
            h = tl.load(h_ptr + (narrow + i * R), mask=in_h, other=0.0)
            dh = tl.load(dh_ptr + (narrow + i * R), mask=in_h, other=0.0)
            dx = times_sigmoid(dv, tl.dot(h, up, input_precision=PRECISION) + up_bias)
            dx = tl.dot(dh, down, dx, input_precision=PRECISION)
            x = tl.where(i >= 0, xs[W - 1], 0.0)
            sums = dtaps
            for ahead in tl.static_range(W):
                dc = dcs[W - 1 - ahead]
                if PACKED:
                    dc = tl.where((ids[W - 1 - ahead] == ids[W - 1])[:, None], dc, 0.0)
                dx += taps[ahead] * dc
                sums = push(sums, dtaps[W - 1 - ahead] + x * dc)
            dtaps = sums
            dbias += dcs[W - 1]

            tl.store(dx_out + (at + i * M), dx.to(dx_out.dtype.element_ty), mask=in_tile)
            if STATE:
                before = (i >= 0) & (first + i < tl.minimum(end, 0))
                target = dstate_out + in_state + (first + i)[:, None] * M
                tl.store(target, dx.to(dstate_out.dtype.element_ty), mask=before[:, None] & in_m)

    sums_out += tl.program_id(1).to(tl.int64) * M * (R + W + 1)
    tl.store(sums_out + (r[:, None] * M + m), tl.trans(ddown), mask=in_gate)
    for tap in tl.static_range(W):
        tl.store(sums_out + M * R + (m * W + tap), tl.sum(dtaps[tap], 0)[None, :], mask=in_m)
    tl.store(sums_out + M * (R + W) + m, tl.sum(dbias, 0)[None, :], mask=in_m)


# A row of a tile is 128 bytes of a 16-bit type. STAGES: how many groups of U steps, or tiles, are in shared memory at
# once, one of them in use.
FORWARD_TILE = {"S": 16, "BM": 64, "U": 4, "STAGES": 4, "num_warps": 4, "maxnreg": 128}
GATE_TILE = {"BT": 64, "BM": 64, "STAGES": 4, "num_warps": 4, "maxnreg": 168}
BACKWARD_TILE = {"S": 16, "BM": 64, "U": 4, "STAGES": 3, "num_warps": 4}
# Programs a multiprocessor that stretches may be cut short for: a stretch reads W-1 tokens too many.
PROGRAMS, BACKWARD_PROGRAMS = 2, 1
# Tokens that a program of the gate's backward pass sums over.
GATE_STRETCH = 1024


def _constants(x: Tensor, up: Tensor, weight: Tensor, state: Tensor | None, ids: Tensor | None) -> dict[str, Any]:
    R = up.shape[1]
    return {
        "W": weight.shape[1],
        "R": R,
        "BR": max(16, triton.next_power_of_2(R)),
        "STATE": state is not None,
        "PACKED": ids is not None,
        "PRECISION": dot_precision(x.dtype),
    }


@opaque_operator("conv_gate")
def _forward(
    x: Tensor, down: Tensor, up: Tensor, up_bias: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None,
    ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x', v and h = x W_1."""
    B, T, M = x.shape
    rows, up_bias, bias = as_rows(x), up_bias.contiguous(), bias.contiguous()
    h = rows @ down.to(x.dtype).T
    conv, v = x.new_empty(x.shape), x.new_empty(x.shape)
    tile = fit(FORWARD_TILE, x)
    L = steps(x, tile, PROGRAMS)
    _forward_kernel[(triton.cdiv(M, tile["BM"]), triton.cdiv(B * triton.cdiv(T, L), tile["S"]))](
        rows, h, up.contiguous(), up_bias, weight.contiguous(), bias, x if state is None else state.contiguous(),
        x if ids is None else ids, conv, v, B, T, M, L, rows.stride(0),
        **tile, **_constants(x, up, weight, state, ids),
    )  # fmt: skip
    return conv, v, h.view(B, T, h.shape[-1])


@_forward.register_fake
def _(
    x: Tensor, down: Tensor, up: Tensor, up_bias: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None,
    ids: Tensor | None,
) -> Any:  # fmt: skip
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(*x.shape[:2], down.shape[0])


@opaque_operator("conv_gate_backward")
def _backward(
    x: Tensor, down: Tensor, up: Tensor, up_bias: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None,
    ids: Tensor | None, h: Tensor, dconv: Tensor, dv: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradient of x; those of W_2 and b, and those of W_1 and of the convolution's weight and bias, one after
    another in float32; the state's, empty without one."""
    B, T, M = x.shape
    N, R, W = B * T, up.shape[1], weight.shape[1]
    rows, dconv, dv = as_rows(x), as_rows(dconv), as_rows(dv)
    down, up, up_bias, bias = (each.contiguous() for each in (down, up, up_bias, bias))
    constants = _constants(x, up, weight, state, ids)
    tile = fit(GATE_TILE, x)
    blocks, groups = triton.cdiv(M, tile["BM"]), triton.cdiv(N, GATE_STRETCH)
    dh, of_gate = x.new_empty(blocks, N, R), x.new_empty(groups, M * (R + 1), dtype=torch.float32)
    _gate_kernel[(blocks, groups)](
        rows, h, up, up_bias, dv, dh, of_gate, N, M, GATE_STRETCH, rows.stride(0), dv.stride(0),
        **tile, **{name: constants[name] for name in ("R", "BR", "PRECISION")},
    )  # fmt: skip

    tile = fit(BACKWARD_TILE, x)
    L = steps(x, tile, BACKWARD_PROGRAMS)
    groups = triton.cdiv(B * triton.cdiv(T + (0 if state is None else W - 1), L), tile["S"])
    dx, dstate = x.new_empty(B, T, M), x.new_empty(0) if state is None else state.new_empty(state.shape)
    of_conv = x.new_empty(groups, M * (R + W + 1), dtype=torch.float32)
    _backward_kernel[(triton.cdiv(M, tile["BM"]), groups)](
        rows, h, dh.sum(0), down, up, up_bias, weight.contiguous(), bias, x if state is None else state.contiguous(),
        x if ids is None else ids, dconv, dv, dx, dstate, of_conv, B, T, M, L,
        rows.stride(0), dconv.stride(0), dv.stride(0), **tile, **constants,
    )  # fmt: skip
    return dx, of_gate.sum(0), of_conv.sum(0), dstate


@_backward.register_fake
def _(
    x: Tensor, down: Tensor, up: Tensor, up_bias: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None,
    ids: Tensor | None, h: Tensor, dconv: Tensor, dv: Tensor,
) -> Any:  # fmt: skip
    (M, R), W = up.shape, weight.shape[1]
    sums = (x.new_empty(M * each, dtype=torch.float32) for each in (R + 1, R + W + 1))
    return x.new_empty(x.shape), *sums, x.new_empty(0) if state is None else state.new_empty(state.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs, output[2])


def _backward_of(ctx: Any, dconv: Tensor, dv: Tensor, dh: Tensor) -> Any:
    """h is handed out for this pass only."""
    saved = ctx.saved_tensors  # Once: under recomputation the second look would be refused.
    _, down, up, up_bias, weight, bias, state, *_ = saved
    dx, of_gate, of_conv, dstate = _backward(*saved, dconv, dv)
    dup, dup_bias = apart(of_gate, up, up_bias)
    ddown, dweight, dbias = apart(of_conv, down, weight, bias)
    return dx, ddown, dup, dup_bias, dweight, dbias, None if state is None else dstate, None


_forward.register_autograd(_backward_of, setup_context=_setup_context)


def fused(
    x_BTM: Tensor,
    conv_weight_MW: Tensor,
    conv_bias_M: Tensor,
    gate: tuple[Tensor, Tensor, Tensor],
    state_BWM: Tensor | None,
    segments: Segments | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `conv_gate`. Sums and gates in float32, the gate's products in x's dtype."""
    ids = None if segments is None else segments.ids_BT.int().contiguous()
    conv_BTM, v_BTM, _ = _forward(x_BTM, *gate, conv_weight_MW, conv_bias_M, state_BWM, ids)
    return conv_BTM, v_BTM, last_inputs(x_BTM, conv_weight_MW.shape[1] - 1, state_BWM, ids)
