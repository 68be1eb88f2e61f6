"""RWKV-4's weighted means in Triton: a program walks a block of channels through time with the sums in registers.

With A_t and B_t the sums with and without v, and D_t = B_{t-1} + exp(k_t + bonus) the denominator, the forward pass
keeps log D_t. Backward, one walk forward makes the sums again, with their derivatives by log w, for what log w and the
bonus are owed; one walk back carries the gradients of A_t and B_t,

    G_{t-1} = exp(log_w) G_t + dwkv_t / D_t,          H_{t-1} = exp(log_w) H_t - dwkv_t wkv_t / D_t,

as multiples of exp(r_t), where r_t is the largest exponent in them. As D_s >= exp(k_t + (s-1-t) log_w) for every later
token s, exp(r_t + k_t) <= 1. Inputs are read U tokens ahead.

The sums over the batch are taken in a fixed order: the same inputs give the same bits.

Shapes: B batch, T time, D channels (BD: a block of them).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rodimus_lab.ops.fast_math import fast_exp
from rodimus_lab.ops.rows import rows_ahead
from rodimus_lab.ops.tracing import opaque_operator

BLOCK, AHEAD = 128, 8
LOWEST = tl.constexpr(-1e30)  # An exponent of which nothing comes, whatever finite number is taken from it.


@triton.jit
def _forward_kernel(
    k_ptr, v_ptr, log_w_ptr, bonus_ptr, o_out, log_out, T, D, BD: tl.constexpr, U: tl.constexpr
):  # fmt: skip
    channel = tl.program_id(0) * BD + tl.arange(0, BD)
    in_d, token = channel < D, tl.program_id(1).to(tl.int64) * T
    log_w = tl.load(log_w_ptr + channel, mask=in_d, other=0.0)
    bonus = tl.load(bonus_ptr + channel, mask=in_d, other=0.0)
    a, b, top = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32), tl.full([BD], LOWEST, tl.float32)
    for start in range(0, T, U):
        ks = rows_ahead(k_ptr, start, T, token, D, channel, in_d, U)
        vs = rows_ahead(v_ptr, start, T, token, D, channel, in_d, U)
        for u in tl.static_range(U):
            k, v = ks[u], vs[u]
            most = tl.maximum(top, k + bonus)
            past, own = fast_exp(top - most), fast_exp(k + bonus - most)
            total = past * b + own
            at, inside = (token + start + u) * D + channel, in_d & (start + u < T)
            tl.store(o_out + at, (past * a + own * v) / total, mask=inside)
            tl.store(log_out + at, most + tl.log(total), mask=inside)
            new_top = tl.maximum(top + log_w, k)
            kept, new = fast_exp(top + log_w - new_top), fast_exp(k - new_top)
            a, b, top = kept * a + new * v, kept * b + new, new_top


@triton.jit
def _backward_kernel(
    k_ptr, v_ptr, log_w_ptr, bonus_ptr, o_ptr, log_ptr, do_ptr, dk_out, dv_out, sums_out, T, D,
    BD: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * BD + tl.arange(0, BD)
    in_d, token = channel < D, tl.program_id(1).to(tl.int64) * T
    log_w = tl.load(log_w_ptr + channel, mask=in_d, other=0.0)
    bonus = tl.load(bonus_ptr + channel, mask=in_d, other=0.0)
    zero = tl.zeros([BD], tl.float32)

    a, b, top = zero, zero, tl.full([BD], LOWEST, tl.float32)
    a_by_w, b_by_w, dlog_w, dbonus = zero, zero, zero, zero
    for start in range(0, T, U):
        ks = rows_ahead(k_ptr, start, T, token, D, channel, in_d, U)
        vs = rows_ahead(v_ptr, start, T, token, D, channel, in_d, U)
        dos = rows_ahead(do_ptr, start, T, token, D, channel, in_d, U)
        logs = rows_ahead(log_ptr, start, T, token, D, channel, in_d, U, other=1e30)
        for u in tl.static_range(U):
            k, v, do = ks[u], vs[u], dos[u]
            past, own = fast_exp(top - logs[u]), fast_exp(k + bonus - logs[u])
            o = past * a + own * v
            dlog_w += do * (a_by_w - o * b_by_w) * past
            dbonus += do * (v - o) * own
            new_top = tl.maximum(top + log_w, k)
            kept, new = fast_exp(top + log_w - new_top), fast_exp(k - new_top)
            a_by_w, b_by_w = kept * (a_by_w + a), kept * (b_by_w + b)
            a, b, top = kept * a + new * v, kept * b + new, new_top
    sums_at = sums_out + tl.program_id(1).to(tl.int64) * 2 * D + channel
    tl.store(sums_at, dlog_w, mask=in_d)
    tl.store(sums_at + D, dbonus, mask=in_d)

    da, db, top = zero, zero, tl.full([BD], LOWEST, tl.float32)
    blocks = tl.cdiv(T, U)
    for block in range(blocks):
        start = (blocks - 1 - block) * U
        ks = rows_ahead(k_ptr, start, T, token, D, channel, in_d, U)
        vs = rows_ahead(v_ptr, start, T, token, D, channel, in_d, U)
        os = rows_ahead(o_ptr, start, T, token, D, channel, in_d, U)
        dos = rows_ahead(do_ptr, start, T, token, D, channel, in_d, U)
        logs = rows_ahead(log_ptr, start, T, token, D, channel, in_d, U, other=1e30)
        for u in tl.static_range(U - 1, -1, -1):
            k, v, o, do = ks[u], vs[u], os[u], dos[u]
            own, past = do * fast_exp(k + bonus - logs[u]), fast_exp(top + k)
            at, inside = (token + start + u) * D + channel, in_d & (start + u < T)
            tl.store(dv_out + at, (own + past * da).to(dv_out.dtype.element_ty), mask=inside)
            dk = own * (v - o) + past * (da * v + db)
            tl.store(dk_out + at, dk.to(dk_out.dtype.element_ty), mask=inside)
            new_top = tl.maximum(top + log_w, -logs[u])
            kept, new = fast_exp(top + log_w - new_top), fast_exp(-logs[u] - new_top) * do
            da, db, top = kept * da + new, kept * db - new * o, new_top


def _launch(x: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    batch, length, channels = x.shape
    block = min(BLOCK, max(32, triton.next_power_of_2(channels)))
    # Two channels a thread: 4 bytes of a 16-bit type.
    sizes = {"T": length, "D": channels, "BD": block, "U": AHEAD, "num_warps": max(1, block // 64)}
    return (triton.cdiv(channels, block), batch), sizes


@opaque_operator("wkv")
def _forward(k: Tensor, v: Tensor, log_w: Tensor, bonus: Tensor) -> tuple[Tensor, Tensor]:
    """wkv, which the backward pass takes differences from, and log D_t, both in float32."""
    k, v = k.contiguous(), v.contiguous()
    o, log_total = (torch.empty_like(v, dtype=torch.float32) for _ in range(2))
    grid, sizes = _launch(v)
    _forward_kernel[grid](k, v, log_w.contiguous(), bonus.contiguous(), o, log_total, **sizes)
    return o, log_total


@_forward.register_fake
def _(k: Tensor, v: Tensor, log_w: Tensor, bonus: Tensor) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape, dtype=torch.float32), v.new_empty(v.shape, dtype=torch.float32)


@opaque_operator("wkv_backward")
def _backward(
    k: Tensor, v: Tensor, log_w: Tensor, bonus: Tensor, o: Tensor, log_total: Tensor, do: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dk, dv, and in float32 those of log_w and the bonus, one below the other."""
    k, v, do = k.contiguous(), v.contiguous(), do.contiguous()
    dk, dv, sums = torch.empty_like(k), torch.empty_like(v), log_total.new_empty(v.shape[0], 2, v.shape[2])
    grid, sizes = _launch(v)
    _backward_kernel[grid](
        k, v, log_w.contiguous(), bonus.contiguous(), o, log_total, do, dk, dv, sums, **sizes
    )  # fmt: skip
    return dk, dv, sums.sum(0)


@_backward.register_fake
def _(
    k: Tensor, v: Tensor, log_w: Tensor, bonus: Tensor, o: Tensor, log_total: Tensor, do: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return k.new_empty(k.shape), v.new_empty(v.shape), log_total.new_empty(2, v.shape[2])


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def _backward_of(ctx: Any, do: Tensor, _: Any) -> Any:
    saved = ctx.saved_tensors  # Once: under recomputation the second look would be refused.
    dk, dv, sums = _backward(*saved, do)
    return dk, dv, sums[0].to(saved[2].dtype), sums[1].to(saved[3].dtype)


_forward.register_autograd(_backward_of, setup_context=_setup_context)


def fused(k_BTD: Tensor, v_BTD: Tensor, log_w_D: Tensor, bonus_D: Tensor) -> Tensor:
    """See `wkv`. Exponents and sums in float32."""
    return _forward(k_BTD, v_BTD, log_w_D.float(), bonus_D.float())[0]
