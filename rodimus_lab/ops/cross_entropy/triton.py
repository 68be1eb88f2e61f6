"""Losses of rows of logits and, in their place, the losses' gradients: a row is read from memory once and written once.

Each program has a row: it walks it for the logarithm of the sum of exponentials, and again, now from the cache, for the
gradient.

Shapes: N tokens, V vocabulary, P its padded width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rodimus_lab.ops.fast_math import fast_exp

# Of long rows a program takes half a multiprocessor: the rows at work, and so what has to stay in the cache between the
# two walks, are then few. Short ones stay there in any case, and small programs wait less for their own threads.
BLOCK, WARPS = 2048, 32
SHORT, WARPS_OF_SHORT = 16384, 8
LOWEST = tl.constexpr(-1e30)


@triton.jit
def _block(logits_ptr, bias_ptr, start, V: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr):
    """Columns from `start` on and their logits, with LOWEST in the padding. P, a multiple of 64, keeps loads whole."""
    column = start + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + column, mask=column < P, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias_ptr + column, mask=column < P, other=0.0)
    if start + BLOCK > V:
        x = tl.where(column < V, x, LOWEST)
    return column, x


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, bias_ptr, losses_out, ignore_index,
    V: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, DIFFERENTIATE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * P
    target = tl.load(targets_ptr + row)
    counted = target != ignore_index
    # Each lane has a maximum and a sum of its own, so that no thread waits for another inside the loop.
    largest = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.static_range(0, V, BLOCK):
        _, x = _block(logits_ptr, bias_ptr, start, V, P, BLOCK, BIAS)
        smaller = fast_exp(-tl.abs(x - largest))
        total = tl.where(x > largest, total * smaller + 1.0, total + smaller)
        largest = tl.maximum(largest, x)
    top = tl.max(largest, 0)
    log_sum = top + tl.log(tl.sum(total * fast_exp(largest - top), 0))
    chosen = tl.load(logits_ptr + target, mask=counted, other=0.0).to(tl.float32)
    if BIAS:
        chosen += tl.load(bias_ptr + target, mask=counted, other=0.0)
    tl.store(losses_out + row, tl.where(counted, log_sum - chosen, 0.0))
    if DIFFERENTIATE:
        tl.debug_barrier()  # The target's logit has been read.
        for start in tl.static_range(0, P, BLOCK):
            column, x = _block(logits_ptr, bias_ptr, start, V, P, BLOCK, BIAS)
            dx = tl.where(counted, fast_exp(x - log_sum) - tl.where(column == target, 1.0, 0.0), 0.0)
            tl.store(logits_ptr + column, dx.to(logits_ptr.dtype.element_ty), mask=column < P)


def losses_and_gradient(
    logits_NP: Tensor, targets_N: Tensor, bias_P: Tensor | None, vocab: int, ignore_index: int, differentiate: bool
) -> tuple[Tensor, Tensor]:
    """losses_N (float32), and the logits, with `differentiate` overwritten by their gradients, 0 in the padding."""
    tokens, width = logits_NP.shape
    losses_N = logits_NP.new_empty(tokens, dtype=torch.float32)
    if tokens:
        _cross_entropy_kernel[(tokens,)](
            logits_NP, targets_N, logits_NP if bias_P is None else bias_P, losses_N, ignore_index,
            V=vocab, P=width, BLOCK=min(BLOCK, triton.next_power_of_2(width)), BIAS=bias_P is not None,
            DIFFERENTIATE=differentiate, num_warps=WARPS if width > SHORT else WARPS_OF_SHORT,
        )  # fmt: skip
    return losses_N, logits_NP
