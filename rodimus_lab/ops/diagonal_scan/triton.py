"""The diagonal recurrence in Triton: a program walks a block of channels through time with the state in registers.

Sums are taken in a fixed order: the same inputs give the same bits.

Shapes: B batch, T time, X channels (all further dimensions as one), S stretches.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rodimus_lab.ops.diagonal_scan.stretches import chain, split
from rodimus_lab.ops.fast_math import fast_exp
from rodimus_lab.ops.tracing import opaque_operator

BLOCK = 128


@triton.jit
def _walk_kernel(
    x_ptr, log_a_ptr, start_ptr, h_out, end_out, decay_out, T, X, LENGTH, BX: tl.constexpr, KEEP: tl.constexpr
):  # fmt: skip
    """h over one stretch and the state at its end. Without `KEEP`: from zero, no h, and the stretch's whole decay."""
    stretch, stretches = tl.program_id(2), tl.num_programs(2)
    b = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BX + tl.arange(0, BX)
    inside = channel < X
    edge = (b * stretches + stretch) * X + channel
    state, total = tl.zeros([BX], tl.float32), tl.zeros([BX], tl.float32)
    if KEEP:
        state = tl.load(start_ptr + edge, mask=inside, other=0.0)
    for t in range(stretch * LENGTH, tl.minimum(stretch * LENGTH + LENGTH, T)):
        at = (b * T + t) * X + channel
        log_a = tl.load(log_a_ptr + at, mask=inside, other=0.0)
        state = fast_exp(log_a) * state + tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if KEEP:
            tl.store(h_out + at, state.to(h_out.dtype.element_ty), mask=inside)
        else:
            total += log_a
    tl.store(end_out + edge, state, mask=inside)
    if not KEEP:
        tl.store(decay_out + edge, fast_exp(total), mask=inside)


@triton.jit
def _backward_kernel(
    h_ptr, state_ptr, log_a_ptr, dh_ptr, start_ptr, dx_out, dlog_a_out, end_out, decay_out, T, X, LENGTH,
    BX: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """One stretch from its end to its start: dx, dlog_a and the gradient of the state before it. Without `KEEP`: from
    zero, the last of these and the stretch's whole decay."""
    stretch, stretches = tl.program_id(2), tl.num_programs(2)
    b = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BX + tl.arange(0, BX)
    inside = channel < X
    edge = (b * stretches + stretch) * X + channel
    dstate, total = tl.zeros([BX], tl.float32), tl.zeros([BX], tl.float32)
    if KEEP:
        dstate = tl.load(start_ptr + edge, mask=inside, other=0.0)
    begin, end = stretch * LENGTH, tl.minimum(stretch * LENGTH + LENGTH, T)
    for step in range(end - begin):
        t = end - 1 - step
        at = (b * T + t) * X + channel
        log_a = tl.load(log_a_ptr + at, mask=inside, other=0.0)
        dx = tl.load(dh_ptr + at, mask=inside, other=0.0).to(tl.float32) + dstate
        dstate = fast_exp(log_a) * dx
        if KEEP:
            before = tl.load(h_ptr + at - X, mask=inside & (t > 0), other=0.0).to(tl.float32)
            before += tl.load(state_ptr + b * X + channel, mask=inside & (t == 0), other=0.0)
            tl.store(dx_out + at, dx.to(dx_out.dtype.element_ty), mask=inside)
            tl.store(dlog_a_out + at, dstate * before, mask=inside)
        else:
            total += log_a
    tl.store(end_out + edge, dstate, mask=inside)
    if not KEEP:
        tl.store(decay_out + edge, fast_exp(total), mask=inside)


def _grid(x_BTX: Tensor) -> tuple[tuple[int, int, int], int]:
    """The programs of a walk, and the tokens of a stretch."""
    batch, length, channels = x_BTX.shape
    blocks = triton.cdiv(channels, BLOCK)
    stretches, tokens = split(length, blocks * batch, 1, on_gpu=x_BTX.is_cuda)
    return (blocks, batch, stretches), tokens


@opaque_operator("diagonal_scan")
def _forward(x: Tensor, log_a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    x, log_a = x.contiguous(), log_a.contiguous()
    (batch, length, channels), (grid, tokens) = x.shape, _grid(x)
    h = torch.empty_like(x)
    end = state.new_empty(batch, grid[2], channels)
    start, decay = state.unsqueeze(1).contiguous(), torch.empty_like(end)
    sizes = {"T": length, "X": channels, "LENGTH": tokens, "BX": BLOCK, "num_warps": 4}
    if grid[2] > 1:
        _walk_kernel[grid](x, log_a, start, h, end, decay, KEEP=False, **sizes)
        start = chain(state, end, decay)
    _walk_kernel[grid](x, log_a, start, h, end, decay, KEEP=True, **sizes)
    return h, end[:, -1].clone()


@_forward.register_fake
def _(x: Tensor, log_a: Tensor, state: Tensor) -> Any:
    return x.new_empty(x.shape), state.new_empty(state.shape)


@opaque_operator("diagonal_scan_backward")
def _backward(
    h: Tensor, log_a: Tensor, state: Tensor, dh: Tensor, dlast: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    h, log_a, state, dh = (z.contiguous() for z in (h, log_a, state, dh))
    (batch, length, channels), (grid, tokens) = h.shape, _grid(h)
    dx, dlog_a = torch.empty_like(h), torch.empty_like(log_a)
    dlast = torch.zeros_like(state) if dlast is None else dlast
    end = state.new_empty(batch, grid[2], channels)
    start, decay = dlast.unsqueeze(1).contiguous(), torch.empty_like(end)
    sizes = {"T": length, "X": channels, "LENGTH": tokens, "BX": BLOCK, "num_warps": 4}
    if grid[2] > 1:
        _backward_kernel[grid](h, state, log_a, dh, start, dx, dlog_a, end, decay, KEEP=False, **sizes)
        start = chain(dlast, end, decay, reverse=True)
    _backward_kernel[grid](h, state, log_a, dh, start, dx, dlog_a, end, decay, KEEP=True, **sizes)
    return dx, dlog_a, end[:, 0].clone()


@_backward.register_fake
def _(h: Tensor, log_a: Tensor, state: Tensor, dh: Tensor, dlast: Tensor | None) -> Any:
    return h.new_empty(h.shape), log_a.new_empty(log_a.shape), state.new_empty(state.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, log_a, state = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], log_a, state)


def _backward_of(ctx: Any, dh: Tensor | None, dlast: Tensor | None) -> Any:
    h, log_a, state = ctx.saved_tensors
    return _backward(h, log_a, state, torch.zeros_like(h) if dh is None else dh, dlast)


_forward.register_autograd(_backward_of, setup_context=_setup_context)


def fused(x_BTX: Tensor, log_a_BTX: Tensor, state_BX: Tensor) -> tuple[Tensor, Tensor]:
    """The state in float32; see `diagonal_scan` for the arguments."""
    h, state = _forward(x_BTX.flatten(2), log_a_BTX.expand(x_BTX.shape).flatten(2), state_BX.flatten(1))
    return h.view(x_BTX.shape), state.view(state_BX.shape)
