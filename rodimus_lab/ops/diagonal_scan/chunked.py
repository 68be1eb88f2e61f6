"""The diagonal recurrence in plain torch: time in chunks that are walked side by side, then joined one after another.

T tokens in chunks of about sqrt(T) take 2 sqrt(T) steps. Where the rows of a step are wide enough to hide the cost of a
call, one chunk is walked instead: that touches every number once. Only products of gates <= 1 are formed, never
quotients, so no gate is too small. The backward pass is the same walk from the end.

Shapes: B batch, T time, X any further dimensions, N chunks, C chunk length.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rodimus_lab.ops.derivative import once_differentiable

WIDE_ROW = 4096


def chunked(x_BTX: Tensor, log_a_BTX: Tensor, state_BX: Tensor) -> tuple[Tensor, Tensor]:
    """In the state's dtype; see `diagonal_scan` for the arguments."""
    h_BTX = _Scan.apply(x_BTX.to(state_BX.dtype), log_a_BTX.exp().expand(x_BTX.shape), state_BX)
    return h_BTX, h_BTX[:, -1].clone()  # A view would keep h in memory as long as the state.


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, state: Tensor) -> Tensor:
        h = _scan(x, a, state)
        ctx.save_for_backward(a, h, state)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, h, state = ctx.saved_tensors
        # dx_t = dh_t + a_{t+1} dx_{t+1}
        following = torch.cat([torch.zeros_like(a[:, :1]), a[:, 1:].flip(1)], dim=1)
        dx = _scan(dh.flip(1), following, torch.zeros_like(state)).flip(1)
        da = torch.empty_like(dx)
        torch.mul(dx[:, 0], state, out=da[:, 0])
        torch.mul(dx[:, 1:], h[:, :-1], out=da[:, 1:])
        return dx, da, a[:, 0] * dx[:, 0]


def _scan(x_BTX: Tensor, a_BTX: Tensor, state_BX: Tensor) -> Tensor:
    """h_BTX"""
    length = x_BTX.shape[1]
    chunk = length if state_BX.numel() >= WIDE_ROW else math.isqrt(length - 1) + 1
    pad = -length % chunk
    if pad:
        end = x_BTX.new_zeros(x_BTX.shape[0], pad, *x_BTX.shape[2:])
        x_BTX, a_BTX = torch.cat([x_BTX, end], dim=1), torch.cat([a_BTX, end], dim=1)
    x_BNCX, a_BNCX = (z.unflatten(1, (-1, chunk)) for z in (x_BTX, a_BTX))
    h_BNCX = torch.empty_like(x_BNCX)
    # The first chunk starts from the state and the others from zero ...
    before_BNX = torch.zeros_like(x_BNCX[:, :, 0])
    before_BNX[:, 0] = state_BX
    for x_BNX, a_BNX, h_BNX in zip(x_BNCX.unbind(2), a_BNCX.unbind(2), h_BNCX.unbind(2), strict=True):
        before_BNX = torch.addcmul(x_BNX, a_BNX, before_BNX, out=h_BNX)
    # ... so what the state before each of those would have left is added, from chunk to chunk.
    if h_BNCX.shape[1] > 1:
        decays = a_BNCX[:, 1:].cumprod(2).unbind(1)
        chunks = h_BNCX.unbind(1)
        for decay_BCX, before_BCX, h_BCX in zip(decays, chunks[:-1], chunks[1:], strict=True):
            h_BCX.addcmul_(decay_BCX, before_BCX[:, -1:])
    return h_BNCX.flatten(1, 2)[:, :length]
