"""`rodimus_step` for a few rows in one kernel, of as many programs as the device runs at once.

    enter    x, z = split(norm(u) W_fc), x' = SiLU(ShortConv(x)), and its share of q, k, logits and low rank
    memory   gates, v, S = exp(-g tau) S + (g^tau k)^T v, y = (q S / sqrt(n) + d x') SiLU(z)
    leave    base + RMSNorm(y) W_out

A program has the same channels of M in `enter` and in `memory`, so x, z and x' stay its own. Only the sums over all
channels pass from one program to the others, which meet at a barrier after `enter` and after `memory`. The sums are
taken in fixed point, as integers add up to the same bits in any order.

So that the memory never rests, a program asks for what it reads next before it waits: W_out while it stands at the
barriers, and the next sublayer's kernel, which is started early, its own W_fc and the narrow weights.

The phases speak to each other only through memory. So the interpreter, which has no barrier, runs each in a launch.

Shapes: see dispatch.py; CH channels of M and OUT outputs a program, BN, BR: n and R padded to a power of two.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from rodimus_lab.ops.fast_math import INTERPRETED
from rodimus_lab.ops.grid_barrier import arrive, wait
from rodimus_lab.ops.launch import gdc_launch_dependents, gdc_wait, launch_options, prefetch
from rodimus_lab.ops.linear_step.triton import load_weights
from rodimus_lab.ops.rodimus_step.gates import decay_and_key
from rodimus_lab.ops.rodimus_step.weights import RodimusWeights

MAX_ROWS = 4
ENTER, MEMORY, LEAVE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
FIXED_POINT = tl.constexpr(float(1 << 32))


class Plan(NamedTuple):
    """How the kernel is cut. Tiles are as wide as said and as high as a program has rows."""

    num_warps: int = 8
    programs_per_sm: int = 1  # of one kernel, which must all be there at once
    resident_per_sm: int = 1  # of this kernel and the next: registers are limited so that they fit
    fc_width: int = 256
    fc_ahead: int = 4  # tiles of W_fc under way
    out_width: int = 1024
    out_early: int = 0  # tiles of W_out asked for before a program arrives at the first barrier
    out_ahead: int = 4  # and before it waits there
    copies: int = 4  # of the sums: fewer programs add to the same one
    launch_after: int = 0  # start the next kernel 0: at once; 1: after `enter`; 2: after `memory`
    ahead_bytes: int = 0  # of a program's share of the next W_fc, called into the L2 cache after `memory`
    cooperative: bool = False  # have the driver see to it that all programs are there at once


PLAN = Plan()


@triton.jit
def _empty():
    """A tuple, to which a type checker lets anything be added."""
    return ()


@triton.jit
def _widen(w):
    """To float32, from registers that hold two each until now: the compiler would part them when they are loaded."""
    if INTERPRETED or w.dtype != tl.bfloat16:
        return w.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 low, high; shl.b32 low, $2, 16; and.b32 high, $2, 0xffff0000; "
            "mov.b32 $0, low; mov.b32 $1, high; }",
            "=f,=f,r", [w], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def _fc_tile(fc_ptr, channel, step: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BD: tl.constexpr):
    """Tile number `step` of W_fc: of z and x in turn."""
    if step % 2 == 0:
        w = load_weights(fc_ptr, channel + M, step // 2 * BD, D, 2 * M, BD)
    else:
        w = load_weights(fc_ptr, channel, step // 2 * BD, D, M, BD)
    return w


@triton.jit
def _fc_tiles(fc_ptr, channel, COUNT: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BD: tl.constexpr):
    tiles = _empty()
    for step in tl.static_range(COUNT):
        tiles = tiles + (_fc_tile(fc_ptr, channel, step, D, M, BD),)  # noqa: RUF005 (Triton has no unpacking)
    return tiles


@triton.jit
def _out_tiles(out_ptr, row, FIRST: tl.constexpr, LAST: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
               BM: tl.constexpr):  # fmt: skip
    tiles = _empty()
    for step in tl.static_range(FIRST, LAST):
        tiles = tiles + (load_weights(out_ptr, row, step * BM, M, D, BM),)  # noqa: RUF005
    return tiles


@triton.jit
def _zeros(B: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    sums = _empty()
    for _ in tl.static_range(B):
        sums = sums + (tl.zeros([ROWS, LANES], tl.float32),)  # noqa: RUF005
    return sums


@triton.jit
def _slices(ptr, WIDTH: tl.constexpr, BD: tl.constexpr):
    """A vector, cut as the tiles are."""
    slices = _empty()
    for start in tl.static_range(0, WIDTH, BD):
        col = start + tl.arange(0, BD)
        slices = slices + (tl.load(ptr + col, mask=col < WIDTH, other=0.0),)  # noqa: RUF005
    return slices


@triton.jit
def _normed(x_ptr, x_stride, weight, eps, B: tl.constexpr, WIDTH: tl.constexpr, BD: tl.constexpr):
    """For each row of x its slices times the norm's weight, and 1 / rms, which is left for the end."""
    rows = _empty()
    factors = _empty()
    for b in tl.static_range(B):
        x = _slices(x_ptr + b * x_stride, WIDTH, BD)
        squares = tl.zeros([BD], tl.float32)
        row = _empty()
        for i in tl.static_range(len(x)):
            wide = x[i].to(tl.float32)
            squares += wide * wide
            row = row + (wide * weight[i].to(tl.float32),)  # noqa: RUF005
        rows = rows + (row,)  # noqa: RUF005
        factors = factors + (tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps),)  # noqa: RUF005
    return rows, factors


@triton.jit
def _plus_product(sums, w, rows, i: tl.constexpr, RUN: tl.constexpr):
    """For each row of x its sums (outputs, runs) and those of tile w with slice i, over runs that one thread has."""
    ROWS: tl.constexpr = w.shape[0]
    BD: tl.constexpr = w.shape[1]
    wide = _widen(w)
    new = _empty()
    for b in tl.static_range(len(rows)):
        runs = tl.reshape(wide * rows[b][i][None, :], [ROWS, BD // RUN, RUN])
        new = new + (sums[b] + tl.sum(runs, 2),)  # noqa: RUF005
    return new


@triton.jit
def _past(conv_ptr, cw_ptr, cb_ptr, channel, M: tl.constexpr, W: tl.constexpr):
    """The convolution of one row over its last W - 1 inputs, which move on by one to make room for the next."""
    inside = channel < M
    y = tl.load(cb_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    for tap in tl.static_range(W - 1):
        weight = tl.load(cw_ptr + channel * W + tap, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(conv_ptr + tap * M + channel, mask=inside, other=0.0)
        y += weight * x.to(tl.float32)
        if tap > 0:
            tl.store(conv_ptr + (tap - 1) * M + channel, x, mask=inside)
    return y


@triton.jit
def _add_to_sum(total_ptr, w, x, COUNT: tl.constexpr):
    """This program's share of w x."""
    i = tl.arange(0, w.shape[0])
    share = tl.sum(_widen(w) * x[None, :], 1) * FIXED_POINT
    tl.atomic_add(total_ptr + i, share.to(tl.int64), mask=i < COUNT, sem="relaxed")


@triton.jit
def _load_sum(total_ptr, i, COUNT: tl.constexpr, TOTAL: tl.constexpr, COPIES: tl.constexpr):
    """Past the nearest cache: others have written them."""
    total = tl.load(total_ptr + i, mask=i < COUNT, other=0, cache_modifier=".cg")
    for copy in tl.static_range(1, COPIES):
        total += tl.load(total_ptr + copy * TOTAL + i, mask=i < COUNT, other=0, cache_modifier=".cg")
    return total.to(tl.float32) * (1.0 / FIXED_POINT)


@triton.jit
def _sublayer_kernel(
    u_ptr, base_ptr, norm_ptr, fc_ptr, cw_ptr, cb_ptr, proj_ptr, gate_bias_ptr, down_ptr, up_ptr, up_bias_ptr,
    through_ptr, out_norm_ptr, out_ptr, conv_ptr, state_ptr, inner_ptr, total_ptr, barrier_ptr, ahead_ptr, y_out,
    ahead_bytes, u_stride, eps, out_eps, scale,
    B: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr,
    PROGRAMS: tl.constexpr, CH: tl.constexpr, OUT: tl.constexpr, RUN: tl.constexpr,
    FC_WIDTH: tl.constexpr, FC_AHEAD: tl.constexpr, OUT_WIDTH: tl.constexpr, OUT_EARLY: tl.constexpr,
    OUT_AHEAD: tl.constexpr, COPIES: tl.constexpr, LAUNCH_AFTER: tl.constexpr, AHEAD_KIB: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The phases from FIRST to LAST. `inner`: rows of z, x, x' and y, all float32."""
    FC_TILES: tl.constexpr = (D + FC_WIDTH - 1) // FC_WIDTH
    OUT_TILES: tl.constexpr = (M + OUT_WIDTH - 1) // OUT_WIDTH
    TOTAL: tl.constexpr = 4 * N + R
    pid = tl.program_id(0)
    channel, row = pid * CH + tl.arange(0, CH), pid * OUT + tl.arange(0, OUT)
    n, r, e = tl.arange(0, BN), tl.arange(0, BR), tl.arange(0, 4 * BN)
    in_M, in_N, in_D = channel < M, n < N, row < D
    z_ptr, x_ptr, c_ptr, y_ptr = inner_ptr, inner_ptr + B * M, inner_ptr + 2 * B * M, inner_ptr + 3 * B * M

    if FIRST == ENTER:
        # Before the wait only what no kernel of a step writes.
        tiles = _fc_tiles(fc_ptr, channel, FC_AHEAD, D, M, FC_WIDTH)
        norm = _slices(norm_ptr, D, FC_WIDTH)
        newest = tl.load(cw_ptr + channel * W + W - 1, mask=in_M, other=0.0).to(tl.float32)
    if PDL:
        if LAUNCH_AFTER == ENTER:
            gdc_launch_dependents()
        gdc_wait()
    if FIRST == ENTER:
        pasts = _empty()
        for b in tl.static_range(B):
            pasts = pasts + (_past(conv_ptr + b * (W - 1) * M, cw_ptr, cb_ptr, channel, M, W),)  # noqa: RUF005
        u, factors = _normed(u_ptr, u_stride, norm, eps, B, D, FC_WIDTH)
        z_sums, x_sums = _zeros(B, CH, FC_WIDTH // RUN), _zeros(B, CH, FC_WIDTH // RUN)
        out_tiles = _empty()
        for step in tl.static_range(2 * FC_TILES):
            w = tiles[0]
            tiles = tiles[1:]
            if step + FC_AHEAD < 2 * FC_TILES:
                tiles = tiles + (_fc_tile(fc_ptr, channel, step + FC_AHEAD, D, M, FC_WIDTH),)  # noqa: RUF005
            if step + FC_AHEAD == 2 * FC_TILES:
                at = e[:, None] * M + channel[None, :]
                proj = tl.load(proj_ptr + at, mask=(e < 4 * N)[:, None] & in_M[None, :], other=0.0)
                at = r[:, None] * M + channel[None, :]
                down = tl.load(down_ptr + at, mask=(r < R)[:, None] & in_M[None, :], other=0.0)
                if LAST == LEAVE:
                    out_tiles = _out_tiles(out_ptr, row, 0, OUT_EARLY, M, D, OUT_WIDTH)
            if step % 2 == 0:
                z_sums = _plus_product(z_sums, w, u, step // 2, RUN)
            else:
                x_sums = _plus_product(x_sums, w, u, step // 2, RUN)
        for b in tl.static_range(B):
            x, z = tl.sum(x_sums[b], 1) * factors[b], tl.sum(z_sums[b], 1) * factors[b]
            c = pasts[b] + newest * x
            c *= tl.sigmoid(c)
            sums = total_ptr + (b * COPIES + pid % COPIES) * TOTAL
            _add_to_sum(sums, proj, c, 4 * N)
            _add_to_sum(sums + 4 * N, down, x, R)
            tl.store(conv_ptr + (b * (W - 1) + W - 2) * M + channel, x.to(conv_ptr.dtype.element_ty), mask=in_M)
            tl.store(z_ptr + b * M + channel, z, mask=in_M)
            tl.store(x_ptr + b * M + channel, x, mask=in_M)
            tl.store(c_ptr + b * M + channel, c, mask=in_M)

    if (FIRST == ENTER) & (LAST >= MEMORY):
        token = arrive(barrier_ptr, PROGRAMS)
        if PDL and LAUNCH_AFTER == MEMORY:
            gdc_launch_dependents()
    if (FIRST <= MEMORY) & (LAST >= MEMORY):
        state_at = state_ptr + n[:, None] * M + channel[None, :]
        in_state = in_N[:, None] & in_M[None, :]
        states = _empty()
        for b in tl.static_range(B):
            states = states + (tl.load(state_at + b * N * M, mask=in_state, other=0.0),)  # noqa: RUF005
        up = tl.load(up_ptr + channel[:, None] * R + r[None, :], mask=in_M[:, None] & (r < R)[None, :], other=0.0)
        up_bias = tl.load(up_bias_ptr + channel, mask=in_M, other=0.0)
        through = tl.load(through_ptr + channel, mask=in_M, other=0.0)
        g_bias = tl.load(gate_bias_ptr + n, mask=in_N, other=0.0)
        tau_bias = tl.load(gate_bias_ptr + N + n, mask=in_N, other=0.0)
    if (FIRST == ENTER) & (LAST >= MEMORY):
        if LAST == LEAVE:
            out_tiles = out_tiles + _out_tiles(out_ptr, row, OUT_EARLY, OUT_AHEAD, M, D, OUT_WIDTH)
        wait(barrier_ptr, token)

    if (FIRST <= MEMORY) & (LAST >= MEMORY):
        for b in tl.static_range(B):
            sums = total_ptr + b * COPIES * TOTAL
            q = _load_sum(sums, n, N, TOTAL, COPIES) * scale
            k = _load_sum(sums + N, n, N, TOTAL, COPIES)
            g_logit = _load_sum(sums + 2 * N, n, N, TOTAL, COPIES) + g_bias.to(tl.float32)
            tau_logit = _load_sum(sums + 3 * N, n, N, TOTAL, COPIES) + tau_bias.to(tl.float32)
            low = _load_sum(sums + 4 * N, r, R, TOTAL, COPIES)
            z = tl.load(z_ptr + b * M + channel, mask=in_M, other=0.0)
            x = tl.load(x_ptr + b * M + channel, mask=in_M, other=0.0)
            c = tl.load(c_ptr + b * M + channel, mask=in_M, other=0.0)
            decay, k = decay_and_key(g_logit, tau_logit, k)
            gate = tl.sigmoid(tl.sum(up.to(tl.float32) * low[None, :], 1) + up_bias.to(tl.float32))
            new = states[b].to(tl.float32) * decay[:, None] + k[:, None] * (gate * x)[None, :]
            tl.store(state_at + b * N * M, new.to(state_ptr.dtype.element_ty), mask=in_state)
            o = tl.sum(q[:, None] * new, 0) + through.to(tl.float32) * c
            tl.store(y_ptr + b * M + channel, o * z * tl.sigmoid(z), mask=in_M)

    if (FIRST <= MEMORY) & (LAST == LEAVE):
        token = arrive(barrier_ptr, PROGRAMS)
        if PDL and LAUNCH_AFTER == LEAVE:
            gdc_launch_dependents()
        if AHEAD_KIB:
            # The rows of the next W_fc that a program with this number reads first, if that is as large as this one.
            first = (M + pid.to(tl.int64) * CH) * D * (16 // RUN)
            prefetch(ahead_ptr, first, tl.minimum(first + AHEAD_KIB * 1024, ahead_bytes), AHEAD_KIB)
    if LAST == LEAVE:
        out_norm = _slices(out_norm_ptr, M, OUT_WIDTH)
    if (FIRST <= MEMORY) & (LAST == LEAVE):
        wait(barrier_ptr, token)

    if LAST == LEAVE:
        if FIRST != ENTER:
            out_tiles = _out_tiles(out_ptr, row, 0, OUT_AHEAD, M, D, OUT_WIDTH)
        y, factors = _normed(y_ptr, M, out_norm, out_eps, B, M, OUT_WIDTH)
        y_sums = _zeros(B, OUT, OUT_WIDTH // RUN)
        for step in tl.static_range(OUT_TILES):
            w = out_tiles[0]
            out_tiles = out_tiles[1:]
            if step + OUT_AHEAD < OUT_TILES:
                later = _out_tiles(out_ptr, row, step + OUT_AHEAD, step + OUT_AHEAD + 1, M, D, OUT_WIDTH)
                out_tiles = out_tiles + later
            y_sums = _plus_product(y_sums, w, y, step, RUN)
        for b in tl.static_range(B):
            base = tl.load(base_ptr + b * D + row, mask=in_D, other=0.0).to(tl.float32)
            new = base + tl.sum(y_sums[b], 1) * factors[b]
            tl.store(y_out + b * D + row, new.to(y_out.dtype.element_ty), mask=in_D)
        # All have read the sums: for the next step they are 0 again.
        PART: tl.constexpr = (B * COPIES * TOTAL + PROGRAMS - 1) // PROGRAMS
        i = tl.arange(0, triton.next_power_of_2(PART))
        mine = (i < PART) & (pid * PART + i < B * COPIES * TOTAL)
        tl.store(total_ptr + pid * PART + i, tl.zeros_like(i).to(tl.int64), mask=mine)


class _Shared(NamedTuple):
    """What the programs of a sublayer's kernel share and leave as they found it: the sums at 0, the barrier."""

    sums: Tensor
    barrier: Tensor


# By the memory S: two decoders have two, also on two streams.
_shared: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _shared_by(memory: Tensor, count: int) -> _Shared:
    shared = _shared.get(memory)
    if shared is None or shared.sums.numel() != count:
        words = torch.zeros(count + 1, dtype=torch.int64, device=memory.device)
        shared = _shared[memory] = _Shared(words[:count], words[count:].view(torch.int32))
    return shared


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _channels(M: int, device: torch.device) -> int:
    """Of a program, so that all programs are there at once; whole sectors of 32 bytes."""
    most = _multiprocessors(device) * PLAN.programs_per_sm
    return max(16, triton.next_power_of_2(triton.cdiv(M, most)))


def fits(x: Tensor, memory: Tensor, weights: RodimusWeights) -> bool:
    """Whether a program's share is small enough for its registers."""
    M, R = weights.gate_up_MR.shape
    return len(x) <= MAX_ROWS and memory.shape[-2] <= 64 and R <= 64 and _channels(M, x.device) <= 32


def fused(
    x: Tensor, base: Tensor, conv: Tensor, memory: Tensor, weights: RodimusWeights, ahead: Tensor | None
) -> Tensor:
    """See `rodimus_step`; for what `fits`. Sums and all in between in float32.

    Two of these kernels on two streams could each take half of the device and wait for ever, unless the driver sees to
    it (`Plan.cooperative`): a process must not decode on two streams.
    """
    plan = PLAN
    (B, D), (M, W) = x.shape, weights.conv_MW.shape
    N, R = memory.shape[-2], weights.gate_down_RM.shape[0]
    channels = _channels(M, x.device)
    programs = triton.cdiv(M, channels)
    shared = _shared_by(memory, B * plan.copies * (4 * N + R))
    inner = x.new_empty(4, B, M, dtype=torch.float32)
    y = torch.empty_like(base, memory_format=torch.contiguous_format)
    out_width = min(plan.out_width, triton.next_power_of_2(M))
    out_tiles = triton.cdiv(M, out_width)
    fc_width = min(plan.fc_width, triton.next_power_of_2(D))
    fc_tiles = 2 * triton.cdiv(D, fc_width)
    ahead_bytes = 0 if ahead is None or not ahead.is_contiguous() else ahead.numel() * ahead.element_size()
    options = launch_options(x) | _occupancy(plan, x.is_cuda)
    for first, last in [(ENTER, LEAVE)] if x.is_cuda else [(ENTER, ENTER), (MEMORY, MEMORY), (LEAVE, LEAVE)]:
        _sublayer_kernel[(programs,)](
            x, base.contiguous(), weights.norm.weight_D, weights.fc_2MD, weights.conv_MW, weights.conv_bias_M,
            weights.state_proj_EM, weights.gate_bias_2n, weights.gate_down_RM, weights.gate_up_MR,
            weights.gate_up_bias_M, weights.feedthrough_M, weights.out_norm.weight_D, weights.out_DM, conv, memory,
            inner, shared.sums, shared.barrier, x if ahead is None else ahead, y, ahead_bytes, x.stride(0),
            weights.norm.eps, weights.out_norm.eps, N**-0.5,
            B=B, D=D, M=M, N=N, R=R, W=W, 
            BN=triton.next_power_of_2(N), BR=triton.next_power_of_2(R), PROGRAMS=programs, CH=channels,
            OUT=triton.next_power_of_2(triton.cdiv(D, programs)), RUN=16 // weights.fc_2MD.element_size(),
            FC_WIDTH=fc_width, FC_AHEAD=min(plan.fc_ahead, fc_tiles), OUT_WIDTH=out_width,
            OUT_EARLY=min(plan.out_early, out_tiles), OUT_AHEAD=min(plan.out_ahead, out_tiles), COPIES=plan.copies,
            LAUNCH_AFTER=plan.launch_after, AHEAD_KIB=plan.ahead_bytes // 1024 if options["PDL"] and ahead_bytes else 0,
            FIRST=first, LAST=last, num_warps=plan.num_warps, **options,
        )  # fmt: skip
    return y


def _occupancy(plan: Plan, on_gpu: bool) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if on_gpu and plan.resident_per_sm > 1:
        options["maxnreg"] = 65536 // (32 * plan.num_warps * plan.resident_per_sm) // 8 * 8
    if on_gpu and plan.cooperative:
        options["launch_cooperative_grid"] = True
    return options
