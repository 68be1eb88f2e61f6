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
def rows_ahead(ptr, first, end, token, M, channel, in_m, U: tl.constexpr, other=0.0):
    """Rows `first` to `first` + U - 1 of the sequence that begins at row `token` of (rows, M), in float32; `other` from
    `end` on."""
    rows = (0.0,) * U
    for back in tl.static_range(U):
        t = first + U - 1 - back
        row = tl.load(ptr + (token + t) * M + channel, mask=in_m & (t < end), other=other)
        rows = push(rows, row.to(tl.float32))
    return rows
