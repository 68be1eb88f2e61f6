"""A convolution that slides along time: what the kernels of `short_conv` and `conv_gate` share.

The rows of a tile are not neighbours in time but stretches of L tokens, and a program walks all of them in step, token
by token. The last W inputs and gradients of each row are then simply carried along in registers: nothing is shifted or
kept aside, and every input is read once (and again W-1 tokens where stretches meet). U steps at a time are written out:
the carried values then take turns in the registers.

Shapes: B batch, T time, M width, W convolution width, S x BM a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rodimus_lab.ops.rows import push

# The longest stretch: backward has sums over its tokens to be added to the others'.
LONGEST = 128


@triton.jit
def rows_of_tile(B, T, L, W: tl.constexpr, S: tl.constexpr, STATE: tl.constexpr):
    """Each row's sequence, its stretch's first token and its sequence's end. With STATE the time starts W-1 tokens
    early; a row too many ends before that."""
    early: tl.constexpr = W - 1 if STATE else 0
    stretches = tl.cdiv(T + early, L)
    row = tl.program_id(1) * S + tl.arange(0, S)
    b = row // stretches
    return b.to(tl.int64), row % stretches * L - early, tl.where(b < B, T, 1 - W)


@triton.jit
def input_at(x_at, state_at, t, end, in_m, M, W: tl.constexpr, STATE: tl.constexpr):
    """x_t, from the state before the sequence's start. `state_at` points to where token 0 would be."""
    x = tl.load(x_at, mask=((t >= 0) & (t < end))[:, None] & in_m, other=0.0)
    if STATE:
        before = (t > -W) & (t < tl.minimum(end, 0))
        x += tl.load(state_at + t[:, None] * M, mask=before[:, None] & in_m, other=0.0).to(x.dtype)
    return x


@triton.jit
def document_at(id_at, t, end):
    return tl.load(id_at, mask=(t >= 0) & (t < end), other=-2)


@triton.jit
def inputs_before(
    x_at, state_at, id_at, first, end, in_m, M, x_row, W: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """The W inputs before each row's stretch, the latest first, and their documents."""
    xs, ids = (0.0,) * W, (0,) * W
    for p in tl.static_range(-W, 0):
        xs = push(xs, input_at(x_at + p * x_row, state_at, first + p, end, in_m, M, W, STATE).to(tl.float32))
        if PACKED:
            ids = push(ids, document_at(id_at + p, first + p, end))
    return xs, ids


@triton.jit
def load_taps(weight_ptr, m, in_m, W: tl.constexpr):
    """The convolution's weights, the newest token's first."""
    taps = (0.0,) * W
    for tap in tl.static_range(W):
        taps = push(taps, tl.load(weight_ptr + m * W + tap, mask=in_m, other=0.0).to(tl.float32))
    return taps


@triton.jit
def convolve(taps, bias, xs, ids, W: tl.constexpr, PACKED: tl.constexpr):
    """Of the newest of xs, the last W inputs."""
    conv = bias + taps[0] * xs[0]
    for back in tl.static_range(1, W):
        x = xs[back]
        if PACKED:
            x = tl.where((ids[back] == ids[0])[:, None], x, 0.0)
        conv += taps[back] * x
    return conv


def fit(tile: dict[str, int], x: Tensor) -> dict[str, int]:
    """The tile of a 16-bit type for x: as many bytes a row, and none that is wider than x."""
    return tile | {"BM": min(tile["BM"] * 2 // x.element_size(), max(16, triton.next_power_of_2(x.shape[-1])))}


def steps(x: Tensor, tile: dict[str, int], programs: int) -> int:
    """L, a power of two, where stretches may be cut short for so many programs a multiprocessor."""
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    wanted = x.numel() // (tile["S"] * tile["BM"] * programs * multiprocessors)
    return min(LONGEST, max(4 * tile["U"], triton.next_power_of_2(wanted + 1) // 2))


def apart(sums: Tensor, *parameters: Tensor) -> list[Tensor]:
    """The sums, one parameter's after another's, in the parameters' shapes and types."""
    parts = sums.split([each.numel() for each in parameters])
    return [part.view(each.shape).to(each.dtype) for part, each in zip(parts, parameters, strict=True)]
