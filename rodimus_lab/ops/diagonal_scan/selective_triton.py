"""The selective scan in Triton: a warp walks a block of channels through time with their N states in registers.

Nothing of the size of all states is written. The forward pass keeps the states that enter every `CHUNK` tokens; the
backward pass goes through the chunks from the last, works a chunk's states out again, which stay in registers as well,
and walks back over them. Its equations are in `selective_chunked`. What a chunk reads is asked for before it is worked
on, so that the waits overlap. Behind the end of the sequence u, dt and dy are 0, which changes nothing.

Sums are taken in a fixed order: the same inputs give the same bits.

Shapes: B batch, T time, M channels, N state expansion, S stretches, K chunks, P blocks of channels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rodimus_lab.ops.diagonal_scan.stretches import chain, split
from rodimus_lab.ops.rows import push, rows_ahead
from rodimus_lab.ops.tracing import opaque_operator

CHUNK = 8
STATES = 256  # of a program, which is one warp: no sum over channels or states then waits for another one.
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _places(A_ptr, T, M: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """The sequence, its first token, this program's channels and all states with which of them there are (known to the
    compiler where all are), where they stand in (M, N) and in (B, S, M, N), and A times log2(e)."""
    b = tl.program_id(1).to(tl.int64)
    channel, state = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN)
    in_M, in_N = channel < M, state < N
    if M % BM == 0:
        in_M = tl.full([BM], True, tl.int1)
    if N == BN:
        in_N = tl.full([BN], True, tl.int1)
    of_state = channel[:, None] * N + state[None, :]
    edge = (b * tl.num_programs(2) + tl.program_id(2)) * M * N + of_state
    A = tl.load(A_ptr + of_state, mask=in_M[:, None] & in_N[None, :], other=0.0) * LOG2_E
    return b, b * T, channel, state, in_M, in_N, of_state, edge, A


@triton.jit
def _per_state(
    z_ptr, first, end, token, channel, state, in_M, in_N, N: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr,
    VARIES: tl.constexpr,
):  # fmt: skip
    """B or C for the tokens of a chunk: a row for all channels where it varies in time, else (M, N)."""
    if VARIES:
        return rows_ahead(z_ptr, first, end, token, N, state[None, :], in_N[None, :], CHUNK, EVEN)
    else:
        inside = in_M[:, None] & in_N[None, :]
        z = tl.load(z_ptr + (channel[:, None] * N + state[None, :]), mask=inside, other=0.0)
        return (z.to(tl.float32),) * CHUNK


@triton.jit
def _decay(dt, A, starts_ptr, token, t, end, PACKED: tl.constexpr):
    """exp(dt A), and 0 where a document starts; A comes times log2(e)."""
    a = tl.exp2(dt[:, None] * A)
    if PACKED:
        a = tl.where(tl.load(starts_ptr + token + t, mask=t < end, other=0) != 0, 0.0, a)
    return a


@triton.jit
def _forward_kernel(
    u_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, starts_ptr, start_ptr, y_out, kept_out, end_out, decay_out, T, LENGTH,
    M: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr,
    VARIES_B: tl.constexpr, VARIES_C: tl.constexpr, PACKED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """y over one stretch, the states entering its chunks, and its last. Without `KEEP`: from zero, the last state and
    the whole decay."""
    stretch = tl.program_id(2)
    b, token, channel, state, in_M, in_N, of_state, edge, A = _places(A_ptr, T, M, N, BM, BN)
    inside = in_M[:, None] & in_N[None, :]
    h = tl.zeros([BM, BN], tl.float32)
    whole = tl.full([BM, BN], 1.0, tl.float32)
    if KEEP:
        h = tl.load(start_ptr + edge, mask=inside, other=0.0)
    end = tl.minimum(stretch * LENGTH + LENGTH, T)
    for first in range(stretch * LENGTH, end, CHUNK):
        us = rows_ahead(u_ptr, first, end, token, M, channel, in_M, CHUNK, EVEN)
        dts = rows_ahead(dt_ptr, first, end, token, M, channel, in_M, CHUNK, EVEN)
        Bs = _per_state(B_ptr, first, end, token, channel, state, in_M, in_N, N, CHUNK, EVEN, VARIES_B)
        Cs = Bs
        y_at = y_out + ((token + first) * M + channel)
        if KEEP:
            Cs = _per_state(C_ptr, first, end, token, channel, state, in_M, in_N, N, CHUNK, EVEN, VARIES_C)
            kept = (b * tl.cdiv(T, CHUNK) + first // CHUNK) * M * N
            tl.store(kept_out + kept + of_state, h, mask=inside)
        for i in tl.static_range(CHUNK):
            a = _decay(dts[i], A, starts_ptr, token, first + i, end, PACKED)
            h = a * h + (dts[i] * us[i])[:, None] * Bs[i]
            if KEEP:
                in_tile = in_M
                if not EVEN:
                    in_tile = in_M & (first + i < end)
                tl.store(y_at + i * M, tl.sum(h * Cs[i], 1).to(y_out.dtype.element_ty), mask=in_tile)
            else:
                whole *= a
    tl.store(end_out + edge, h, mask=inside)
    if not KEEP:
        tl.store(decay_out + edge, whole, mask=inside)


@triton.jit
def _reverse_kernel(
    dt_ptr, A_ptr, C_ptr, starts_ptr, dy_ptr, end_out, decay_out, T, LENGTH,
    M: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr,
    VARIES_C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One stretch from its end to its start, from zero: the gradient of the state before it, and the whole decay."""
    stretch = tl.program_id(2)
    _b, token, channel, state, in_M, in_N, _of_state, edge, A = _places(A_ptr, T, M, N, BM, BN)
    inside = in_M[:, None] & in_N[None, :]
    dstate = tl.zeros([BM, BN], tl.float32)
    whole = tl.full([BM, BN], 1.0, tl.float32)
    begin, end = stretch * LENGTH, tl.minimum(stretch * LENGTH + LENGTH, T)
    chunks = tl.cdiv(end - begin, CHUNK)
    for back in range(chunks):
        first = begin + (chunks - 1 - back) * CHUNK
        dts = rows_ahead(dt_ptr, first, end, token, M, channel, in_M, CHUNK, EVEN)
        dys = rows_ahead(dy_ptr, first, end, token, M, channel, in_M, CHUNK, EVEN)
        Cs = _per_state(C_ptr, first, end, token, channel, state, in_M, in_N, N, CHUNK, EVEN, VARIES_C)
        for i in tl.static_range(CHUNK - 1, -1, -1):
            a = _decay(dts[i], A, starts_ptr, token, first + i, end, PACKED)
            dstate = a * (dys[i][:, None] * Cs[i] + dstate)
            whole *= a
    tl.store(end_out + edge, dstate, mask=inside)
    tl.store(decay_out + edge, whole, mask=inside)


@triton.jit
def _backward_kernel(
    u_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, starts_ptr, kept_ptr, dy_ptr, dstart_ptr,
    du_out, ddt_out, dA_out, dB_out, dC_out, dend_out, T, LENGTH,
    M: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr,
    VARIES_B: tl.constexpr, VARIES_C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One stretch from its end to its start. dB and dC are (B, T, P, N), or like dA (B, S, M, N)."""
    BLOCKS: tl.constexpr = (M + BM - 1) // BM
    stretch = tl.program_id(2)
    b, token, channel, state, in_M, in_N, of_state, edge, A = _places(A_ptr, T, M, N, BM, BN)
    inside = in_M[:, None] & in_N[None, :]
    dstate = tl.load(dstart_ptr + edge, mask=inside, other=0.0)
    dA, dB, dC = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
    begin, end = stretch * LENGTH, tl.minimum(stretch * LENGTH + LENGTH, T)
    chunks = tl.cdiv(end - begin, CHUNK)
    for back in range(chunks):
        first = begin + (chunks - 1 - back) * CHUNK
        us = rows_ahead(u_ptr, first, end, token, M, channel, in_M, CHUNK, EVEN)
        dts = rows_ahead(dt_ptr, first, end, token, M, channel, in_M, CHUNK, EVEN)
        dys = rows_ahead(dy_ptr, first, end, token, M, channel, in_M, CHUNK, EVEN)
        Bs = _per_state(B_ptr, first, end, token, channel, state, in_M, in_N, N, CHUNK, EVEN, VARIES_B)
        Cs = _per_state(C_ptr, first, end, token, channel, state, in_M, in_N, N, CHUNK, EVEN, VARIES_C)
        h = tl.load(kept_ptr + (b * tl.cdiv(T, CHUNK) + first // CHUNK) * M * N + of_state, mask=inside, other=0.0)
        hs = (h,) * (CHUNK + 1)  # In the end the latest first: token i finds hs[CHUNK - i] and leaves the one before.
        for i in tl.static_range(CHUNK):
            a = _decay(dts[i], A, starts_ptr, token, first + i, end, PACKED)
            h = a * h + (dts[i] * us[i])[:, None] * Bs[i]
            hs = push(hs, h)
        at, part = (token + first) * M + channel, ((token + first) * BLOCKS + tl.program_id(0)) * N + state
        for i in tl.static_range(CHUNK - 1, -1, -1):
            u, dt, dy = us[i], dts[i], dys[i]
            dh = dy[:, None] * Cs[i] + dstate
            dstate = _decay(dt, A, starts_ptr, token, first + i, end, PACKED) * dh
            e = dstate * hs[CHUNK - i]
            dA += dt[:, None] * e
            w = tl.sum(dh * Bs[i], 1)
            in_tile, in_part = in_M, in_N
            if not EVEN:
                in_tile, in_part = in_M & (first + i < end), in_N & (first + i < end)
            tl.store(du_out + at + i * M, (w * dt).to(du_out.dtype.element_ty), mask=in_tile)
            tl.store(ddt_out + at + i * M, tl.sum(e * A, 1) / LOG2_E + w * u, mask=in_tile)
            dB_t = (dt * u)[:, None] * dh
            dC_t = dy[:, None] * hs[CHUNK - 1 - i]
            if VARIES_B:
                tl.store(dB_out + part + i * BLOCKS * N, tl.sum(dB_t, 0), mask=in_part)
            else:
                dB += dB_t
            if VARIES_C:
                tl.store(dC_out + part + i * BLOCKS * N, tl.sum(dC_t, 0), mask=in_part)
            else:
                dC += dC_t
    tl.store(dA_out + edge, dA, mask=inside)
    tl.store(dend_out + edge, dstate, mask=inside)
    if not VARIES_B:
        tl.store(dB_out + edge, dB, mask=inside)
    if not VARIES_C:
        tl.store(dC_out + edge, dC, mask=inside)


class _Plan(NamedTuple):
    """`grid`: blocks of channels, batch, stretches."""

    grid: tuple[int, int, int]
    BM: int
    BN: int
    numbers: dict[str, int]

    @property
    def blocks(self) -> dict[str, int]:
        return self.numbers | {"BM": self.BM, "BN": self.BN, "CHUNK": CHUNK, "num_warps": 1}


def _plan(u: Tensor, A: Tensor) -> _Plan:
    batch, length, channels = u.shape
    expansion = A.shape[1]
    BN = triton.next_power_of_2(expansion)
    BM = min(max(1, STATES // BN), triton.next_power_of_2(channels))
    blocks = triton.cdiv(channels, BM)
    stretches, tokens = split(length, blocks * batch, CHUNK, on_gpu=u.is_cuda)
    numbers = {"T": length, "LENGTH": tokens, "M": channels, "N": expansion, "EVEN": length % CHUNK == 0}
    return _Plan((blocks, batch, stretches), BM, BN, numbers)


@opaque_operator("selective_scan")
def _forward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and the states entering each chunk."""
    u, dt, A, B, C, state = (z.contiguous() for z in (u, dt, A, B, C, state))
    plan = _plan(u, A)
    y = torch.empty_like(u)
    kept = state.new_empty(u.shape[0], triton.cdiv(u.shape[1], CHUNK), *A.shape)
    end = state.new_empty(u.shape[0], plan.grid[2], *A.shape)
    start, decay = state.unsqueeze(1), torch.empty_like(end)
    inputs = (u, dt, A, B, C, dt if starts is None else starts)
    flags = {"VARIES_B": B.ndim == 3, "VARIES_C": C.ndim == 3, "PACKED": starts is not None}
    if plan.grid[2] > 1:
        _forward_kernel[plan.grid](*inputs, start, y, kept, end, decay, KEEP=False, **flags, **plan.blocks)
        start = chain(state, end, decay)
    _forward_kernel[plan.grid](*inputs, start, y, kept, end, decay, KEEP=True, **flags, **plan.blocks)
    return y, end[:, -1].clone(), kept


@_forward.register_fake
def _(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, starts: Tensor | None) -> Any:
    kept = state.new_empty(u.shape[0], -(-u.shape[1] // CHUNK), *A.shape)
    return u.new_empty(u.shape), state.new_empty(state.shape), kept


@opaque_operator("selective_scan_backward")
def _backward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor | None, kept: Tensor, dy: Tensor,
    dlast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    u, dt, A, B, C, dy = (z.contiguous() for z in (u, dt, A, B, C, dy))
    plan, batch, length = _plan(u, A), *u.shape[:2]
    blocks, _, stretches = plan.grid
    du, ddt = torch.empty_like(u), torch.empty_like(dt)
    end = kept.new_empty(batch, stretches, *A.shape)
    dA, decay = torch.empty_like(end), torch.empty_like(end)
    dB, dC = (
        kept.new_empty(batch, length, blocks, A.shape[1]) if z.ndim == 3 else torch.empty_like(end) for z in (B, C)
    )
    dlast = torch.zeros_like(kept[:, 0]) if dlast is None else dlast
    start = dlast.unsqueeze(1).contiguous()
    given = dt if starts is None else starts
    flags = {"VARIES_C": C.ndim == 3, "PACKED": starts is not None}
    if stretches > 1:
        _reverse_kernel[plan.grid](dt, A, C, given, dy, end, decay, **flags, **plan.blocks)
        start = chain(dlast, end, decay, reverse=True)
    _backward_kernel[plan.grid](
        u, dt, A, B, C, given, kept, dy, start, du, ddt, dA, dB, dC, end,
        VARIES_B=B.ndim == 3, **flags, **plan.blocks,
    )  # fmt: skip
    dB, dC = ((d.sum(2) if z.ndim == 3 else d.sum((0, 1))).to(z.dtype) for d, z in ((dB, B), (dC, C)))
    return du, ddt, dA.sum((0, 1)), dB, dC, end[:, 0].clone()


@_backward.register_fake
def _(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor | None, kept: Tensor, dy: Tensor,
    dlast: Tensor | None,
) -> Any:  # fmt: skip
    du, ddt, dA, dB, dC, dstate = (z.new_empty(z.shape) for z in (u, dt, A, B, C, kept[:, 0]))
    return du, ddt, dA, dB, dC, dstate


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    u, dt, A, B, C, _, starts = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u, dt, A, B, C, starts, output[2])


def _backward_of(ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: Any) -> Any:
    dy = torch.zeros_like(ctx.saved_tensors[0]) if dy is None else dy
    return (*_backward(*ctx.saved_tensors, dy, dlast), None)


_forward.register_autograd(_backward_of, setup_context=_setup_context)


def selective_fused(
    u_BTM: Tensor, dt_BTM: Tensor, A_MN: Tensor, B: Tensor, C: Tensor, state_BMN: Tensor, starts_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All but reading and writing in float32; see `selective_scan` for the arguments."""
    starts = None if starts_BT is None else starts_BT.to(torch.int8)
    return _forward(u_BTM, dt_BTM, A_MN, B, C, state_BMN, starts)[:2]
