"""The gated linear recurrence in Triton: the state of a block of values stays in registers while the chunks are walked.

A head of key width K beside V values needs little that is narrow (q, k, gates: K wide; the scores inside a chunk: C
wide) and much that is wide (v, o and their gradients). So the narrow part is worked out once for each chunk,

    q~ = scale q exp(a),   k~ = k exp(a_end - a),   P_ts = scale sum_i q_ti k_si exp(a_ti - a_si),

with a the log gate cumulated within the chunk, and every block of values then walks the chunks with matrix products:

    o = P v + q~ S,          S <- exp(a_end) S + k~^T v.

The backward pass walks once forward for the states and once backward for their gradients, keeps both at the starts and
ends of chunks in v's dtype, and takes the chunks one by one. Where batch, heads and blocks of values do not fill the
GPU, time is split into stretches that are walked from a zero state, chained, and walked again from their true states.

exp(a_ti - a_si) = exp(a_ti - a_pi) exp(a_pi - a_si) makes P a matrix product, for any token p in the middle, as long
as neither factor grows too large. So P is taken in groups of tokens within which no decay falls below exp(-LIMIT): the
whole chunk, unless much is forgotten in it. What is left are the levels of a binary tree over the groups, at which the
later half of a larger group meets the earlier half and p is the last token of that earlier half: no exponent there is
positive.

Sums are taken in a fixed order: the same inputs give the same bits. Packed documents are zeros in q~, k~, P and
exp(a_end), which the wide kernels need not know of.

Shapes: B batch, T time, H heads, K key width (BK: padded to a power of two), V value width, N chunks, C chunk length,
S stretches, D directions (forward; forward and backward).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from rodimus_lab.ops.fast_math import fast_exp
from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.tracing import opaque_operator
from rodimus_lab.ops.triton_facts import dot_precision

CHUNK = 64
MAX_KEY_WIDTH = 256
# Programs of a walk that fill a GPU (an H200 has 132 multiprocessors, each with room for two), and the fewest chunks
# that are worth a stretch of their own.
ENOUGH_PROGRAMS = 256
MIN_STRETCH = 8
# exp of less is 0 in float32 whatever else is added, so nothing is lost by stopping there.
FLOOR = tl.constexpr(-110.0)
LIMIT = tl.constexpr(40.0)


@triton.jit
def _at(sum_ptr, token, col, BK: tl.constexpr):
    return tl.load(sum_ptr + token[:, None] * BK + col[None, :])


@triton.jit
def _group_bits(a, sum_ptr, row, col, BK: tl.constexpr, LEVELS: tl.constexpr):
    """The most, up to `LEVELS`, for which no decay within a group of 2^bits tokens is less than exp(-LIMIT)."""
    bits = tl.full([], LEVELS, tl.int32)
    fall = tl.max(tl.load(sum_ptr + col) - tl.load(sum_ptr + ((1 << LEVELS) - 1) * BK + col))
    while fall > LIMIT:
        bits -= 1
        fall = tl.max(a - _at(sum_ptr, row | ((1 << bits) - 1), col, BK))
    return bits


@triton.jit
def _within(a, sum_ptr, row, col, bits, BK: tl.constexpr):
    """The groups of 2^bits tokens: a less a in the middle of the group; which pairs are in one, the later first."""
    middle = (row >> bits << bits) + (1 << bits) // 2
    pair = ((row[:, None] >> bits) == (row[None, :] >> bits)) & (row[:, None] > row[None, :])
    return a - _at(sum_ptr, middle, col, BK), pair


@triton.jit
def _across(a, sum_ptr, row, col, half_bits, BK: tl.constexpr):
    """The halves of 2^half_bits tokens of groups twice as large: exp(-|a - a at the last token of the earlier half|);
    which rows are in a later half; which pairs meet, of the later half and of the earlier."""
    border = (row >> (half_bits + 1) << (half_bits + 1)) + (1 << half_bits) - 1
    later = ((row >> half_bits) & 1 == 1)[:, None]
    pair = (((row[:, None] ^ row[None, :]) >> half_bits) == 1) & later
    return fast_exp(-tl.abs(a - _at(sum_ptr, border, col, BK))), later, pair


@triton.jit
def _prepare_kernel(
    q_ptr, k_ptr, gate_ptr, document_ptr, sum_out, score_out, q_out, k_out, decay_out, scale, T, N,
    q_row, q_head, k_row, k_head,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, KB: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk: a (C, BK), P (C, C), q~ (C, BK), k~ (C, BK), exp(a_end) (BK)."""
    n = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    chunk, token = bh * N + n, b * T + n * C
    row = tl.arange(0, C)
    t = n * C + row
    diagonal = row[:, None] == row[None, :]
    document, before, last = row, 0, 0
    if PACKED:
        document = tl.load(document_ptr + b * T + t, mask=t < T, other=-1)
        before = tl.load(document_ptr + b * T + n * C - 1, mask=n > 0, other=0)
        last = tl.load(document_ptr + b * T + tl.minimum(n * C + C, T) - 1)
    score = tl.zeros([C, C], tl.float32)
    for block in tl.static_range(BK // KB):
        col = block * KB + tl.arange(0, KB)
        inside = (t < T)[:, None] & (col < K)[None, :]
        q_at = q_ptr + token * q_row + h * q_head + (row[:, None] * q_row + col[None, :])
        k_at = k_ptr + token * k_row + h * k_head + (row[:, None] * k_row + col[None, :])
        gate_at = gate_ptr + (token * H + h) * K + (row[:, None] * (H * K) + col[None, :])
        q = tl.load(q_at, mask=inside, other=0.0).to(tl.float32) * scale
        k = tl.load(k_at, mask=inside, other=0.0).to(tl.float32)
        narrow = row[:, None] * BK + col[None, :]
        a = tl.cumsum(tl.maximum(tl.load(gate_at, mask=inside, other=0.0), FLOOR), 0)
        tl.store(sum_out + chunk * C * BK + narrow, a)
        tl.debug_barrier()  # What follows reads rows of a that other threads have written.
        end = tl.load(sum_out + chunk * C * BK + (C - 1) * BK + col)
        seen = q * fast_exp(a)
        kept = k * fast_exp(tl.minimum(end[None, :] - a, 0.0))
        decay = fast_exp(end)
        if PACKED:
            seen = tl.where((document == before)[:, None], seen, 0.0)
            kept = tl.where((document == last)[:, None], kept, 0.0)
            decay = tl.where(before == last, decay, 0.0)
        tl.store(q_out + chunk * C * BK + narrow, seen.to(q_out.dtype.element_ty))
        tl.store(k_out + chunk * C * BK + narrow, kept.to(k_out.dtype.element_ty))
        tl.store(decay_out + chunk * BK + col, decay)
        score += tl.where(diagonal, tl.sum(q * k, 1)[:, None], 0.0)
        bits = _group_bits(a, sum_out + chunk * C * BK, row, col, BK, LEVELS)
        rise, pair = _within(a, sum_out + chunk * C * BK, row, col, bits, BK)
        queries, keys = (q * fast_exp(rise)).to(DOT), (k * fast_exp(-rise)).to(DOT)
        score += tl.where(pair, tl.dot(queries, tl.trans(keys), input_precision=PRECISION), 0.0)
        for half_bits in range(bits, LEVELS):
            decay_to, later, pair = _across(a, sum_out + chunk * C * BK, row, col, half_bits, BK)
            either = (tl.where(later, q, k) * decay_to).to(DOT)
            score += tl.where(pair, tl.dot(either, tl.trans(either), input_precision=PRECISION), 0.0)
    if PACKED:
        score = tl.where(document[:, None] == document[None, :], score, 0.0)
    tl.store(score_out + chunk * C * C + (row[:, None] * C + row[None, :]), score.to(score_out.dtype.element_ty))


@triton.jit
def _walk_kernel(
    q_ptr, k_ptr, score_ptr, decay_ptr, v_ptr, start_ptr, o_ptr, end_ptr, T, V, N, LENGTH,
    H: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, ZERO: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of values over the `LENGTH` chunks of one stretch: o, and if it is to `KEEP` it the state at its end.
    `ZERO` starts from 0."""
    block, stretch, stretches = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    row, col, value = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    in_block = (value < V)[None, :]
    in_state = col[:, None] * V + value[None, :]
    state = tl.zeros([BK, BV], tl.float32)
    if not ZERO:
        state = tl.load(start_ptr + (bh * stretches + stretch) * BK * V + in_state, mask=in_block, other=0.0)
    for n in range(stretch * LENGTH, tl.minimum(stretch * LENGTH + LENGTH, N)):
        first, chunk = ((b * T + n * C) * H + h) * V, bh * N + n
        at = row[:, None] * (H * V) + value[None, :]
        inside = (n * C + row < T)[:, None] & in_block
        v = tl.load(v_ptr + first + at, mask=inside, other=0.0)
        q = tl.load(q_ptr + chunk * C * BK + row[:, None] * BK + col[None, :])
        score = tl.load(score_ptr + chunk * C * C + row[:, None] * C + row[None, :])
        k = tl.load(k_ptr + chunk * C * BK + row[None, :] * BK + col[:, None])
        decay = tl.load(decay_ptr + chunk * BK + col)
        o = tl.dot(score, v, input_precision=PRECISION)
        o = tl.dot(q, state.to(v.dtype), o, input_precision=PRECISION)
        tl.store(o_ptr + first + at, o.to(o_ptr.dtype.element_ty), mask=inside)
        state = tl.dot(k, v, state * decay[:, None], input_precision=PRECISION)
    if KEEP:
        tl.store(end_ptr + (bh * stretches + stretch) * BK * V + in_state, state, mask=in_block)


@triton.jit
def _states_kernel(
    q_ptr, k_ptr, decay_ptr, v_ptr, do_ptr, start_ptr, dstart_ptr, states_out, dstates_out, end_out, dend_out,
    T, V, N, LENGTH,
    H: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, D: tl.constexpr, KEEP: tl.constexpr,
    ZERO: tl.constexpr, DZERO: tl.constexpr, END: tl.constexpr, DEND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of values over one stretch, from its start to its end: forward, the states; in the other direction,
    their gradients. `KEEP` stores the state entering each chunk and the gradient of the one leaving it. In one and the
    other direction, `ZERO` and `DZERO` start from 0, `END` and `DEND` store what the stretch ends with."""
    block, reverse = tl.program_id(0), tl.program_id(2) % D
    stretch, stretches = tl.program_id(2) // D, tl.num_programs(2) // D
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    row, col, value = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    in_block = (value < V)[None, :]
    in_state = (bh * stretches + stretch) * BK * V + (col[:, None] * V + value[None, :])
    wide_ptr, narrow_ptr, kept_out, start, end, zero, keep = v_ptr, k_ptr, states_out, start_ptr, end_out, ZERO, END
    if reverse:
        wide_ptr, narrow_ptr, kept_out, start, end = do_ptr, q_ptr, dstates_out, dstart_ptr, dend_out
        zero, keep = DZERO, DEND
    begin = stretch * LENGTH
    length = tl.minimum(LENGTH, N - begin)
    state = tl.load(start + in_state, mask=in_block & (zero == 0), other=0.0)
    for step in range(length):
        n = begin + tl.where(reverse != 0, length - 1 - step, step)
        first, chunk = ((b * T + n * C) * H + h) * V, bh * N + n
        inside = (n * C + row < T)[:, None] & in_block
        x = tl.load(wide_ptr + first + row[:, None] * (H * V) + value[None, :], mask=inside, other=0.0)
        y = tl.load(narrow_ptr + chunk * C * BK + row[None, :] * BK + col[:, None])
        decay = tl.load(decay_ptr + chunk * BK + col)
        if KEEP:
            kept = kept_out + chunk * BK * V + (col[:, None] * V + value[None, :])
            tl.store(kept, state.to(states_out.dtype.element_ty), mask=in_block)
        state = tl.dot(y, x, state * decay[:, None], input_precision=PRECISION)
    if END or DEND:
        tl.store(end + in_state, state, mask=in_block & (keep != 0))


@triton.jit
def _chain_kernel(
    state_ptr, end_ptr, decay_ptr, start_out, V, S,
    BK: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """From the states that stretches end with when they start at zero to those that they truly start with."""
    block = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    col, value = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    in_block = (value < V)[None, :]
    in_state = col[:, None] * V + value[None, :]
    state = tl.zeros([BK, BV], tl.float32)
    if not ZERO:
        state = tl.load(state_ptr + bh * BK * V + in_state, mask=in_block, other=0.0)
    for step in range(S):
        s = S - 1 - step if REVERSE else step
        at = (bh * S + s) * BK * V + in_state
        tl.store(start_out + at, state, mask=in_block)
        decay = tl.load(decay_ptr + (bh * S + s) * BK + col)
        state = state * decay[:, None] + tl.load(end_ptr + at, mask=in_block, other=0.0)


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
    chunk = bh * N + n
    first = ((b * T + n * C) * H + h) * V
    narrow = row[:, None] * BK + col[None, :]
    k = tl.load(k_ptr + chunk * C * BK + narrow)
    score_T = tl.load(score_ptr + chunk * C * C + row[None, :] * C + row[:, None])
    dq = tl.zeros([C, BK], tl.float32)
    dk = tl.zeros([C, BK], tl.float32)
    dscore = tl.zeros([C, C], tl.float32)
    ddecay = tl.zeros([BK], tl.float32)
    for start in range(0, V, BV):
        value = start + lane
        at = row[:, None] * (H * V) + value[None, :]
        inside = (n * C + row < T)[:, None] & (value < V)[None, :]
        v = tl.load(v_ptr + first + at, mask=inside, other=0.0)
        do = tl.load(do_ptr + first + at, mask=inside, other=0.0)
        in_state = col[:, None] * V + value[None, :]
        state = tl.load(states_ptr + chunk * BK * V + in_state, mask=(value < V)[None, :], other=0.0)
        dstate = tl.load(dstates_ptr + chunk * BK * V + in_state, mask=(value < V)[None, :], other=0.0)
        dscore = tl.dot(do, tl.trans(v), dscore, input_precision=PRECISION)
        dq = tl.dot(do, tl.trans(state), dq, input_precision=PRECISION)
        dk = tl.dot(v, tl.trans(dstate), dk, input_precision=PRECISION)
        dv = tl.dot(score_T, do, input_precision=PRECISION)
        dv = tl.dot(k, dstate, dv, input_precision=PRECISION)
        tl.store(dv_out + first + at, dv.to(dv_out.dtype.element_ty), mask=inside)
        ddecay += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
    tl.store(dq_out + chunk * C * BK + narrow, dq)
    tl.store(dk_out + chunk * C * BK + narrow, dk)
    tl.store(dscore_out + chunk * C * C + (row[:, None] * C + row[None, :]), dscore)
    tl.store(ddecay_out + chunk * BK + col, ddecay)


@triton.jit
def _narrow_backward_kernel(
    q_ptr, k_ptr, document_ptr, sum_ptr, dq_ptr, dk_ptr, dscore_ptr, ddecay_ptr, dq_out, dk_out, dgate_out, scale, T, N,
    q_row, q_head, k_row, k_head,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, KB: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and block of keys: from the gradients of q~, k~, P and exp(a_end) to those of q, k and the log gate.

    The log gate's follows from the others: a_t multiplies q_t and divides k_t wherever they meet others, so that its
    gradient is q_t dq_t - k_t dk_t without what they owe to each other, and a_end adds its own.
    """
    n = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    chunk, token = bh * N + n, b * T + n * C
    row, col = tl.arange(0, C), tl.program_id(2) * KB + tl.arange(0, KB)
    t = n * C + row
    inside = (t < T)[:, None] & (col < K)[None, :]
    narrow = row[:, None] * BK + col[None, :]
    q_at = q_ptr + token * q_row + h * q_head + (row[:, None] * q_row + col[None, :])
    k_at = k_ptr + token * k_row + h * k_head + (row[:, None] * k_row + col[None, :])
    q = tl.load(q_at, mask=inside, other=0.0).to(tl.float32) * scale
    k = tl.load(k_at, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(sum_ptr + chunk * C * BK + narrow)
    document, before, last = row, 0, 0
    if PACKED:
        document = tl.load(document_ptr + b * T + t, mask=t < T, other=-1)
        before = tl.load(document_ptr + b * T + n * C - 1, mask=n > 0, other=0)
        last = tl.load(document_ptr + b * T + tl.minimum(n * C + C, T) - 1)

    # What is not needed at once is loaded late or again, as registers are scarcer than loads from the cache.
    dscore_at = dscore_ptr + chunk * C * C + (row[:, None] * C + row[None, :])
    bits = _group_bits(a, sum_ptr + chunk * C * BK, row, col, BK, LEVELS)
    rise, pair = _within(a, sum_ptr + chunk * C * BK, row, col, bits, BK)
    if PACKED:
        pair = pair & (document[:, None] == document[None, :])
    # For the gate the products are taken with q and k as they were rounded to DOT: what q_t dq_t and k_s dk_s owe to
    # one pair is then the same, and cancels wherever it has to.
    rise, fall, dscore = fast_exp(rise), fast_exp(-rise), tl.load(dscore_at, mask=pair, other=0.0).to(DOT)
    queries, keys = (q * rise).to(DOT), (k * fall).to(DOT)
    dq = tl.dot(dscore, keys, input_precision=PRECISION)
    dk = tl.dot(tl.trans(dscore), queries, input_precision=PRECISION)
    dgate = queries.to(tl.float32) * dq - keys.to(tl.float32) * dk
    dq *= rise
    dk *= fall
    for half_bits in range(bits, LEVELS):
        decay_to, later, pair = _across(a, sum_ptr + chunk * C * BK, row, col, half_bits, BK)
        if PACKED:
            pair = pair & (document[:, None] == document[None, :])
        either, dscore = (tl.where(later, q, k) * decay_to).to(DOT), tl.load(dscore_at, mask=pair, other=0.0).to(DOT)
        of_later = tl.dot(dscore, either, input_precision=PRECISION)
        of_earlier = tl.dot(tl.trans(dscore), either, input_precision=PRECISION)
        dgate += either.to(tl.float32) * (of_later - of_earlier)
        dq += of_later * decay_to
        dk += of_earlier * decay_to

    end = tl.load(sum_ptr + chunk * C * BK + (C - 1) * BK + col)
    own = tl.load(dscore_ptr + chunk * C * C + row * (C + 1))[:, None]
    seen = tl.load(dq_ptr + chunk * C * BK + narrow) * fast_exp(a)
    kept = tl.load(dk_ptr + chunk * C * BK + narrow) * fast_exp(tl.minimum(end[None, :] - a, 0.0))
    ddecay = tl.load(ddecay_ptr + chunk * BK + col) * fast_exp(end)
    if PACKED:
        seen = tl.where((document == before)[:, None], seen, 0.0)
        kept = tl.where((document == last)[:, None], kept, 0.0)
        ddecay = tl.where(before == last, ddecay, 0.0)
    of_end = ddecay + tl.sum(k * kept, 0)
    dgate = tl.cumsum(dgate + q * seen - k * kept, 0, reverse=True) + of_end[None, :]
    dq += seen + own * k
    dk += kept + own * q
    at = (token * H + h) * K + (row[:, None] * (H * K) + col[None, :])
    tl.store(dq_out + at, (dq * scale).to(dq_out.dtype.element_ty), mask=inside)
    tl.store(dk_out + at, dk.to(dk_out.dtype.element_ty), mask=inside)
    tl.store(dgate_out + at, dgate, mask=inside)


class _Plan(NamedTuple):
    """Sizes of the kernels for one call. `documents` is None or document_BT."""

    B: int
    T: int
    H: int
    K: int
    V: int
    dtype: torch.dtype
    documents: Tensor | None
    on_gpu: bool

    @property
    def N(self) -> int:
        return triton.cdiv(self.T, CHUNK)

    @property
    def BK(self) -> int:
        return max(16, triton.next_power_of_2(self.K))

    @property
    def BV(self) -> int:
        """A block of values: as wide as registers and shared memory allow, at two programs a multiprocessor."""
        widest = {16: 128, 32: 64, 64: 64, 128: 64, 256: 32}[self.BK] // (2 if self.dtype.itemsize == 4 else 1)
        return min(widest, max(16, triton.next_power_of_2(self.V)))

    @property
    def stages(self) -> int:
        """Of the pipeline of loads: three where shared memory holds them for two programs."""
        return 3 if self.BK <= 64 and self.dtype.itemsize == 2 else 2

    def walk(self, stretches: int) -> tuple[int, int]:
        """Block of values and stages of the forward walk, which takes twice the values where that fills the GPU."""
        programs = self.V // (2 * self.BV) * self.B * self.H * stretches
        if self.BK == 64 and self.dtype.itemsize == 2 and programs >= ENOUGH_PROGRAMS:
            return 2 * self.BV, 2
        return self.BV, self.stages

    @property
    def precision(self) -> str:
        return dot_precision(self.dtype)

    def wide(self, width: int) -> dict[str, Any]:
        return {"H": self.H, "BK": self.BK, "BV": width, "C": CHUNK, "PRECISION": self.precision}

    def narrow(self, key_block: int) -> dict[str, Any]:
        sizes = {"H": self.H, "K": self.K, "BK": self.BK, "KB": min(key_block, self.BK), "C": CHUNK}
        # float16 has too short a range for decayed gradients.
        dot = tl.bfloat16 if self.dtype == torch.bfloat16 else tl.float32
        flags = {"LEVELS": CHUNK.bit_length() - 1, "PACKED": self.documents is not None, "DOT": dot}
        return sizes | flags | {"PRECISION": self.precision}

    def stretches(self, directions: int) -> tuple[int, int]:
        """How many stretches, and how many chunks each has."""
        programs = triton.cdiv(self.V, self.BV) * self.B * self.H * directions
        if not self.on_gpu:  # The interpreter fills nothing; it splits where it can, so that the tests see it.
            programs = 1
        wanted = min(triton.cdiv(ENOUGH_PROGRAMS, programs), self.N // MIN_STRETCH)
        length = triton.cdiv(self.N, max(1, wanted))
        return triton.cdiv(self.N, length), length


class _Narrow(NamedTuple):
    """Of every chunk: a (float32), P, q~, k~ (v's dtype) and exp(a_end) (float32)."""

    sums: Tensor
    score: Tensor
    q: Tensor
    k: Tensor
    decay: Tensor


def _prepare(plan: _Plan, q: Tensor, k: Tensor, gate: Tensor, scale: float) -> _Narrow:
    B, H, N, BK = plan.B, plan.H, plan.N, plan.BK
    sums, decay = (q.new_empty(*shape, dtype=torch.float32) for shape in ((B, H, N, CHUNK, BK), (B, H, N, BK)))
    score = q.new_empty(B, H, N, CHUNK, CHUNK, dtype=plan.dtype)
    q_seen, k_kept = torch.empty_like(sums, dtype=plan.dtype), torch.empty_like(sums, dtype=plan.dtype)
    narrow = _Narrow(sums, score, q_seen, k_kept, decay)
    _prepare_kernel[(N, B * H)](
        q, k, gate, gate if plan.documents is None else plan.documents, *narrow, scale, plan.T, N,
        *_strides(q), *_strides(k), num_warps=4, num_stages=1, **plan.narrow(64),
    )  # fmt: skip
    return narrow


def _strides(x_BTHK: Tensor) -> tuple[int, int]:
    """From token to token, over the border of two sequences as well, and from head to head."""
    B, T = x_BTHK.shape[:2]
    return x_BTHK.stride(0) // T if B > 1 else x_BTHK.stride(1), x_BTHK.stride(2)  # torch's stride of one token is any.


def _even(x_BTHK: Tensor) -> Tensor:
    """Itself where `_strides` and 1 are its strides, as they are of a part of a wider tensor; a copy where not."""
    B, T, _, K = x_BTHK.shape
    dense = K == 1 or x_BTHK.stride(3) == 1
    return x_BTHK if dense and (B == 1 or x_BTHK.stride(0) == T * x_BTHK.stride(1)) else x_BTHK.contiguous()


def _states(
    plan: _Plan,
    narrow: _Narrow,
    v: Tensor,
    do: Tensor | None,
    starts: tuple[Tensor | None, Tensor | None],
    split: tuple[int, int],
    kept: tuple[Tensor, Tensor] | None = None,
    ends: tuple[bool, bool] = (True, True),
) -> tuple[Tensor, Tensor]:
    """Walk every stretch, with `do` in both directions; the states and their gradients at its end, both (B,H,S,BK,V)
    or, where `ends` wants none, empty.

    A start that is None is zero.
    """
    stretches, length = split
    shape = plan.B, plan.H, stretches, plan.BK, plan.V
    end, dend = (v.new_empty(shape if wanted else 0, dtype=torch.float32) for wanted in ends)
    directions = 1 if do is None else 2
    _states_kernel[(triton.cdiv(plan.V, plan.BV), plan.B * plan.H, directions * stretches)](
        narrow.q, narrow.k, narrow.decay, v, v if do is None else do,
        *(end if start is None else start for start in starts), *(kept or (v, v)), end, dend,
        plan.T, plan.V, plan.N, length, D=directions, KEEP=kept is not None,
        ZERO=starts[0] is None, DZERO=starts[1] is None, END=ends[0], DEND=ends[1],
        num_warps=4, num_stages=plan.stages, **plan.wide(plan.BV),
    )  # fmt: skip
    return end, dend


def _chain(
    plan: _Plan, decay: Tensor, state: Tensor | None, end_BHSKV: Tensor, length: int, *, reverse: bool = False
) -> Tensor:
    """start_BHSKV, where stretches that started with zeros ended with `end_BHSKV`."""
    B, H, S = end_BHSKV.shape[:3]
    over_stretch = F.pad(decay, (0, 0, 0, S * length - plan.N), value=1.0).unflatten(2, (S, length)).prod(3)
    start, width = torch.empty_like(end_BHSKV), min(64, plan.BV)
    _chain_kernel[(triton.cdiv(plan.V, width), B * H)](
        end_BHSKV if state is None else state, end_BHSKV, over_stretch, start, plan.V, S,
        BK=plan.BK, BV=width, REVERSE=reverse, ZERO=state is None, num_warps=4,
    )  # fmt: skip
    return start


def _padded(plan: _Plan, state: Tensor | None) -> Tensor | None:
    """A state whose keys are padded."""
    if state is None or plan.BK == plan.K:
        return None if state is None else state.contiguous()
    return F.pad(state, (0, 0, 0, plan.BK - plan.K)).contiguous()


def _plan_of(q: Tensor, v: Tensor, documents: Tensor | None) -> _Plan:
    B, T, H, K = q.shape
    return _Plan(B, T, H, K, v.shape[-1], v.dtype, documents, q.is_cuda)


@opaque_operator("gated_linear")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor | None, documents: Tensor | None, scale: float,
    last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o, the `last` state or an empty tensor, and what `_prepare` has for the backward pass."""
    q, k, v, gate = _even(q), _even(k), v.contiguous(), gate.contiguous()
    plan = _plan_of(q, v, documents)
    narrow = _prepare(plan, q, k, gate, scale)
    stretches, length = plan.stretches(directions=1)
    start = _padded(plan, state)
    if stretches > 1:
        end, _ = _states(plan, narrow, v, None, (None, None), (stretches, length), ends=(True, False))
        start = _chain(plan, narrow.decay, start, end, length)
    o = torch.empty_like(v)
    end = v.new_empty((plan.B, plan.H, stretches, plan.BK, plan.V) if last else 0, dtype=torch.float32)
    width, stages = plan.walk(stretches)
    _walk_kernel[(triton.cdiv(plan.V, width), plan.B * plan.H, stretches)](
        narrow.q, narrow.k, narrow.score, narrow.decay, v, end if start is None else start, o, end,
        plan.T, plan.V, plan.N, length, ZERO=start is None, KEEP=last,
        num_warps=4, num_stages=stages, **plan.wide(width),
    )  # fmt: skip
    return o, end[:, :, -1, : plan.K].contiguous() if last else end, *narrow


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor | None, documents: Tensor | None, scale: float,
    last: bool,
) -> Any:  # fmt: skip
    plan = _plan_of(q, v, documents)
    chunks = plan.B, plan.H, plan.N
    final = v.new_empty((plan.B, plan.H, plan.K, plan.V) if last else 0, dtype=torch.float32)
    sums, decay = (gate.new_empty(*chunks, *each, plan.BK, dtype=torch.float32) for each in ((CHUNK,), ()))
    score, q_seen, k_kept = (v.new_empty(*chunks, CHUNK, each) for each in (CHUNK, plan.BK, plan.BK))
    return v.new_empty(v.shape), final, sums, score, q_seen, k_kept, decay


@opaque_operator("gated_linear_backward")
def _backward(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, documents: Tensor | None, sums: Tensor, score: Tensor,
    q_seen: Tensor, k_kept: Tensor, decay: Tensor, scale: float, do: Tensor, dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of the first five of `_forward`, the state's empty without one."""
    q, k, v, do = _even(q), _even(k), v.contiguous(), do.contiguous()
    plan = _plan_of(q, v, documents)
    B, H, N, BK, K = plan.B, plan.H, plan.N, plan.BK, plan.K
    narrow = _Narrow(sums, score, q_seen, k_kept, decay)
    stretches, length = split = plan.stretches(directions=2)
    starts = _padded(plan, state), _padded(plan, dfinal)
    if stretches > 1:
        ends = _states(plan, narrow, v, do, (None, None), split)
        starts = (
            _chain(plan, decay, starts[0], ends[0], length),
            _chain(plan, decay, starts[1], ends[1], length, reverse=True),
        )
    kept = v.new_empty(B, H, N, BK, plan.V), v.new_empty(B, H, N, BK, plan.V)
    _, dstart = _states(plan, narrow, v, do, starts, split, kept, (False, state is not None))
    dv = torch.empty_like(v)
    dq_wide, dk_wide = torch.empty_like(sums), torch.empty_like(sums)
    ddecay, dscore = torch.empty_like(decay), torch.empty_like(score, dtype=torch.float32)
    _chunk_backward_kernel[(N, B * H)](
        k_kept, score, v, do, *kept, dv, dq_wide, dk_wide, dscore, ddecay, plan.T, plan.V, N,
        num_warps=4 if BK <= 64 else 8, num_stages=plan.stages, **plan.wide(min(64, plan.BV)),
    )  # fmt: skip
    dq, dk, dgate = (q.new_empty(q.shape, dtype=dtype) for dtype in (q.dtype, k.dtype, torch.float32))
    sizes = plan.narrow(32)
    _narrow_backward_kernel[(N, B * H, BK // sizes["KB"])](
        q, k, sums if documents is None else documents, sums, dq_wide, dk_wide, dscore, ddecay, dq, dk, dgate,
        scale, plan.T, N, *_strides(q), *_strides(k), num_warps=4, num_stages=1, **sizes,
    )  # fmt: skip
    return dq, dk, dv, dgate, dstart if state is None else dstart[:, :, 0, :K].contiguous()


@_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, documents: Tensor | None, sums: Tensor, score: Tensor,
    q_seen: Tensor, k_kept: Tensor, decay: Tensor, scale: float, do: Tensor, dfinal: Tensor | None,
) -> Any:  # fmt: skip
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dgate = q.new_empty(q.shape, dtype=torch.float32)
    return dq, dk, dv, dgate, v.new_empty(0 if state is None else state.shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, _, state, documents, ctx.scale, _ = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, state, documents, *output[2:])


def _backward_of(ctx: Any, do: Tensor | None, dfinal: Tensor | None, *_: Any) -> Any:
    saved = ctx.saved_tensors  # Once: under recomputation the second look would be refused.
    if do is None:
        do = torch.zeros_like(saved[2])
    dq, dk, dv, dgate, dstate = _backward(*saved, ctx.scale, do, dfinal)
    return dq, dk, dv, dgate, None if saved[3] is None else dstate, None, None, None


_forward.register_autograd(_backward_of, setup_context=_setup_context)


def fused(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_alpha_BTHK: Tensor,
    log_beta_BTHV: None,
    scale: float,
    state_BHKV: Tensor | None,
    segments: Segments | None,
    last_state: bool,
) -> tuple[Tensor, Tensor]:
    """See `gated_linear` for the arguments; the last state is empty where it is not asked for. Matrix products in v's
    dtype, gates and sums in float32."""
    documents = None if segments is None else segments.documents_BT.int().contiguous()
    o_BTHV, state, *_ = _forward(q_BTHK, k_BTHK, v_BTHV, log_alpha_BTHK, state_BHKV, documents, scale, last_state)
    return o_BTHV, state
