"""The gated linear recurrence in Triton: the state of a block of values stays in registers while the chunks are walked.

A head of key width K beside V values needs little that is narrow (q, k, gates: K wide; the scores inside a chunk: C
wide) and much that is wide (v, o and their gradients). So the narrow part is worked out once for each chunk:

    q~ = scale q exp(a),   k~ = k exp(a_end - a),   P_ts = scale sum_i q_ti k_si exp(a_ti - a_si)

with a the log gate cumulated within the chunk. Every block of values then walks the chunks with matrix products,

    o = P v + q~ S,          S <- exp(a_end) S + k~^T v.

Packed documents are zeros in q~, k~, P and exp(a_end), which the wide kernels need not know of. The backward pass walks
once forward for the states and once backward for their gradients, keeps both at chunk boundaries in v's dtype, and then
takes the chunks one by one, summing over the values in a fixed order: the same inputs give the same bits.

No exponent is positive, and decays are summed over at most a sub-chunk of c tokens before a difference is taken.

Shapes: B batch, T time, H heads, K key width (BK: padded to a power of two), V value width, N chunks, C chunk length.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rodimus_lab.ops.segments import Segments

CHUNK = 64
SUB_CHUNK = 16
MAX_KEY_WIDTH = 256
# exp of less is 0 in float32 whatever else is added, so nothing is lost by stopping there.
FLOOR = tl.constexpr(-110.0)


@triton.jit
def _prepare_kernel(
    q_ptr, k_ptr, gate_ptr, document_ptr, q_out, k_out, score_out, decay_out, scale, T, N,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, c: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk: q~ (C, BK), k~ (C, BK), P (C, C), exp(a_end) (BK)."""
    n = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    row, col = tl.arange(0, c), tl.arange(0, BK)
    chunk = bh * N + n
    M: tl.constexpr = C // c
    before, last = 0, 0
    if PACKED:
        before = tl.load(document_ptr + b * T + n * C - 1, mask=n > 0, other=0)
        last = tl.load(document_ptr + b * T + tl.minimum(n * C + C, T) - 1)
    earlier = tl.zeros([BK], tl.float32)
    for i in tl.static_range(M):
        t_i = n * C + i * c + row
        at_i = ((b * T + t_i) * H + h)[:, None] * K + col[None, :]
        in_i = (t_i < T)[:, None] & (col < K)[None, :]
        q_i = tl.load(q_ptr + at_i, mask=in_i, other=0.0).to(tl.float32) * scale
        k_i = tl.load(k_ptr + at_i, mask=in_i, other=0.0).to(tl.float32)
        gate_i = tl.maximum(tl.load(gate_ptr + at_i, mask=in_i, other=0.0), FLOOR)
        local_i = tl.cumsum(gate_i, 0)
        seen = q_i * tl.exp(local_i + earlier[None, :])
        if PACKED:
            document_i = tl.load(document_ptr + b * T + t_i, mask=t_i < T, other=-1)
            seen = tl.where((document_i == before)[:, None], seen, 0.0)
        tl.store(q_out + (chunk * C + i * c + row)[:, None] * BK + col[None, :], seen.to(q_out.dtype.element_ty))
        score_row = score_out + (chunk * C + i * c + row)[:, None] * C + row[None, :]
        left = q_i * tl.exp(local_i)
        between = tl.zeros([BK], tl.float32)
        for back in tl.static_range(i):
            j = i - 1 - back
            t_j = n * C + j * c + row
            at_j = ((b * T + t_j) * H + h)[:, None] * K + col[None, :]
            in_j = (t_j < T)[:, None] & (col < K)[None, :]
            k_j = tl.load(k_ptr + at_j, mask=in_j, other=0.0).to(tl.float32)
            gate_j = tl.maximum(tl.load(gate_ptr + at_j, mask=in_j, other=0.0), FLOOR)
            total_j = tl.sum(gate_j, 0)
            right = k_j * tl.exp((total_j + between)[None, :] - tl.cumsum(gate_j, 0))
            score = tl.dot(left, tl.trans(right), input_precision="tf32x3")
            if PACKED:
                document_j = tl.load(document_ptr + b * T + t_j, mask=t_j < T, other=-2)
                score = tl.where(document_i[:, None] == document_j[None, :], score, 0.0)
            tl.store(score_row + j * c, score.to(score_out.dtype.element_ty))
            between += total_j
        for ahead in tl.static_range(M - 1 - i):  # Sub-chunks that i does not see.
            tl.store(score_row + (i + 1 + ahead) * c, tl.zeros([c, c], score_out.dtype.element_ty))
        near = tl.zeros([c, c], tl.float32)
        for s in range(c):
            k_s = tl.sum(tl.where((row == s)[:, None], k_i, 0.0), 0)
            local_s = tl.sum(tl.where((row == s)[:, None], local_i, 0.0), 0)
            gap = tl.where((row >= s)[:, None], local_i - local_s[None, :], float("-inf"))
            near += tl.where((row == s)[None, :], tl.sum(q_i * k_s[None, :] * tl.exp(gap), 1)[:, None], 0.0)
        if PACKED:
            near = tl.where(document_i[:, None] == document_i[None, :], near, 0.0)
        tl.store(score_row + i * c, near.to(score_out.dtype.element_ty))
        earlier += tl.sum(gate_i, 0)
    decay = tl.exp(earlier)
    if PACKED:
        decay = tl.where(before == last, decay, 0.0)
    tl.store(decay_out + chunk * BK + col, decay)
    after = tl.zeros([BK], tl.float32)
    for back in tl.static_range(M):
        t_j = n * C + (M - 1 - back) * c + row
        at_j = ((b * T + t_j) * H + h)[:, None] * K + col[None, :]
        in_j = (t_j < T)[:, None] & (col < K)[None, :]
        k_j = tl.load(k_ptr + at_j, mask=in_j, other=0.0).to(tl.float32)
        gate_j = tl.maximum(tl.load(gate_ptr + at_j, mask=in_j, other=0.0), FLOOR)
        total_j = tl.sum(gate_j, 0)
        kept = k_j * tl.exp((total_j + after)[None, :] - tl.cumsum(gate_j, 0))
        if PACKED:
            document_j = tl.load(document_ptr + b * T + t_j, mask=t_j < T, other=-2)
            kept = tl.where((document_j == last)[:, None], kept, 0.0)
        place = (chunk * C + (M - 1 - back) * c + row)[:, None] * BK + col[None, :]
        tl.store(k_out + place, kept.to(k_out.dtype.element_ty))
        after += total_j


@triton.jit
def _walk_kernel(
    q_ptr, k_ptr, score_ptr, decay_ptr, v_ptr, state_ptr, o_ptr, final_ptr, T, V, N, LENGTH,
    H: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OUTPUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of values over the `LENGTH` chunks of one stretch of time, from the state at its start."""
    block, stretch = tl.program_id(0), tl.program_id(2)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    row, col, value = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    at_state = ((bh * tl.num_programs(2) + stretch) * BK + col)[:, None] * V + value[None, :]
    state = tl.load(state_ptr + at_state, mask=(value < V)[None, :], other=0.0)
    for n in range(stretch * LENGTH, tl.minimum(stretch * LENGTH + LENGTH, N)):
        t = n * C + row
        at_v = ((b * T + t) * H + h)[:, None] * V + value[None, :]
        inside = (t < T)[:, None] & (value < V)[None, :]
        v = tl.load(v_ptr + at_v, mask=inside, other=0.0)
        narrow = (bh * N + n) * C + row
        if OUTPUT:
            q = tl.load(q_ptr + narrow[:, None] * BK + col[None, :])
            score = tl.load(score_ptr + narrow[:, None] * C + row[None, :])
            o = tl.dot(score, v, input_precision=PRECISION)
            o = tl.dot(q, state.to(v.dtype), o, input_precision=PRECISION)
            tl.store(o_ptr + at_v, o.to(o_ptr.dtype.element_ty), mask=inside)
        k = tl.load(k_ptr + narrow[None, :] * BK + col[:, None])
        decay = tl.load(decay_ptr + (bh * N + n) * BK + col)
        state = tl.dot(k, v, state * decay[:, None], input_precision=PRECISION)
    tl.store(final_ptr + at_state, state, mask=(value < V)[None, :])


@triton.jit
def _boundary_kernel(
    q_ptr, k_ptr, decay_ptr, v_ptr, do_ptr, state_ptr, dfinal_ptr, states_out, dstates_out, dstate_out, T, V, N,
    H: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of values: forward, the state entering each chunk; backward, the gradient of the one leaving it."""
    block, reverse = tl.program_id(0), tl.program_id(2)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    row, col, value = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    in_block = (value < V)[None, :]
    at_state = (bh * BK + col)[:, None] * V + value[None, :]
    wide_ptr, narrow_ptr, start_ptr, out_ptr = v_ptr, k_ptr, state_ptr, states_out
    if reverse:
        wide_ptr, narrow_ptr, start_ptr, out_ptr = do_ptr, q_ptr, dfinal_ptr, dstates_out
    state = tl.load(start_ptr + at_state, mask=in_block, other=0.0)
    for step in range(N):
        n = tl.where(reverse != 0, N - 1 - step, step)
        t = n * C + row
        inside = (t < T)[:, None] & in_block
        x = tl.load(wide_ptr + ((b * T + t) * H + h)[:, None] * V + value[None, :], mask=inside, other=0.0)
        y = tl.load(narrow_ptr + ((bh * N + n) * C + row)[None, :] * BK + col[:, None])
        decay = tl.load(decay_ptr + (bh * N + n) * BK + col)
        at_n = ((bh * N + n) * BK + col)[:, None] * V + value[None, :]
        tl.store(out_ptr + at_n, state.to(states_out.dtype.element_ty), mask=in_block)
        state = tl.dot(y, x, state * decay[:, None], input_precision=PRECISION)
    if reverse:
        tl.store(dstate_out + at_state, state, mask=in_block)


@triton.jit
def _chunk_backward_kernel(
    k_ptr, score_ptr, v_ptr, do_ptr, states_ptr, dstates_ptr, dv_out, dq_out, dk_out, dscore_out, ddecay_out, T, V, N,
    H: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk, all values: dv, and summed over the values the gradients of q~, k~, P and exp(a_end)."""
    n = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    row, col, lane = tl.arange(0, C), tl.arange(0, BK), tl.arange(0, BV)
    narrow = (bh * N + n) * C + row
    t = n * C + row
    k = tl.load(k_ptr + narrow[:, None] * BK + col[None, :])
    score_T = tl.load(score_ptr + narrow[None, :] * C + row[:, None])
    dq = tl.zeros([C, BK], tl.float32)
    dk = tl.zeros([C, BK], tl.float32)
    dscore = tl.zeros([C, C], tl.float32)
    ddecay = tl.zeros([BK], tl.float32)
    for start in range(0, V, BV):
        value = start + lane
        at = ((b * T + t) * H + h)[:, None] * V + value[None, :]
        inside = (t < T)[:, None] & (value < V)[None, :]
        v = tl.load(v_ptr + at, mask=inside, other=0.0)
        do = tl.load(do_ptr + at, mask=inside, other=0.0)
        at_n = ((bh * N + n) * BK + col)[:, None] * V + value[None, :]
        state = tl.load(states_ptr + at_n, mask=(value < V)[None, :], other=0.0)
        dstate = tl.load(dstates_ptr + at_n, mask=(value < V)[None, :], other=0.0)
        dscore = tl.dot(do, tl.trans(v), dscore, input_precision=PRECISION)
        dq = tl.dot(do, tl.trans(state), dq, input_precision=PRECISION)
        dk = tl.dot(v, tl.trans(dstate), dk, input_precision=PRECISION)
        dv = tl.dot(score_T, do, input_precision=PRECISION)
        dv = tl.dot(k, dstate, dv, input_precision=PRECISION)
        tl.store(dv_out + at, dv.to(dv_out.dtype.element_ty), mask=inside)
        ddecay += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
    tl.store(dq_out + narrow[:, None] * BK + col[None, :], dq)
    tl.store(dk_out + narrow[:, None] * BK + col[None, :], dk)
    tl.store(dscore_out + narrow[:, None] * C + row[None, :], dscore)
    tl.store(ddecay_out + (bh * N + n) * BK + col, ddecay)


@triton.jit
def _narrow_backward_kernel(
    q_ptr, k_ptr, gate_ptr, document_ptr, dq_ptr, dk_ptr, dscore_ptr, ddecay_ptr, dq_out, dk_out, dgate_out,
    scale, T, N,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, c: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk: from the gradients of q~, k~, P and exp(a_end) to those of q, k and the log gate.

    The log gate's follows from the others: a_t multiplies q_t and divides k_t wherever they meet, so its gradient is
    q_t dq_t - k_t dk_t, and a_end adds its own.
    """
    n = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    row, col = tl.arange(0, c), tl.arange(0, BK)
    chunk = bh * N + n
    M: tl.constexpr = C // c
    before, last = 0, 0
    if PACKED:
        before = tl.load(document_ptr + b * T + n * C - 1, mask=n > 0, other=0)
        last = tl.load(document_ptr + b * T + tl.minimum(n * C + C, T) - 1)
    # What every log gate of the chunk owes: to exp(a_end), and to k~ of the tokens before it.
    total = tl.zeros([BK], tl.float32)
    later = tl.zeros([BK], tl.float32)
    for step in tl.static_range(M):
        t_i = n * C + (M - 1 - step) * c + row
        at_i = ((b * T + t_i) * H + h)[:, None] * K + col[None, :]
        in_i = (t_i < T)[:, None] & (col < K)[None, :]
        k_i = tl.load(k_ptr + at_i, mask=in_i, other=0.0).to(tl.float32)
        gate_i = tl.maximum(tl.load(gate_ptr + at_i, mask=in_i, other=0.0), FLOOR)
        dkept = tl.load(dk_ptr + (chunk * C + (M - 1 - step) * c + row)[:, None] * BK + col[None, :])
        if PACKED:
            document_i = tl.load(document_ptr + b * T + t_i, mask=t_i < T, other=-1)
            dkept = tl.where((document_i == last)[:, None], dkept, 0.0)
        total_i = tl.sum(gate_i, 0)
        later += tl.sum(k_i * dkept * tl.exp((total_i + total)[None, :] - tl.cumsum(gate_i, 0)), 0)
        total += total_i
    ddecay = tl.load(ddecay_ptr + chunk * BK + col) * tl.exp(total)
    if PACKED:
        ddecay = tl.where(before == last, ddecay, 0.0)
    later += ddecay
    # Sub-chunks from the last to the first; `later` gathers q dq - k dk of those that came.
    after = tl.zeros([BK], tl.float32)
    for step in tl.static_range(M):
        i = M - 1 - step
        t_i = n * C + i * c + row
        at_i = ((b * T + t_i) * H + h)[:, None] * K + col[None, :]
        in_i = (t_i < T)[:, None] & (col < K)[None, :]
        q_i = tl.load(q_ptr + at_i, mask=in_i, other=0.0).to(tl.float32)
        k_i = tl.load(k_ptr + at_i, mask=in_i, other=0.0).to(tl.float32)
        gate_i = tl.maximum(tl.load(gate_ptr + at_i, mask=in_i, other=0.0), FLOOR)
        local_i = tl.cumsum(gate_i, 0)
        total_i = tl.sum(gate_i, 0)
        upto_i = tl.exp(local_i)
        rest_i = total_i[None, :] - local_i
        place = (chunk * C + i * c + row)[:, None] * BK + col[None, :]
        dseen = tl.load(dq_ptr + place)
        dkept = tl.load(dk_ptr + place)
        document_i = row
        if PACKED:
            document_i = tl.load(document_ptr + b * T + t_i, mask=t_i < T, other=-1)
            dseen = tl.where((document_i == before)[:, None], dseen, 0.0)
            dkept = tl.where((document_i == last)[:, None], dkept, 0.0)
        earlier = total - after - total_i
        # Through the states.
        dq_i = dseen * tl.exp(local_i + tl.minimum(earlier, 0.0)[None, :])
        dk_i = dkept * tl.exp(rest_i + after[None, :])
        # Through the scores with other sub-chunks: earlier keys, then later queries.
        between = tl.zeros([BK], tl.float32)
        for back in tl.static_range(M - 1 - step):
            j = i - 1 - back
            t_j = n * C + j * c + row
            at_j = ((b * T + t_j) * H + h)[:, None] * K + col[None, :]
            in_j = (t_j < T)[:, None] & (col < K)[None, :]
            k_j = tl.load(k_ptr + at_j, mask=in_j, other=0.0).to(tl.float32)
            gate_j = tl.maximum(tl.load(gate_ptr + at_j, mask=in_j, other=0.0), FLOOR)
            total_j = tl.sum(gate_j, 0)
            right = k_j * tl.exp((total_j + between)[None, :] - tl.cumsum(gate_j, 0))
            dscore = tl.load(dscore_ptr + (chunk * C + i * c + row)[:, None] * C + (j * c + row)[None, :])
            if PACKED:
                document_j = tl.load(document_ptr + b * T + t_j, mask=t_j < T, other=-2)
                dscore = tl.where(document_i[:, None] == document_j[None, :], dscore, 0.0)
            dq_i += tl.dot(dscore, right, input_precision="tf32x3") * upto_i
            between += total_j
        between = tl.zeros([BK], tl.float32)
        for ahead in tl.static_range(step):
            m = i + 1 + ahead
            t_m = n * C + m * c + row
            at_m = ((b * T + t_m) * H + h)[:, None] * K + col[None, :]
            in_m = (t_m < T)[:, None] & (col < K)[None, :]
            q_m = tl.load(q_ptr + at_m, mask=in_m, other=0.0).to(tl.float32)
            gate_m = tl.maximum(tl.load(gate_ptr + at_m, mask=in_m, other=0.0), FLOOR)
            left = q_m * scale * tl.exp(tl.cumsum(gate_m, 0) + between[None, :])
            dscore_T = tl.load(dscore_ptr + (chunk * C + m * c + row)[None, :] * C + (i * c + row)[:, None])
            if PACKED:
                document_m = tl.load(document_ptr + b * T + t_m, mask=t_m < T, other=-2)
                dscore_T = tl.where(document_i[:, None] == document_m[None, :], dscore_T, 0.0)
            dk_i += tl.dot(dscore_T, left, input_precision="tf32x3") * tl.exp(rest_i)
            between += tl.sum(gate_m, 0)
        # Through the scores inside the sub-chunk.
        near = tl.load(dscore_ptr + (chunk * C + i * c + row)[:, None] * C + (i * c + row)[None, :])
        if PACKED:
            near = tl.where(document_i[:, None] == document_i[None, :], near, 0.0)
        for s in range(c):
            here = (row == s)[:, None]
            k_s = tl.sum(tl.where(here, k_i, 0.0), 0)
            q_s = tl.sum(tl.where(here, q_i, 0.0), 0)
            local_s = tl.sum(tl.where(here, local_i, 0.0), 0)
            near_to_s = tl.sum(tl.where((row == s)[None, :], near, 0.0), 1)
            near_from_s = tl.sum(tl.where(here, near, 0.0), 0)
            back_gap = tl.where((row >= s)[:, None], local_i - local_s[None, :], float("-inf"))
            dq_i += near_to_s[:, None] * k_s[None, :] * tl.exp(back_gap)
            gap = tl.where((row <= s)[:, None], local_s[None, :] - local_i, float("-inf"))
            dk_i += near_from_s[:, None] * (scale * q_s)[None, :] * tl.exp(gap)
        dq_i *= scale
        dgate_i = q_i * dq_i - k_i * dk_i
        tl.store(dq_out + at_i, dq_i.to(dq_out.dtype.element_ty), mask=in_i)
        tl.store(dk_out + at_i, dk_i.to(dk_out.dtype.element_ty), mask=in_i)
        summed = tl.cumsum(dgate_i, 0, reverse=True) + later[None, :]
        tl.store(dgate_out + at_i, summed, mask=in_i)
        later += tl.sum(dgate_i, 0)
        after += total_i


def _blocks(key_width: int, value_width: int, batch_heads: int, on_gpu: bool) -> dict[str, int]:
    """Width of a block of values and warps of a walk: as wide as the registers allow, narrower to fill the GPU."""
    padded = max(16, triton.next_power_of_2(key_width))
    width = min({16: 128, 32: 128, 64: 128, 128: 64, 256: 32}[padded], max(16, triton.next_power_of_2(value_width)))
    if on_gpu:
        while width > 32 and batch_heads * triton.cdiv(value_width, width) < 132:
            width //= 2
    return {"BK": padded, "BV": width}


def _precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "tf32"


class _Narrow:
    """q~, k~, P and exp(a_end) of every chunk."""

    def __init__(self, q: Tensor, k: Tensor, gate: Tensor, documents: Tensor | None, scale: float, dtype: torch.dtype):
        B, T, H, K = q.shape
        N, BK = triton.cdiv(T, CHUNK), max(16, triton.next_power_of_2(K))
        self.q = q.new_empty(B, H, N, CHUNK, BK, dtype=dtype)
        self.k = torch.empty_like(self.q)
        self.score = q.new_empty(B, H, N, CHUNK, CHUNK, dtype=dtype)
        self.decay = q.new_empty(B, H, N, BK, dtype=torch.float32)
        _prepare_kernel[(N, B * H)](
            q, k, gate, gate if documents is None else documents, self.q, self.k, self.score, self.decay, scale, T, N,
            H=H, K=K, BK=BK, C=CHUNK, c=SUB_CHUNK, PACKED=documents is not None, num_warps=4,
        )  # fmt: skip


def _pad_state(state: Tensor, BK: int) -> Tensor:
    return torch.nn.functional.pad(state, (0, 0, 0, BK - state.shape[-2])).contiguous()


@torch.library.custom_op("rodimus_lab::gated_linear", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor, documents: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v, gate = q.contiguous(), k.contiguous(), v.contiguous(), gate.contiguous()
    B, T, H, K = q.shape
    V = v.shape[-1]
    narrow = _Narrow(q, k, gate, documents, scale, v.dtype)
    N = narrow.decay.shape[2]
    sizes = _blocks(K, V, B * H, q.is_cuda)
    o, start = torch.empty_like(v), _pad_state(state, sizes["BK"])
    final = torch.empty_like(start)
    _walk_kernel[(triton.cdiv(V, sizes["BV"]), B * H, 1)](
        narrow.q, narrow.k, narrow.score, narrow.decay, v, start, o, final, T, V, N, N,
        H=H, C=CHUNK, OUTPUT=True, PRECISION=_precision(v.dtype), num_warps=4, num_stages=3, **sizes,
    )  # fmt: skip
    return o, final[:, :, :K].contiguous()


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor, documents: Tensor | None, scale: float) -> Any:
    return v.new_empty(v.shape), state.new_empty(state.shape)


@torch.library.custom_op("rodimus_lab::gated_linear_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor, documents: Tensor | None, scale: float,
    do: Tensor, dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, gate, do = (x.contiguous() for x in (q, k, v, gate, do))
    B, T, H, K = q.shape
    V = v.shape[-1]
    narrow = _Narrow(q, k, gate, documents, scale, v.dtype)
    N = narrow.decay.shape[2]
    sizes = _blocks(K, V, B * H, q.is_cuda)
    BK = sizes["BK"]
    precision = _precision(v.dtype)
    states = v.new_empty(B, H, N, BK, V)
    dstates = torch.empty_like(states)
    start, dend = _pad_state(state, BK), _pad_state(dfinal, BK)
    dstate = torch.empty_like(start)
    _boundary_kernel[(triton.cdiv(V, sizes["BV"]), B * H, 2)](
        narrow.q, narrow.k, narrow.decay, v, do, start, dend, states, dstates, dstate, T, V, N,
        H=H, C=CHUNK, PRECISION=precision, num_warps=4, num_stages=3, **sizes,
    )  # fmt: skip
    dv = torch.empty_like(v)
    dq_wide = q.new_empty(B, H, N, CHUNK, BK, dtype=torch.float32)
    dk_wide, ddecay = torch.empty_like(dq_wide), torch.empty_like(narrow.decay)
    dscore = q.new_empty(B, H, N, CHUNK, CHUNK, dtype=torch.float32)
    _chunk_backward_kernel[(N, B * H)](
        narrow.k, narrow.score, v, do, states, dstates, dv, dq_wide, dk_wide, dscore, ddecay, T, V, N,
        H=H, BK=BK, BV=min(64, sizes["BV"]), C=CHUNK, PRECISION=precision, num_warps=4 if BK <= 64 else 8, num_stages=2,
    )  # fmt: skip
    dq, dk, dgate = torch.empty_like(q), torch.empty_like(k), torch.empty_like(gate)
    _narrow_backward_kernel[(N, B * H)](
        q, k, gate, gate if documents is None else documents, dq_wide, dk_wide, dscore, ddecay, dq, dk, dgate,
        scale, T, N, H=H, K=K, BK=BK, C=CHUNK, c=SUB_CHUNK, PACKED=documents is not None, num_warps=4,
    )  # fmt: skip
    return dq, dk, dv, dgate, dstate[:, :, :K].contiguous()


@_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor, documents: Tensor | None, scale: float,
    do: Tensor, dfinal: Tensor,
) -> Any:  # fmt: skip
    return tuple(x.new_empty(x.shape) for x in (q, k, v, gate, state))


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.scale = scale


def _backward_of(ctx: Any, do: Tensor, dfinal: Tensor) -> Any:
    q, k, v, gate, state, documents = ctx.saved_tensors
    dq, dk, dv, dgate, dstate = _backward(q, k, v, gate, state, documents, ctx.scale, do, dfinal)
    return dq, dk, dv, dgate, dstate, None, None


_forward.register_autograd(_backward_of, setup_context=_setup_context)


def fused(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_alpha_BTHK: Tensor,
    log_beta_BTHV: None,
    scale: float,
    state_BHKV: Tensor,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """See `gated_linear` for the arguments. Matrix products in v's dtype, gates and sums in float32."""
    documents = None if segments is None else segments.documents_BT.int().contiguous()
    return _forward(q_BTHK, k_BTHK, v_BTHV, log_alpha_BTHK, state_BHKV, documents, scale)
