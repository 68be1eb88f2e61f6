"""`rodimus_step` in Triton, in four kernels for a few rows:

    enter   x, z = split(norm(u) W_fc), x' = SiLU(ShortConv(x)); the convolution's state moves on by one
    narrow  q, k, logits of g and tau = x' W,  the value gate's low rank = x W_1
    memory  gates, v, S = exp(-g tau) S + (g^tau k)^T v, y = (q S / sqrt(n) + d x') SiLU(z)
    leave   base + RMSNorm(y) W_out

For many rows the products go through the vendor's library and the convolution is a kernel of its own.

Shapes: see dispatch.py; BB, BN, BR: B, n and R padded to a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rodimus_lab.ops.launch import gdc_launch_dependents, gdc_wait, launch_options
from rodimus_lab.ops.linear_step import MAX_ROWS, dispatch
from rodimus_lab.ops.linear_step.triton import gemm, gemv, load_weights, skinny, tile, weights_times_rows
from rodimus_lab.ops.rodimus_step.gates import decay_and_key
from rodimus_lab.ops.rodimus_step.weights import RodimusWeights


@triton.jit
def _past(conv_ptr, cw_ptr, cb_ptr, channel, M: tl.constexpr, W: tl.constexpr, BW: tl.constexpr,
          B: tl.constexpr, BB: tl.constexpr, BE: tl.constexpr):  # fmt: skip
    """The convolution's last W - 1 inputs (BE, BB, BW), and its sum over them with the bias (BE, BB)."""
    batch, tap = tl.arange(0, BB), tl.arange(0, BW)
    inside = (channel < M)[:, None, None] & (batch < B)[None, :, None] & (tap < W - 1)[None, None, :]
    at = (batch[None, :, None] * (W - 1) + tap[None, None, :]) * M + channel[:, None, None]
    history = tl.load(conv_ptr + at, mask=inside, other=0.0)
    taps = (channel < M)[:, None] & (tap < W - 1)[None, :]
    weight = tl.load(cw_ptr + channel[:, None] * W + tap[None, :], mask=taps, other=0.0).to(tl.float32)
    bias = tl.load(cb_ptr + channel, mask=channel < M, other=0.0).to(tl.float32)
    return history, tl.sum(history.to(tl.float32) * weight[:, None, :], 2) + bias[:, None]


@triton.jit
def _convolve(x, history, past, conv_ptr, cw_ptr, c_out, channel, M: tl.constexpr, W: tl.constexpr, BW: tl.constexpr,
              B: tl.constexpr, BB: tl.constexpr, BE: tl.constexpr):  # fmt: skip
    """x' of the new inputs x (BE, BB), and the history one step on."""
    batch, tap = tl.arange(0, BB), tl.arange(0, BW)
    inside = (channel < M)[:, None] & (batch < B)[None, :]
    newest = tl.load(cw_ptr + channel * W + W - 1, mask=channel < M, other=0.0).to(tl.float32)
    y = past + newest[:, None] * x.to(tl.float32)
    y *= tl.sigmoid(y)
    tl.store(c_out + batch[None, :] * M + channel[:, None], y.to(c_out.dtype.element_ty), mask=inside)
    at = (batch[None, :, None] * (W - 1) + tap[None, None, :] - 1) * M + channel[:, None, None]
    tl.store(conv_ptr + at, history, mask=inside[:, :, None] & ((tap >= 1) & (tap < W - 1))[None, None, :])
    at = (batch[None, :] * (W - 1) + W - 2) * M + channel[:, None]
    tl.store(conv_ptr + at, x.to(conv_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _enter_kernel(
    u_ptr, w_ptr, norm_ptr, conv_ptr, cw_ptr, cb_ptr, xz_out, c_out, u_stride, eps,
    D: tl.constexpr, M: tl.constexpr, W: tl.constexpr, BW: tl.constexpr,
    B: tl.constexpr, BB: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BE + tl.arange(0, BE)
    batch = tl.arange(0, BB)
    w = load_weights(w_ptr, row, 0, D, 2 * M, BD)
    history, past = _past(conv_ptr, cw_ptr, cb_ptr, row, M, W, BW, B, BB, BE)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    y = weights_times_rows(w, w_ptr, row, u_ptr, u_stride, norm_ptr, eps, D, 2 * M, B, BB, BE, BD, True, False)
    x = y.to(xz_out.dtype.element_ty)
    inside = (row < 2 * M)[:, None] & (batch < B)[None, :]
    tl.store(xz_out + batch[None, :] * (2 * M) + row[:, None], x, mask=inside)
    _convolve(x, history, past, conv_ptr, cw_ptr, c_out, row, M, W, BW, B, BB, BE)


@triton.jit
def _conv_kernel(
    xz_ptr, conv_ptr, cw_ptr, cb_ptr, c_out,
    M: tl.constexpr, W: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1)
    channel = tl.program_id(0) * BM + tl.arange(0, BM)
    conv_ptr += b * (W - 1) * M
    history, past = _past(conv_ptr, cw_ptr, cb_ptr, channel, M, W, BW, 1, 1, BM)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(xz_ptr + b * 2 * M + channel, mask=channel < M, other=0.0)[:, None]
    _convolve(x, history, past, conv_ptr, cw_ptr, c_out + b * M, channel, M, W, BW, 1, 1, BM)


@triton.jit
def _narrow_kernel(
    c_ptr, xz_ptr, w_ptr, down_ptr, narrow_out, low_out,
    M: tl.constexpr, E: tl.constexpr, R: tl.constexpr,
    B: tl.constexpr, BB: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs of the first cdiv(E, BE) have rows of the state's projection, the others of the value gate's.

    The next kernel may start only once `enter` has ended. So neither `memory` nor the next step's `enter`, which read
    the state before they wait, can overtake the kernel that wrote it.
    """
    pid = tl.program_id(0)
    batch = tl.arange(0, BB)
    if pid < tl.cdiv(E, BE):
        row = pid * BE + tl.arange(0, BE)
        w = load_weights(w_ptr, row, 0, M, E, BD)
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        y = weights_times_rows(w, w_ptr, row, c_ptr, M, c_ptr, 0.0, M, E, B, BB, BE, BD, False, False)
        inside = (row < E)[:, None] & (batch < B)[None, :]
        tl.store(narrow_out + batch[None, :] * E + row[:, None], y.to(narrow_out.dtype.element_ty), mask=inside)
    else:
        row = (pid - tl.cdiv(E, BE)) * BE + tl.arange(0, BE)
        w = load_weights(down_ptr, row, 0, M, R, BD)
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        y = weights_times_rows(w, down_ptr, row, xz_ptr, 2 * M, xz_ptr, 0.0, M, R, B, BB, BE, BD, False, False)
        inside = (row < R)[:, None] & (batch < B)[None, :]
        tl.store(low_out + batch[None, :] * R + row[:, None], y.to(low_out.dtype.element_ty), mask=inside)


@triton.jit
def _memory_kernel(
    narrow_ptr, low_ptr, gate_bias_ptr, xz_ptr, c_ptr, up_ptr, up_bias_ptr, through_ptr, state_ptr, y_out, scale,
    M: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n, r = tl.arange(0, BN), tl.arange(0, BR)
    in_M, in_N, in_R = m < M, n < N, r < R
    state_at = state_ptr + (b.to(tl.int64) * N + n[:, None]) * M + m[None, :]
    state = tl.load(state_at, mask=in_N[:, None] & in_M[None, :], other=0.0)
    up = tl.load(up_ptr + m[:, None] * R + r[None, :], mask=in_M[:, None] & in_R[None, :], other=0.0)
    up_bias = tl.load(up_bias_ptr + m, mask=in_M, other=0.0).to(tl.float32)
    through = tl.load(through_ptr + m, mask=in_M, other=0.0).to(tl.float32)
    g_bias = tl.load(gate_bias_ptr + n, mask=in_N, other=0.0).to(tl.float32)
    tau_bias = tl.load(gate_bias_ptr + N + n, mask=in_N, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = narrow_ptr + b * (4 * N) + n
    q = tl.load(row, mask=in_N, other=0.0).to(tl.float32) * scale
    k = tl.load(row + N, mask=in_N, other=0.0).to(tl.float32)
    g_logit = tl.load(row + 2 * N, mask=in_N, other=0.0).to(tl.float32) + g_bias
    tau_logit = tl.load(row + 3 * N, mask=in_N, other=0.0).to(tl.float32) + tau_bias
    low = tl.load(low_ptr + b * R + r, mask=in_R, other=0.0).to(tl.float32)
    x = tl.load(xz_ptr + b * (2 * M) + m, mask=in_M, other=0.0).to(tl.float32)
    z = tl.load(xz_ptr + b * (2 * M) + M + m, mask=in_M, other=0.0).to(tl.float32)
    c = tl.load(c_ptr + b * M + m, mask=in_M, other=0.0).to(tl.float32)
    decay, k = decay_and_key(g_logit, tau_logit, k)
    v = x * tl.sigmoid(tl.sum(up.to(tl.float32) * low[None, :], 1) + up_bias)
    new = state.to(tl.float32) * decay[:, None] + k[:, None] * v[None, :]
    tl.store(state_at, new.to(state_ptr.dtype.element_ty), mask=in_N[:, None] & in_M[None, :])
    o = tl.sum(q[:, None] * new, 0) + through * c
    tl.store(y_out + b * M + m, o * z * tl.sigmoid(z), mask=in_M)


def fused(x: Tensor, base: Tensor, conv: Tensor, memory: Tensor, weights: RodimusWeights) -> Tensor:
    """See `rodimus_step`. Sums in float32; y is kept in float32 up to the norm."""
    assert conv.is_contiguous()
    assert memory.is_contiguous()
    dtype = weights.fc_2MD.dtype
    B, D = x.shape
    M, W = weights.conv_MW.shape
    E, R, N = weights.state_proj_EM.shape[0], weights.gate_down_RM.shape[0], memory.shape[-2]
    BW, BB = triton.next_power_of_2(W - 1), triton.next_power_of_2(B)
    options = launch_options(x)
    c = x.new_empty(B, M, dtype=dtype)
    y = x.new_empty(B, M, dtype=torch.float32)
    if B <= MAX_ROWS:
        xz = x.new_empty(B, 2 * M, dtype=dtype)
        size = tile(D, 2 * M, weights.fc_2MD.element_size())
        _enter_kernel[(triton.cdiv(2 * M, size["BE"]),)](
            x, weights.fc_2MD, weights.norm.weight_D, conv, weights.conv_MW, weights.conv_bias_M, xz, c,
            x.stride(0), weights.norm.eps, D=D, M=M, W=W, BW=BW, B=B, BB=BB, **size, **options,
        )  # fmt: skip
        narrow, low = x.new_empty(B, E, dtype=torch.float32), x.new_empty(B, R, dtype=torch.float32)
        # Few rows: a program has whole ones, all of it asked for at once.
        whole = min(triton.next_power_of_2(M), 8192 // weights.state_proj_EM.element_size())
        size = {"BE": 2, "BD": whole, "num_warps": 8}
        _narrow_kernel[(triton.cdiv(E, 2) + triton.cdiv(R, 2),)](
            c, xz, weights.state_proj_EM, weights.gate_down_RM, narrow, low,
            M=M, E=E, R=R, B=B, BB=BB, **size, **options,
        )  # fmt: skip
    else:
        product = skinny if B <= dispatch.SKINNY_ROWS else gemm
        xz = product(x, weights.fc_2MD, None, weights.norm, False, None, dtype)
        _conv_kernel[(triton.cdiv(M, 256), B)](
            xz, conv, weights.conv_MW, weights.conv_bias_M, c, M=M, W=W, BW=BW, BM=256, **options
        )
        narrow = product(c, weights.state_proj_EM, None, None, False, None, dtype)
        low = product(xz[:, :M], weights.gate_down_RM, None, None, False, None, dtype)
    width = 32 if B <= MAX_ROWS else 64  # One keeps all of the GPU busy, the other reads whole cache lines.
    _memory_kernel[(triton.cdiv(M, width), B)](
        narrow, low, weights.gate_bias_2n, xz, c, weights.gate_up_MR, weights.gate_up_bias_M, weights.feedthrough_M,
        memory, y, N**-0.5,
        M=M, N=N, BN=triton.next_power_of_2(N), R=R, BR=triton.next_power_of_2(R), BM=width,
        num_warps=4, **options,
    )  # fmt: skip
    leave = gemv if B <= MAX_ROWS else product
    return leave(y, weights.out_DM, None, weights.out_norm, False, base, base.dtype)
