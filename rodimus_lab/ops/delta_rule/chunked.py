"""The delta rule in chunks, in plain torch.

Inside a chunk let u_t = b_t S_{t-1}, what the memory holds for b_t. Unrolled from the state S that enters the chunk,

    u_t = b_t decay(start, t-1) S + sum_{s<t} (b_t decay(s, t-1) k_s) v_s + (b_t decay(s, t-1) a_s) u_s

which is a unit lower triangular system for all u of the chunk at once: (I - A_ba) u = A_bk v + b~ S (the WY form of a
product of such transitions). It is solved for both right-hand sides before S is known; then only products of K x V go
from chunk to chunk. Without `a` the unknown is what is written, w = v - u: (I + A_bk) w = v - b~ S.

As in the gated linear recurrence no exponent is ever positive and every decay is a sum of log-gates over the steps in
question. A chunk is halved again and again: between the halves the decay from s to t factors at the middle into two
factors <= 1, so those scores are one matrix product a level; the last few tokens' decays are formed directly. A gate
that is the same all along K needs one C x C matrix of decays.

Shapes: B batch, T time, H heads, K key width, V value width, N chunks, C chunk length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rodimus_lab.ops.delta_rule.naive import Transition
from rodimus_lab.ops.gated_linear.chunked import SameDocument, between
from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.tracing import untraced

CHUNK = 64
SMALLEST = 4  # Decays between so many tokens are formed directly. Chunks are this long or twice, four times ... it.


class Decayed(NamedTuple):
    """Of a chunk: `tables[i][j]` (..., C, C) has at [t, s] the product of row i at t and column j at s with the decay
    from s to t between them, 0 where s > t; the decays from the start of the chunk to after each token, from after each
    token to the chunk's end, and over all of it, (..., C or 1, K or 1)."""

    tables: Sequence[Sequence[Tensor]]
    from_start: Tensor
    to_end: Tensor
    whole: Tensor


# torch 2.13's inductor, at lengths that are no whole number of chunks, gets the gradient of the gates wrong.
@untraced
def chunked(
    q_BTHK: Tensor,
    v_BTHV: Tensor,
    transition: Transition,
    scale: float,
    state_BHKV: Tensor,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """In the state's dtype; see `delta_rule` for the arguments."""
    wide, length = state_BHKV.dtype, q_BTHK.shape[1]
    chunk = SMALLEST
    while chunk < min(length, CHUNK):
        chunk *= 2
    pad = -length % chunk

    def to_chunks(x: Tensor) -> Tensor:  # (B, T, H, X) -> (B, H, N, C, X)
        return F.pad(x.to(wide).transpose(1, 2), (0, 0, 0, pad)).unflatten(2, (-1, chunk))

    *log_alpha_k_b, a_BTHK = transition.terms()
    q, v, step, k, b = (to_chunks(x) for x in (q_BTHK * scale, v_BTHV, *log_alpha_k_b))
    a = None if a_BTHK is None else to_chunks(a_BTHK)
    # b_t reads the state before t: it is a row of the token before, and the chunk's first one reads the entering state.
    following_b = F.pad(b[..., 1:, :], (0, 0, 0, 1))
    decayed = (one_gate if step.shape[-1] == 1 else every_gate)((q, following_b), (k,) if a is None else (k, a), step)
    (q_table, *q_further), b_tables = decayed.tables
    b_table, *b_further = (F.pad(table[..., :-1, :], (0, 0, 1, 0)) for table in b_tables)
    q_start = q * decayed.from_start
    b_start = b * F.pad(decayed.from_start[..., :-1, :], (0, 0, 1, 0), value=1.0)
    to_end, whole = decayed.to_end, decayed.whole
    if segments is not None:
        same = SameDocument(segments, chunk, pad)
        pairs = same.pairs_BNCC.unsqueeze(1)
        q_table, b_table = q_table * pairs, b_table * pairs
        q_further, b_further = [x * pairs for x in q_further], [x * pairs for x in b_further]
        as_before = same.as_before_BNC[:, None, :, :, None]
        q_start, b_start = q_start * as_before, b_start * as_before
        to_end = to_end * same.as_last_BNC[:, None, :, :, None]
        whole = whole * same.keeps_BN[:, None, :, None, None]

    if a is None:
        free, held = _solve(b_table, v, -b_start)
        writes, o, further = (k * to_end).mT, None, None
    else:
        free, held = _solve(-b_further[0], b_table @ v, b_start)
        writes, o, further = (a * to_end).mT, q_table @ v, (k * to_end).mT @ v
        q_table = q_further[0]
    decay, entering, news = whole.mT, [], []
    for n in range(q.shape[2]):
        entering.append(state_BHKV)
        news.append(free[:, :, n] + held[:, :, n] @ state_BHKV)
        state_BHKV = decay[:, :, n] * state_BHKV + writes[:, :, n] @ news[-1]
        if further is not None:
            state_BHKV = state_BHKV + further[:, :, n]
    seen = q_table @ torch.stack(news, dim=2) + q_start @ torch.stack(entering, dim=2)
    o = seen if o is None else o + seen
    return o.flatten(2, 3)[:, :, :length].transpose(1, 2).to(v_BTHV.dtype), state_BHKV


def one_gate(rows: Sequence[Tensor], columns: Sequence[Tensor], step: Tensor) -> Decayed:
    """For log-gates (..., C, 1) that are the same all along K."""
    pairs = between(step).squeeze(-1).exp()
    from_start = step.cumsum(-2).exp()
    tables = [tuple(x @ y.mT * pairs for y in columns) for x in rows]
    return Decayed(tables, from_start, pairs[..., -1, :].unsqueeze(-1), from_start[..., -1:, :])


def every_gate(rows: Sequence[Tensor], columns: Sequence[Tensor], step: Tensor) -> Decayed:
    """For log-gates (..., C, K) of each key channel."""

    def halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:  # (..., C, K) -> 2 x (..., C / 2 size, size, K)
        first, second = x.unflatten(-2, (-1, 2, size)).unbind(-3)
        return first, second

    stretches = step.unflatten(-2, (-1, SMALLEST))
    near = between(stretches).exp()
    tables = list(zip(*(_near_tables(rows, y, near) for y in columns), strict=True))
    upto = stretches.cumsum(-2).flatten(-3, -2)  # from the start of a token's stretch to after the token
    after = F.pad(stretches.flip(-2).cumsum(-2).flip(-2)[..., 1:, :], (0, 0, 0, 1)).flatten(-3, -2)
    size = SMALLEST
    while size < step.shape[-2]:
        (upto_1, upto_2), (after_1, after_2) = halves(upto, size), halves(after, size)
        from_middle, to_middle = upto_2.exp(), after_1.exp()
        late = [halves(x, size)[1] * from_middle for x in rows]
        early = [halves(y, size)[0] * to_middle for y in columns]
        tables = [
            tuple(_joined(table, x @ y.mT) for table, y in zip(row, early, strict=True))
            for row, x in zip(tables, late, strict=True)
        ]
        total_1, total_2 = upto_1[..., -1:, :], upto_2[..., -1:, :]
        upto = torch.stack([upto_1, upto_2 + total_1], dim=-3).flatten(-4, -2)
        after = torch.stack([after_1 + total_2, after_2], dim=-3).flatten(-4, -2)
        size *= 2
    tables = [tuple(table.squeeze(-3) for table in row) for row in tables]
    return Decayed(tables, upto.exp(), after.exp(), upto[..., -1:, :].exp())


def _near_tables(rows: Sequence[Tensor], y: Tensor, near: Tensor) -> Sequence[Tensor]:
    """For each of the rows (..., M * c, K) and the columns y, (..., M, c, c), with the decays (..., M, c, c, K)."""
    decayed_y = near * y.unflatten(-2, (-1, 1, near.shape[-2]))
    x = torch.stack([x.unflatten(-2, (-1, near.shape[-2])) for x in rows], dim=-1)
    return (decayed_y @ x).unbind(-1)


def _joined(diagonal: Tensor, below: Tensor) -> Tensor:
    """(..., M, 2c, 2c) with each two of the (..., 2M, c, c) on the diagonal and `below` (..., M, c, c) under it."""
    first, second = diagonal.unflatten(-3, (-1, 2)).unbind(-3)
    return torch.cat([torch.cat([first, torch.zeros_like(below)], -1), torch.cat([below, second], -1)], -2)


def _solve(below: Tensor, *right: Tensor) -> Sequence[Tensor]:
    """x of (I + below) x = right, for each right-hand side; `below` is strictly lower triangular."""
    both = torch.cat(right, dim=-1)
    solved = torch.linalg.solve_triangular(below, both, upper=False, unitriangular=True)
    return solved.split([x.shape[-1] for x in right], dim=-1)
