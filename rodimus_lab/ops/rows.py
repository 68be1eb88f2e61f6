"""How Triton kernels read rows of (..., M): a stretch of them a program, several ahead of their use."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """(..., M) -> (rows, M) with contiguous rows, without a copy for the halves of a wider tensor."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


class Walk(NamedTuple):
    """How programs share rows: programs a multiprocessor; elements of a thread and of a tile, as a narrow row by itself
    is too little to read at a time; the loop's stages: with 1 a tile is read when it is needed, with more it is read
    ahead, into shared memory."""

    programs: int
    elements: int
    tile: int
    stages: int


def walk(x_NM: Tensor, how: Walk) -> tuple[int, int, dict[str, int]]:
    """Programs (none for no rows), rows of each, and the kernel's constants: BN rows at a time, M padded to BM."""
    rows, width = x_NM.shape[0], triton.next_power_of_2(x_NM.shape[1])
    at_once = max(1, min(how.tile // width, triton.next_power_of_2(rows)))
    wanted = how.programs
    if x_NM.is_cuda:
        wanted *= torch.cuda.get_device_properties(x_NM.device).multi_processor_count
    each = max(1, triton.cdiv(triton.cdiv(rows, wanted), at_once)) * at_once
    warps = min(16, max(1, at_once * width // (32 * how.elements)))
    return triton.cdiv(rows, each), each, {"BN": at_once, "BM": width, "STAGES": how.stages, "num_warps": warps}


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
