"""The short convolution and the value gate in one pass over x, forward and backward.

A trip is one tensor of tokens x M read or written; the narrow tensors (h of rank R, the parameters' partial sums) are
small beside it. Forward: x read, x' and v written. Backward: x and dv read for dh, which is a sum over all of M; then
x, dx' and dv read and dx written, with dh W_1 in it. The convolution and the gate's logits are worked out again, the
latter by a product of rank R on the spot.

dx_t needs dc (the gradient of what SiLU saw) of W tokens, and a program cannot shift a tile. So a tile of dc goes to a
scratch as large as the tile, which stays in the cache, and comes back W times, shifted. The tile's last W-1 rows serve
its other rows only: the next tile works them out again.

Sums over tokens are kept by each program over its stretch of time and added up after it, those over M likewise, all in
a fixed order: the same inputs give the same bits.

Shapes: B batch, T time, M width, W convolution width, R rank (BR: padded), BT x BM a tile, L tiles of a stretch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.sigmoid import sigmoid


@triton.jit
def _inputs(
    x_ptr, state_ptr, id_ptr, first, i, back: tl.constexpr, m, T, M, x_row,
    W: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """x_{first+i-back} of one sequence, from the state before its start, 0 from other documents. `x_ptr`, and `id_ptr`
    below, point to token `first`."""
    s = first + i - back
    seen = (s >= 0) & (s < T)
    if PACKED:
        seen = seen & _same_document(id_ptr, first, i, -back, T)
    # The shift goes with the pointer: one offset, and its registers, then serve every shift.
    offset = i[:, None] * x_row + m[None, :]
    x = tl.load(x_ptr - back * x_row + offset, mask=seen[:, None] & (m < M)[None, :], other=0.0)
    if STATE:
        before = (s < 0) & (s > -W)
        offset = (s + W - 1)[:, None] * M + m[None, :]
        x += tl.load(state_ptr + offset, mask=before[:, None] & (m < M)[None, :], other=0.0).to(x.dtype)
    return x.to(tl.float32)


@triton.jit
def _same_document(id_ptr, first, i, ahead: tl.constexpr, T):
    """Whether tokens first+i and first+i+ahead are of one document."""
    t = first + i
    here = tl.load(id_ptr + i, mask=(t >= 0) & (t < T), other=-2)
    there = tl.load(id_ptr + i + ahead, mask=(t + ahead >= 0) & (t + ahead < T), other=-3)
    return here == there


@triton.jit
def _convolution(
    x_ptr, state_ptr, id_ptr, weight_ptr, bias_ptr, first, i, m, T, M, x_row,
    W: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    bias = tl.load(bias_ptr + m, mask=m < M, other=0.0).to(tl.float32)
    conv = tl.zeros([i.shape[0], m.shape[0]], tl.float32) + bias[None, :]
    for back in tl.static_range(W):
        weight = tl.load(weight_ptr + back * M + m, mask=m < M, other=0.0).to(tl.float32)
        conv += weight[None, :] * _inputs(x_ptr, state_ptr, id_ptr, first, i, back, m, T, M, x_row, W, STATE, PACKED)
    return conv


@triton.jit
def _forward_kernel(
    x_ptr, h_ptr, up_ptr, up_bias_ptr, weight_ptr, bias_ptr, state_ptr, id_ptr, conv_out, v_out, T, M, x_row,
    W: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr,
    STATE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile. `weight_ptr` is of (W, M), the newest token's row first."""
    blocks, tiles = tl.cdiv(M, BM), tl.cdiv(T, BT)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, first = (rest // tiles).to(tl.int64), rest % tiles * BT
    m, r, i = block * BM + tl.arange(0, BM), tl.arange(0, BR), tl.arange(0, BT)
    in_m, in_r, in_t = m < M, r < R, first + i < T
    in_tile = in_t[:, None] & in_m[None, :]
    row = b * T + first
    x_ptr += row * x_row
    id_ptr += row
    state_ptr += b * (W - 1) * M
    at = i[:, None] * M + m[None, :]
    conv_out += row * M
    v_out += row * M

    conv = _convolution(x_ptr, state_ptr, id_ptr, weight_ptr, bias_ptr, first, i, m, T, M, x_row, W, STATE, PACKED)
    tl.store(conv_out + at, (conv * sigmoid(conv)).to(conv_out.dtype.element_ty), mask=in_tile)

    x = _inputs(x_ptr, state_ptr, id_ptr, first, i, 0, m, T, M, x_row, W, False, False)
    h = tl.load(h_ptr + row * R + (i[:, None] * R + r[None, :]), mask=in_t[:, None] & in_r[None, :], other=0.0)
    up = tl.load(up_ptr + m[:, None] * R + r[None, :], mask=in_m[:, None] & in_r[None, :], other=0.0)
    up_bias = tl.load(up_bias_ptr + m, mask=in_m, other=0.0).to(tl.float32)
    gate = sigmoid(tl.dot(h, tl.trans(up), input_precision=PRECISION) + up_bias[None, :])
    tl.store(v_out + at, (gate * x).to(v_out.dtype.element_ty), mask=in_tile)


@triton.jit
def _sum_rows(x, G: tl.constexpr):
    """(BT, BM) -> (G, BM), the sum over every G-th row: with G the rows that the threads span at once, no thread needs
    another."""
    return tl.sum(tl.reshape(x, (x.shape[0] // G, G, x.shape[1])), 0)


@triton.jit
def _settled(x):
    """x: a sum of one term, past which the compiler does not go back to work x out anew for each product's layout."""
    return tl.sum(tl.reshape(x, (1, x.shape[0], x.shape[1])), 0)


@triton.jit
def _gate_kernel(
    x_ptr, h_ptr, up_ptr, up_bias_ptr, dv_ptr, dh_out, dup_out, dup_bias_out, N, M, L, x_row, dv_row,
    R: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr, G: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward, first: what the gate's logits owe to h, W_2 and b, over one block of the width and one stretch of the
    N = B T tokens."""
    blocks = tl.cdiv(M, BM)
    block, stretch = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    m, r, i = block * BM + tl.arange(0, BM), tl.arange(0, BR), tl.arange(0, BT)
    in_m, in_r = m < M, r < R
    up = tl.load(up_ptr + m[:, None] * R + r[None, :], mask=in_m[:, None] & in_r[None, :], other=0.0)
    up_bias = tl.load(up_bias_ptr + m, mask=in_m, other=0.0).to(tl.float32)
    dup = tl.zeros([BM, BR], tl.float32)
    dup_bias = tl.zeros([G, BM], tl.float32)
    for n in tl.range(L, num_stages=1):
        first = (stretch * L + n) * BT
        in_t = first + i < N
        in_tile = in_t[:, None] & in_m[None, :]
        in_h = in_t[:, None] & in_r[None, :]
        at = i[:, None] * R + r[None, :]
        h = tl.load(h_ptr + first * R + at, mask=in_h, other=0.0)
        x = tl.load(x_ptr + first * x_row + (i[:, None] * x_row + m[None, :]), mask=in_tile, other=0.0)
        dv = tl.load(dv_ptr + first * dv_row + (i[:, None] * dv_row + m[None, :]), mask=in_tile, other=0.0)
        gate = sigmoid(tl.dot(h, tl.trans(up), input_precision=PRECISION) + up_bias[None, :])
        dlogit = _settled(dv.to(tl.float32) * x.to(tl.float32) * gate * (1 - gate))
        dup_bias += _sum_rows(dlogit, G)
        dlogit = dlogit.to(h.dtype)
        dup = tl.dot(tl.trans(dlogit), h, dup, input_precision=PRECISION)
        dh = tl.dot(dlogit, up, input_precision=PRECISION)
        tl.store(dh_out + (block.to(tl.int64) * N + first) * R + at, dh, mask=in_h)
    at = stretch * M + m
    tl.store(dup_out + at[:, None] * R + r[None, :], dup, mask=in_m[:, None] & in_r[None, :])
    tl.store(dup_bias_out + at, tl.sum(dup_bias, 0), mask=in_m)


@triton.jit
def _backward_kernel(
    x_ptr, h_ptr, dh_ptr, down_ptr, up_ptr, up_bias_ptr, weight_ptr, bias_ptr, state_ptr, id_ptr, dconv_ptr, dv_ptr,
    scratch_ptr, dx_out, dstate_out, dweight_out, dbias_out, T, M, STRETCHES, L, x_row, dconv_row, dv_row,
    W: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr, G: tl.constexpr,
    STATE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward, second: dx and the convolution's parameters, over one block of the width and one stretch of time."""
    blocks = tl.cdiv(M, BM)
    block, stretch = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b = (stretch // STRETCHES).to(tl.int64)
    m, r, i = block * BM + tl.arange(0, BM), tl.arange(0, BR), tl.arange(0, BT)
    in_m, in_r, own = m < M, r < R, i <= BT - W
    state_ptr += b * (W - 1) * M
    scratch_ptr += tl.program_id(0).to(tl.int64) * BT * BM
    in_scratch = i[:, None] * BM + tl.arange(0, BM)[None, :]
    zero = tl.zeros([G, BM], tl.float32)
    dbias, dweight = zero, (zero,) * W
    for n in tl.range(L, num_stages=1):
        first = ((stretch % STRETCHES) * L + n) * (BT - W + 1)
        if STATE:
            first -= W - 1
        row = b * T + first
        x_tile, id_tile = x_ptr + row * x_row, id_ptr + row
        valid = (first + i >= 0) & (first + i < T)
        conv = _convolution(
            x_tile, state_ptr, id_tile, weight_ptr, bias_ptr, first, i, m, T, M, x_row, W, STATE, PACKED
        )
        silu = sigmoid(conv)
        offset = i[:, None] * dconv_row + m[None, :]
        in_tile = valid[:, None] & in_m[None, :]
        dconv = tl.load(dconv_ptr + row * dconv_row + offset, mask=in_tile, other=0.0).to(tl.float32)
        dc = dconv * silu * (1 + conv * (1 - silu))
        tl.store(scratch_ptr + in_scratch, dc.to(scratch_ptr.dtype.element_ty))
        tl.debug_barrier()
        dbias += _sum_rows(tl.where(own[:, None], dc, 0.0), G)

        x = _inputs(x_tile, state_ptr, id_tile, first, i, 0, m, T, M, x_row, W, STATE, False)
        dx = tl.zeros([BT, BM], tl.float32)
        for ahead in tl.static_range(W):
            there = own
            if PACKED:
                there = there & _same_document(id_tile, first, i, ahead, T)
            weight = tl.load(weight_ptr + ahead * M + m, mask=in_m, other=0.0).to(tl.float32)
            dc = tl.load(scratch_ptr + ahead * BM + in_scratch, mask=there[:, None], other=0.0).to(tl.float32)
            dx += weight[None, :] * dc
            sum_so_far = dweight[ahead] + _sum_rows(dc * x, G)
            dweight = dweight[:ahead] + (sum_so_far,) + dweight[ahead + 1 :]  # noqa: RUF005 (Triton has no unpacking)

        mine = own & valid
        in_tile = mine[:, None] & in_m[None, :]
        in_h = mine[:, None] & in_r[None, :]
        at = i[:, None] * R + r[None, :]
        h = tl.load(h_ptr + row * R + at, mask=in_h, other=0.0)
        dh = tl.load(dh_ptr + row * R + at, mask=in_h, other=0.0)
        at = m[:, None] * R + r[None, :]
        up = tl.load(up_ptr + at, mask=in_m[:, None] & in_r[None, :], other=0.0)
        down = tl.load(down_ptr + at, mask=in_m[:, None] & in_r[None, :], other=0.0)
        up_bias = tl.load(up_bias_ptr + m, mask=in_m, other=0.0).to(tl.float32)
        # Both products transposed, as BM fills the warps' rows where BT would not.
        gate = sigmoid(tl.trans(tl.dot(up, tl.trans(h), input_precision=PRECISION)) + up_bias[None, :])
        offset = i[:, None] * dv_row + m[None, :]
        dv = tl.load(dv_ptr + row * dv_row + offset, mask=in_tile, other=0.0).to(tl.float32)
        dx += dv * gate + tl.trans(tl.dot(down, tl.trans(dh), input_precision=PRECISION))
        tl.store(dx_out + row * M + (i[:, None] * M + m[None, :]), dx.to(dx_out.dtype.element_ty), mask=in_tile)
        if STATE:
            before = own & (first + i < 0)
            offset = (first + i + W - 1)[:, None] * M + m[None, :]
            at = dstate_out + b * (W - 1) * M + offset
            tl.store(at, dx.to(dstate_out.dtype.element_ty), mask=before[:, None] & in_m[None, :])
        tl.debug_barrier()

    tl.store(dbias_out + stretch.to(tl.int64) * M + m, tl.sum(dbias, 0), mask=in_m)
    for ahead in tl.static_range(W):
        tl.store(dweight_out + (stretch.to(tl.int64) * W + ahead) * M + m, tl.sum(dweight[ahead], 0), mask=in_m)


# Elements of a 16-byte load of a 16-bit type.
VECTOR = 8
FORWARD_TILE = {"BT": 32, "BM": 128, "num_warps": 4}
GATE_TILE = {"BT": 128, "BM": 64, "num_warps": 8}
# Two programs a multiprocessor: one reads while the other waits for its scratch.
BACKWARD_TILE = {"BT": 32, "BM": 64, "num_warps": 8, "maxnreg": 128}
# Tokens of a stretch, about. Longer ones leave fewer partial sums, shorter ones more programs.
STRETCH = 512


def _fit(tile: dict[str, int], M: int) -> dict[str, int]:
    return tile | {"BM": min(tile["BM"], max(16, triton.next_power_of_2(M)))}


def _rows_at_once(tile: dict[str, int]) -> int:
    """Rows of a tile that the threads span with one load each."""
    return min(tile["BT"], max(1, tile["num_warps"] * 32 * VECTOR // tile["BM"]))


def _rows(x: Tensor) -> Tensor:
    """(..., M) -> (rows, M) with contiguous rows, without a copy for the halves of a wider tensor."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _newest_first(weight: Tensor) -> Tensor:
    """(M, W), oldest token first -> (W, M), newest first."""
    return weight.T.flip(0).contiguous()


def _constants(x: Tensor, up: Tensor, weight: Tensor, state: Tensor | None, ids: Tensor | None) -> dict[str, Any]:
    R = up.shape[1]
    return {
        "W": weight.shape[1],
        "R": R,
        "BR": max(16, triton.next_power_of_2(R)),
        "STATE": state is not None,
        "PACKED": ids is not None,
        "PRECISION": "tf32x3" if x.dtype == torch.float32 else "tf32",
    }


@torch.library.custom_op("rodimus_lab::conv_gate", mutates_args=())
def _forward(
    x: Tensor, down: Tensor, up: Tensor, up_bias: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None,
    ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x', v and h = x W_1."""
    B, T, M = x.shape
    rows = _rows(x)
    h = rows @ down.to(x.dtype).T
    conv, v = x.new_empty(x.shape), x.new_empty(x.shape)
    tile = _fit(FORWARD_TILE, M)
    _forward_kernel[(B * triton.cdiv(T, tile["BT"]) * triton.cdiv(M, tile["BM"]),)](
        rows, h, up.to(x.dtype).contiguous(), up_bias, _newest_first(weight), bias,
        x if state is None else state.contiguous(), x if ids is None else ids, conv, v, T, M, rows.stride(0),
        **tile, **_constants(x, up, weight, state, ids),
    )  # fmt: skip
    return conv, v, h.view(B, T, -1)


@_forward.register_fake
def _(
    x: Tensor, down: Tensor, up: Tensor, up_bias: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None,
    ids: Tensor | None,
) -> Any:  # fmt: skip
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(*x.shape[:2], down.shape[0])


@torch.library.custom_op("rodimus_lab::conv_gate_backward", mutates_args=())
def _backward(
    x: Tensor, down: Tensor, up: Tensor, up_bias: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None,
    ids: Tensor | None, h: Tensor, dconv: Tensor, dv: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of the first seven, the state's empty without one."""
    B, T, M = x.shape
    N, R, W = B * T, up.shape[1], weight.shape[1]
    rows, dconv, dv = _rows(x), _rows(dconv), _rows(dv)
    low_up, low_down = up.to(x.dtype).contiguous(), down.T.to(x.dtype).contiguous()
    constants = _constants(x, up, weight, state, ids)

    def partial(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    tile = _fit(GATE_TILE, M)
    each = triton.cdiv(STRETCH, tile["BT"])
    blocks, stretches = triton.cdiv(M, tile["BM"]), triton.cdiv(N, each * tile["BT"])
    dh, dup, dup_bias = partial(blocks, N, R), partial(stretches, M, R), partial(stretches, M)
    _gate_kernel[(blocks * stretches,)](
        rows, h, low_up, up_bias, dv, dh, dup, dup_bias, N, M, each, rows.stride(0), dv.stride(0),
        **tile, **{name: constants[name] for name in ("R", "BR", "PRECISION")}, G=_rows_at_once(tile),
    )  # fmt: skip
    dh = dh.sum(0).to(x.dtype)

    tile = _fit(BACKWARD_TILE, M)
    tiles = triton.cdiv(T + (0 if state is None else W - 1), tile["BT"] - W + 1)
    stretches = triton.cdiv(tiles * tile["BT"], STRETCH)
    programs = triton.cdiv(M, tile["BM"]) * B * stretches
    dx, dstate = x.new_empty(B, T, M), x.new_empty(0) if state is None else state.new_empty(state.shape)
    dweight, dbias = partial(B * stretches, W, M), partial(B * stretches, M)
    _backward_kernel[(programs,)](
        rows, h, dh, low_down, low_up, up_bias, _newest_first(weight), bias,
        x if state is None else state.contiguous(), x if ids is None else ids, dconv, dv,
        x.new_empty(programs, tile["BT"], tile["BM"]), dx, dstate, dweight, dbias,
        T, M, stretches, triton.cdiv(tiles, stretches), rows.stride(0), dconv.stride(0), dv.stride(0),
        **tile, **constants, G=_rows_at_once(tile),
    )  # fmt: skip
    return (
        dx,
        (dh.T @ rows).to(down.dtype),
        dup.sum(0).to(up.dtype),
        dup_bias.sum(0).to(up_bias.dtype),
        dweight.sum(0).flip(0).T.to(weight.dtype).contiguous(),
        dbias.sum(0).to(bias.dtype),
        dstate,
    )


@_backward.register_fake
def _(
    x: Tensor, down: Tensor, up: Tensor, up_bias: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None,
    ids: Tensor | None, h: Tensor, dconv: Tensor, dv: Tensor,
) -> Any:  # fmt: skip
    gradients = [each.new_empty(each.shape) for each in (x, down, up, up_bias, weight, bias)]
    return *gradients, x.new_empty(0) if state is None else state.new_empty(state.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs, output[2])


def _backward_of(ctx: Any, dconv: Tensor, dv: Tensor, dh: Tensor) -> Any:
    """h is handed out for this pass only."""
    *gradients, dstate = _backward(*ctx.saved_tensors, dconv, dv)
    return *gradients, None if ctx.saved_tensors[6] is None else dstate, None


_forward.register_autograd(_backward_of, setup_context=_setup_context)


def fused(
    x_BTM: Tensor,
    conv_weight_MW: Tensor,
    conv_bias_M: Tensor,
    gate: tuple[Tensor, Tensor, Tensor],
    state_BWM: Tensor | None,
    segments: Segments | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `conv_gate`. Sums and gates in float32, the gate's products in x's dtype."""
    ids = None if segments is None else segments.ids_BT.int().contiguous()
    conv_BTM, v_BTM, _ = _forward(x_BTM, *gate, conv_weight_MW, conv_bias_M, state_BWM, ids)
    kept = conv_weight_MW.shape[1] - 1
    start = max(0, x_BTM.shape[1] - kept)
    last = x_BTM[:, start:]
    if ids is not None:
        last = last * (ids[:, start:] == ids[:, -1:]).unsqueeze(-1)
    if last.shape[1] < kept:
        if state_BWM is None:
            state_BWM = x_BTM.new_zeros(x_BTM.shape[0], kept, x_BTM.shape[2])
        last = torch.cat([state_BWM[:, last.shape[1] :].to(x_BTM.dtype), last], dim=1)
    return conv_BTM, v_BTM, last
