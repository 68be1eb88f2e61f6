"""How Triton kernels read rows of (..., M), several of them ahead of their use."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """(..., M) -> (rows, M) with contiguous rows, without a copy for the halves of a wider tensor."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@triton.jit
def push(window, newest):
    return (newest,) + window[:-1]  # noqa: RUF005 (Triton has no unpacking)


@triton.jit
def rows_ahead(ptr, first, end, token, M, channel, in_m, U: tl.constexpr, EVEN: tl.constexpr = False, other=0.0):
    """Rows `first` to `first` + U - 1 of the sequence that begins at row `token` of (rows, M), in float32; `other` from
    `end` on, which with EVEN is none of them."""
    rows, at = (0.0,) * U, ptr + ((token + first) * M + channel)
    for back in tl.static_range(U):
        u = U - 1 - back
        inside = in_m
        if not EVEN:
            inside = in_m & (first + u < end)
        rows = push(rows, tl.load(at + u * M, mask=inside, other=other).to(tl.float32))
    return rows
