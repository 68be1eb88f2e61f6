"""The gated linear recurrence in Triton: the state of a block of values stays in registers while the chunks are walked.

A head of key width K beside V values needs little that is narrow (q, k, gates: K wide; the scores inside a chunk: C
wide) and much that is wide (v, o and their gradients). So the narrow part is worked out once for each chunk,

    q~ = scale q exp(a),   k~ = k exp(a_end - a),   P_ts = scale sum_i q_ti k_si exp(a_ti - a_si),

with a the log gate cumulated within the chunk, and every block of values then walks the chunks with matrix products:

    o = P v + q~ S,          S <- exp(a_end) S + k~^T v.

The backward pass walks once forward for the states and once backward for their gradients, keeps both at the starts and
ends of chunks in v's dtype, and takes the chunks one by one. Where batch, heads and blocks of values do not fill the
GPU, time is split into stretches that are walked from a zero state, chained, and walked again from their true states.

No exponent is positive: P is summed over the levels of a binary tree, at which the later half of each group of tokens
meets the earlier half, and both their gates are taken from the last token of that earlier half.

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


@triton.jit
def _level(a, sum_ptr, row, col, half_bits, BK: tl.constexpr):
    """One level of the tree, whose half groups have 2^half_bits tokens: exp(-|a - a at the last token of the group's
    earlier half|); which rows are in a later half; which pairs of rows are in one group."""
    group = row >> (half_bits + 1)
    pivot = (group << (half_bits + 1)) + (1 << half_bits) - 1
    decay = tl.exp(-tl.abs(a - tl.load(sum_ptr + pivot[:, None] * BK + col[None, :])))
    later = ((row >> half_bits) & 1) == 1
    return decay, later[:, None], group[:, None] == group[None, :]


@triton.jit
def _prepare_kernel(
    q_ptr, k_ptr, gate_ptr, document_ptr, sum_out, score_out, q_out, k_out, decay_out, scale, T, N,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, KB: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """One chunk: a (C, BK), P (C, C), q~ (C, BK), k~ (C, BK), exp(a_end) (BK). `AGAIN`: a and P are there already."""
    n = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    chunk = bh * N + n
    first = ((b * T + n * C) * H + h) * K
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
        at = row[:, None] * (H * K) + col[None, :]
        inside = (t < T)[:, None] & (col < K)[None, :]
        q = tl.load(q_ptr + first + at, mask=inside, other=0.0).to(tl.float32) * scale
        k = tl.load(k_ptr + first + at, mask=inside, other=0.0).to(tl.float32)
        narrow = row[:, None] * BK + col[None, :]
        if AGAIN:
            a = tl.load(sum_out + chunk * C * BK + narrow)
        else:
            gate = tl.maximum(tl.load(gate_ptr + first + at, mask=inside, other=0.0), FLOOR)
            a = tl.cumsum(gate, 0)
            tl.store(sum_out + chunk * C * BK + narrow, a)
            tl.debug_barrier()  # What follows reads rows of a that other threads have written.
        end = tl.load(sum_out + chunk * C * BK + (C - 1) * BK + col)
        seen = q * tl.exp(a)
        kept = k * tl.exp(tl.minimum(end[None, :] - a, 0.0))
        decay = tl.exp(end)
        if PACKED:
            seen = tl.where((document == before)[:, None], seen, 0.0)
            kept = tl.where((document == last)[:, None], kept, 0.0)
            decay = tl.where(before == last, decay, 0.0)
        tl.store(q_out + chunk * C * BK + narrow, seen.to(q_out.dtype.element_ty))
        tl.store(k_out + chunk * C * BK + narrow, kept.to(k_out.dtype.element_ty))
        tl.store(decay_out + chunk * BK + col, decay)
        if not AGAIN:
            for half_bits in range(LEVELS):
                decay_to, later, together = _level(a, sum_out + chunk * C * BK, row, col, half_bits, BK)
                queries = tl.where(later, q * decay_to, 0.0).to(DOT)
                keys = tl.where(later, 0.0, k * decay_to).to(DOT)
                met = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
                score += tl.where(together, met, 0.0)
            score += tl.where(diagonal, tl.sum(q * k, 1)[:, None], 0.0)
    if PACKED:
        score = tl.where(document[:, None] == document[None, :], score, 0.0)
    if not AGAIN:
        tl.store(score_out + chunk * C * C + (row[:, None] * C + row[None, :]), score.to(score_out.dtype.element_ty))


@triton.jit
def _walk_kernel(
    q_ptr, k_ptr, score_ptr, decay_ptr, v_ptr, start_ptr, o_ptr, end_ptr, T, V, N, LENGTH,
    H: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of values over the `LENGTH` chunks of one stretch: o, and the state at its end."""
    block, stretch, stretches = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    row, col, value = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    in_block = (value < V)[None, :]
    in_state = col[:, None] * V + value[None, :]
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
    tl.store(end_ptr + (bh * stretches + stretch) * BK * V + in_state, state, mask=in_block)


@triton.jit
def _states_kernel(
    q_ptr, k_ptr, decay_ptr, v_ptr, do_ptr, start_ptr, dstart_ptr, states_out, dstates_out, end_out, dend_out,
    T, V, N, LENGTH,
    H: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, D: tl.constexpr, KEEP: tl.constexpr,
    ZERO: tl.constexpr, DZERO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of values over one stretch, from its start to its end: forward, the states; in the other direction,
    their gradients. `KEEP` stores the state entering each chunk and the gradient of the one leaving it, and of what the
    stretch ends with only the gradient. `ZERO` and `DZERO` start from 0 in one and the other direction."""
    block, reverse = tl.program_id(0), tl.program_id(2) % D
    stretch, stretches = tl.program_id(2) // D, tl.num_programs(2) // D
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    row, col, value = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    in_block = (value < V)[None, :]
    in_state = (bh * stretches + stretch) * BK * V + (col[:, None] * V + value[None, :])
    wide_ptr, narrow_ptr, kept_out, start, end, zero = v_ptr, k_ptr, states_out, start_ptr, end_out, ZERO
    if reverse:
        wide_ptr, narrow_ptr, kept_out, start, end, zero = do_ptr, q_ptr, dstates_out, dstart_ptr, dend_out, DZERO
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
    if not KEEP or reverse:
        tl.store(end + in_state, state, mask=in_block)


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
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, KB: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and block of keys: from the gradients of q~, k~, P and exp(a_end) to those of q, k and the log gate.

    The log gate's follows from the others: a_t multiplies q_t and divides k_t wherever they meet, so its gradient is
    q_t dq_t - k_t dk_t, and a_end adds its own.
    """
    n = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    chunk = bh * N + n
    row, col = tl.arange(0, C), tl.program_id(2) * KB + tl.arange(0, KB)
    t = n * C + row
    first = ((b * T + n * C) * H + h) * K
    at = row[:, None] * (H * K) + col[None, :]
    inside = (t < T)[:, None] & (col < K)[None, :]
    narrow = row[:, None] * BK + col[None, :]
    q = tl.load(q_ptr + first + at, mask=inside, other=0.0).to(tl.float32) * scale
    k = tl.load(k_ptr + first + at, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(sum_ptr + chunk * C * BK + narrow)
    end = tl.load(sum_ptr + chunk * C * BK + (C - 1) * BK + col)
    dq = tl.load(dq_ptr + chunk * C * BK + narrow)
    dk = tl.load(dk_ptr + chunk * C * BK + narrow)
    own = tl.load(dscore_ptr + chunk * C * C + row * (C + 1))[:, None]
    ddecay = tl.load(ddecay_ptr + chunk * BK + col) * tl.exp(end)
    if PACKED:
        document = tl.load(document_ptr + b * T + t, mask=t < T, other=-1)
        before = tl.load(document_ptr + b * T + n * C - 1, mask=n > 0, other=0)
        last = tl.load(document_ptr + b * T + tl.minimum(n * C + C, T) - 1)
        dq = tl.where((document == before)[:, None], dq, 0.0)
        dk = tl.where((document == last)[:, None], dk, 0.0)
        ddecay = tl.where(before == last, ddecay, 0.0)
    dq = dq * tl.exp(a) + own * k
    dk *= tl.exp(tl.minimum(end[None, :] - a, 0.0))
    of_end = ddecay + tl.sum(k * dk, 0)
    dk += own * q
    for half_bits in range(LEVELS):
        decay_to, later, together = _level(a, sum_ptr + chunk * C * BK, row, col, half_bits, BK)
        queries = tl.where(later, q * decay_to, 0.0).to(DOT)
        keys = tl.where(later, 0.0, k * decay_to).to(DOT)
        if PACKED:
            together = together & (document[:, None] == document[None, :])
        # Loaded at every level, in both orders, as registers are scarcer than loads from the cache.
        dscore = tl.load(dscore_ptr + chunk * C * C + (row[:, None] * C + row[None, :]))
        dscore_T = tl.load(dscore_ptr + chunk * C * C + (row[None, :] * C + row[:, None]))
        dscore = tl.where(together, dscore, 0.0).to(DOT)
        dscore_T = tl.where(together, dscore_T, 0.0).to(DOT)
        dq += tl.where(later, tl.dot(dscore, keys, input_precision=PRECISION) * decay_to, 0.0)
        dk += tl.where(later, 0.0, tl.dot(dscore_T, queries, input_precision=PRECISION) * decay_to)
    dgate = tl.cumsum(q * dq - k * dk, 0, reverse=True) + of_end[None, :]
    tl.store(dq_out + first + at, (dq * scale).to(dq_out.dtype.element_ty), mask=inside)
    tl.store(dk_out + first + at, dk.to(dk_out.dtype.element_ty), mask=inside)
    tl.store(dgate_out + first + at, dgate, mask=inside)


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


def _prepare(
    plan: _Plan, q: Tensor, k: Tensor, gate: Tensor, scale: float, kept: tuple[Tensor, Tensor] | None = None
) -> _Narrow:
    """`kept` are a and P, where an earlier call has given them."""
    B, H, N, BK = plan.B, plan.H, plan.N, plan.BK
    sums, score = kept or (
        q.new_empty(B, H, N, CHUNK, BK, dtype=torch.float32),
        q.new_empty(B, H, N, CHUNK, CHUNK, dtype=plan.dtype),
    )
    q_seen, k_kept = torch.empty_like(sums, dtype=plan.dtype), torch.empty_like(sums, dtype=plan.dtype)
    narrow = _Narrow(sums, score, q_seen, k_kept, q.new_empty(B, H, N, BK, dtype=torch.float32))
    _prepare_kernel[(N, B * H)](
        q, k, gate, gate if plan.documents is None else plan.documents, *narrow, scale, plan.T, N,
        AGAIN=kept is not None, num_warps=4, num_stages=1, **plan.narrow(64),
    )  # fmt: skip
    return narrow


def _states(
    plan: _Plan,
    narrow: _Narrow,
    v: Tensor,
    do: Tensor | None,
    starts: tuple[Tensor | None, Tensor | None],
    split: tuple[int, int],
    kept: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Walk every stretch, with `do` in both directions; the states and their gradients at its end, both (B,H,S,BK,V).

    A start that is None is zero.
    """
    stretches, length = split
    ends = [v.new_empty(plan.B, plan.H, stretches, plan.BK, plan.V, dtype=torch.float32) for _ in range(2)]
    directions = 1 if do is None else 2
    _states_kernel[(triton.cdiv(plan.V, plan.BV), plan.B * plan.H, directions * stretches)](
        narrow.q, narrow.k, narrow.decay, v, v if do is None else do,
        *(end if start is None else start for start, end in zip(starts, ends, strict=True)),
        *(kept or (v, v)), *ends, plan.T, plan.V, plan.N, length,
        D=directions, KEEP=kept is not None, ZERO=starts[0] is None, DZERO=starts[1] is None,
        num_warps=4, num_stages=plan.stages, **plan.wide(plan.BV),
    )  # fmt: skip
    return ends[0], ends[1]


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
    return F.pad(state, (0, 0, 0, plan.BK - plan.K))


def _plan_of(q: Tensor, v: Tensor, documents: Tensor | None) -> _Plan:
    B, T, H, K = q.shape
    return _Plan(B, T, H, K, v.shape[-1], v.dtype, documents, q.is_cuda)


@opaque_operator("gated_linear")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor, documents: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, the last state, and for the backward pass a and P."""
    q, k, v, gate = q.contiguous(), k.contiguous(), v.contiguous(), gate.contiguous()
    plan = _plan_of(q, v, documents)
    narrow = _prepare(plan, q, k, gate, scale)
    stretches, length = plan.stretches(directions=1)
    start = _padded(plan, state)
    if stretches > 1:
        end, _ = _states(plan, narrow, v, None, (None, None), (stretches, length))
        start = _chain(plan, narrow.decay, start, end, length)
    assert start is not None
    o, end = torch.empty_like(v), torch.empty_like(start)
    width, stages = plan.walk(stretches)
    _walk_kernel[(triton.cdiv(plan.V, width), plan.B * plan.H, stretches)](
        narrow.q, narrow.k, narrow.score, narrow.decay, v, start, o, end, plan.T, plan.V, plan.N, length,
        num_warps=4, num_stages=stages, **plan.wide(width),
    )  # fmt: skip
    final = end if stretches == 1 else end[:, :, -1]
    return o, final[:, :, : plan.K].contiguous(), narrow.sums, narrow.score


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor, documents: Tensor | None, scale: float) -> Any:
    plan = _plan_of(q, v, documents)
    rows = (plan.B, plan.H, plan.N, CHUNK)
    sums = gate.new_empty(*rows, plan.BK, dtype=torch.float32)
    return v.new_empty(v.shape), state.new_empty(state.shape), sums, v.new_empty(*rows, CHUNK)


@opaque_operator("gated_linear_backward")
def _backward(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, documents: Tensor | None, sums: Tensor, score: Tensor, scale: float,
    do: Tensor, dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, do = (x.contiguous() for x in (q, k, v, do))
    plan = _plan_of(q, v, documents)
    B, H, N, BK, K = plan.B, plan.H, plan.N, plan.BK, plan.K
    narrow = _prepare(plan, q, k, sums, scale, (sums, score))
    stretches, length = split = plan.stretches(directions=2)
    starts = _padded(plan, state), _padded(plan, dfinal)
    if stretches > 1:
        ends = _states(plan, narrow, v, do, (None, None), split)
        starts = (
            _chain(plan, narrow.decay, starts[0], ends[0], length),
            _chain(plan, narrow.decay, starts[1], ends[1], length, reverse=True),
        )
    kept = v.new_empty(B, H, N, BK, plan.V), v.new_empty(B, H, N, BK, plan.V)
    _, dstart = _states(plan, narrow, v, do, starts, split, kept)
    dv = torch.empty_like(v)
    dq_wide, dk_wide = torch.empty_like(sums), torch.empty_like(sums)
    ddecay, dscore = torch.empty_like(narrow.decay), torch.empty_like(score, dtype=torch.float32)
    _chunk_backward_kernel[(N, B * H)](
        narrow.k, score, v, do, *kept, dv, dq_wide, dk_wide, dscore, ddecay, plan.T, plan.V, N,
        num_warps=4 if BK <= 64 else 8, num_stages=plan.stages, **plan.wide(min(64, plan.BV)),
    )  # fmt: skip
    dq, dk, dgate = torch.empty_like(q), torch.empty_like(k), torch.empty_like(q, dtype=torch.float32)
    sizes = plan.narrow(32)
    _narrow_backward_kernel[(N, B * H, BK // sizes["KB"])](
        q, k, sums if documents is None else documents, sums, dq_wide, dk_wide, dscore, ddecay, dq, dk, dgate,
        scale, plan.T, N, num_warps=4, num_stages=1, **sizes,
    )  # fmt: skip
    return dq, dk, dv, dgate, dstart[:, :, 0, :K].contiguous()


@_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, documents: Tensor | None, sums: Tensor, score: Tensor, scale: float,
    do: Tensor, dfinal: Tensor | None,
) -> Any:  # fmt: skip
    dq, dk, dv, dstate = (x.new_empty(x.shape) for x in (q, k, v, state))
    return dq, dk, dv, q.new_empty(q.shape, dtype=torch.float32), dstate


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, _, state, documents, ctx.scale = inputs
    _, _, sums, score = output
    ctx.mark_non_differentiable(sums, score)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, state, documents, sums, score)


def _backward_of(ctx: Any, do: Tensor | None, dfinal: Tensor | None, *_: Any) -> Any:
    saved = ctx.saved_tensors  # Once: under recomputation the second look would be refused.
    if do is None:
        do = torch.zeros_like(saved[2])
    return (*_backward(*saved, ctx.scale, do, dfinal), None, None)


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
    return _forward(q_BTHK, k_BTHK, v_BTHV, log_alpha_BTHK, state_BHKV, documents, scale)[:2]
