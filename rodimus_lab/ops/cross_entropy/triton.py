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

BLOCK = 8192


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, bias_ptr, losses_out, V, P, ignore_index,
    BLOCK: tl.constexpr, BIAS: tl.constexpr, DIFFERENTIATE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * P
    target = tl.load(targets_ptr + row)
    counted = target != ignore_index
    largest, total = float("-inf"), 0.0
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + column, mask=column < V, other=float("-inf")).to(tl.float32)
        if BIAS:
            x += tl.load(bias_ptr + column, mask=column < V, other=0.0)
        grown = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - grown) + tl.sum(tl.exp(x - grown), 0)
        largest = grown
    log_sum = largest + tl.log(total)
    chosen = tl.load(logits_ptr + target, mask=counted, other=0.0).to(tl.float32)
    if BIAS:
        chosen += tl.load(bias_ptr + target, mask=counted, other=0.0)
    tl.store(losses_out + row, tl.where(counted, log_sum - chosen, 0.0))
    if DIFFERENTIATE:
        tl.debug_barrier()  # The target's logit has been read.
        for start in range(0, P, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + column, mask=column < V, other=float("-inf")).to(tl.float32)
            if BIAS:
                x += tl.load(bias_ptr + column, mask=column < V, other=0.0)
            dx = tl.exp(x - log_sum) - tl.where(column == target, 1.0, 0.0)
            dx = tl.where(counted, dx, 0.0)
            tl.store(logits_ptr + column, dx.to(logits_ptr.dtype.element_ty), mask=column < P)


def losses_and_gradient(
    logits_NP: Tensor, targets_N: Tensor, bias_P: Tensor | None, vocab: int, ignore_index: int, differentiate: bool
) -> Tensor:
    """losses_N (float32); with `differentiate`, `logits_NP` holds their gradients afterwards, 0 in the padding."""
    tokens, width = logits_NP.shape
    losses_N = logits_NP.new_empty(tokens, dtype=torch.float32)
    if tokens:
        _cross_entropy_kernel[(tokens,)](
            logits_NP, targets_N, logits_NP if bias_P is None else bias_P, losses_N, vocab, width, ignore_index,
            BLOCK=min(BLOCK, triton.next_power_of_2(width)), BIAS=bias_P is not None, DIFFERENTIATE=differentiate,
            num_warps=16,
        )  # fmt: skip
    return losses_N
