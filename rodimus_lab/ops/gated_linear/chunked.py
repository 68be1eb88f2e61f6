"""The gated linear recurrence in chunks, in plain torch (Eq. 15 to 19 of the paper, made safe).

Eq. 17 divides by cumulated gates, which overflows as soon as they are small. Here no exponent is ever positive. Blocks
of one token are joined to blocks of two, of four, and so on up to a chunk: the decay from token s of the first half to
token t of the second factors at their border into two factors <= 1, so the scores between the halves are a matrix
product. The same split serves the value gate beta. All decays come from sums of log-gates over the steps in question,
never from differences of long sums, so precision does not depend on how far a chunk decays.

With one gate a head and token (RetNet, Mamba2) a score is q k^T times the decay between its two tokens: one C x C
matrix of decays a head and chunk, and nothing as wide as K.

Shapes: B batch, T time, H heads, K key width, V value width, N chunks, C chunk length, J blocks in a chunk, L
block length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rodimus_lab.ops.segments import Segments

CHUNK = 64


def chunked(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_alpha_BTHK: Tensor,
    log_beta_BTHV: Tensor | None,
    scale: float,
    state_BHKV: Tensor,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """Matrix products in v's dtype, gates and states in the state's; see `gated_linear` for the arguments."""
    wide, narrow = state_BHKV.dtype, v_BTHV.dtype
    length = q_BTHK.shape[1]
    if log_beta_BTHV is None and log_alpha_BTHK.stride(-1) == 0:
        return _one_gate(q_BTHK, k_BTHK, v_BTHV, log_alpha_BTHK[..., :1], scale, state_BHKV, segments)
    chunk = _chunk_length(length)
    pad = -length % chunk

    def to_chunks(x: Tensor, dtype: torch.dtype) -> Tensor:  # (B, T, H, X) -> (B, H, N, C, X)
        return F.pad(x.to(dtype).transpose(1, 2), (0, 0, 0, pad)).unflatten(2, (-1, chunk))

    q, k = to_chunks(q_BTHK * scale, wide), to_chunks(k_BTHK, wide)
    v = to_chunks(v_BTHV, narrow if log_beta_BTHV is None else wide)
    alpha = _Decays(to_chunks(log_alpha_BTHK, wide))
    beta = None if log_beta_BTHV is None else _Decays(to_chunks(log_beta_BTHV, wide))
    same = None if segments is None else SameDocument(segments, chunk, pad)

    # Within the chunk.
    scores_BHNJLL = (q * k).sum(-1)[..., None, None]
    if beta is not None:
        o = scores_BHNJLL.squeeze(-1) * v
    while alpha.length < chunk:
        half = alpha.length
        from_border, to_border = alpha.at_borders()
        across = _matmul(_halves(q, half)[1] * from_border, (_halves(k, half)[0] * to_border).mT, narrow)
        if same is not None:
            across = across * same.across(half).unsqueeze(1)
        if beta is None:
            first, second = scores_BHNJLL.unflatten(-3, (-1, 2)).unbind(-3)
            scores_BHNJLL = torch.cat([F.pad(first, (0, half)), torch.cat([across, second], dim=-1)], dim=-2)
        else:
            from_border, to_border = beta.at_borders()
            first, second = _halves(o, half)
            second = second + from_border * (across @ (_halves(v, half)[0] * to_border))
            o = torch.stack([first, second], dim=-3).flatten(-4, -2)
            beta.join()
        alpha.join()
    if beta is None:
        o = _matmul(scores_BHNJLL.squeeze(-3), v, narrow)

    # From chunk to chunk.
    keys = k * alpha.to_end
    values = v if beta is None else v * beta.to_end
    if same is not None:
        keys = keys * same.as_last_BNC[:, None, :, :, None]
    writes_BHNKV = _matmul(keys.mT, values, narrow)
    decay_BHNKV = alpha.whole.unsqueeze(-1)
    if beta is not None:
        decay_BHNKV = decay_BHNKV * beta.whole.unsqueeze(-2)
    if same is not None:
        decay_BHNKV = decay_BHNKV * same.keeps_BN[:, None, :, None, None]
    entering = []
    for decay_BHKV, write_BHKV in zip(decay_BHNKV.unbind(2), writes_BHNKV.unbind(2), strict=True):
        entering.append(state_BHKV)
        state_BHKV = decay_BHKV * state_BHKV + write_BHKV
    from_before = _matmul(q * alpha.from_start, torch.stack(entering, dim=2), narrow)
    if beta is not None:
        from_before = from_before * beta.from_start
    if same is not None:
        from_before = from_before * same.as_before_BNC[:, None, :, :, None]
    o = (o + from_before).flatten(2, 3)[:, :, :length]
    return o.transpose(1, 2).to(narrow), state_BHKV


def _one_gate(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_alpha_BTH1: Tensor,
    scale: float,
    state_BHKV: Tensor,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """`chunked` for gates that are the same all along K. q and k that were expanded over the heads are taken once."""
    wide, narrow = state_BHKV.dtype, v_BTHV.dtype
    length = v_BTHV.shape[1]
    chunk = _chunk_length(length)
    pad = -length % chunk

    def to_chunks(x: Tensor) -> Tensor:  # (B, T, H or 1, X) -> (B, H or 1, N, C, X)
        x = x[:, :, :1] if x.stride(2) == 0 else x
        return F.pad(x.transpose(1, 2), (0, 0, 0, pad)).unflatten(2, (-1, chunk))

    q, k, v, step = (to_chunks(x) for x in (q_BTHK, k_BTHK, v_BTHV, log_alpha_BTH1))
    q = q.to(wide) * scale
    pairs_BHNCC = between(step).squeeze(-1).exp()
    to_end_BHNC1 = pairs_BHNCC[..., -1, :].unsqueeze(-1)
    from_start_BHNC1 = step.cumsum(-2).exp()
    whole_BHN11 = from_start_BHNC1[..., -1:, :]
    if segments is not None:
        same = SameDocument(segments, chunk, pad)
        pairs_BHNCC = pairs_BHNCC * same.pairs_BNCC.unsqueeze(1)
        to_end_BHNC1 = to_end_BHNC1 * same.as_last_BNC[:, None, :, :, None]
        from_start_BHNC1 = from_start_BHNC1 * same.as_before_BNC[:, None, :, :, None]
        whole_BHN11 = whole_BHN11 * same.keeps_BN[:, None, :, None, None]
    o = _matmul(_matmul(q, k.mT, narrow) * pairs_BHNCC, v, narrow)
    writes_BHNKV = k.mT.to(narrow) @ (v * to_end_BHNC1).to(narrow)
    entering = []
    for decay_BH11, write_BHKV in zip(whole_BHN11.unbind(2), writes_BHNKV.unbind(2), strict=True):
        entering.append(state_BHKV)
        state_BHKV = decay_BH11 * state_BHKV + write_BHKV
    o = o + _matmul(q, torch.stack(entering, dim=2), narrow) * from_start_BHNC1
    return o.flatten(2, 3)[:, :, :length].transpose(1, 2).to(narrow), state_BHKV


class _Decays:
    """The decays of one gate within blocks that double until they are the chunk, from log_gate (..., C, X).

    `upto` is the sum of the log-gates from a block's start up to a token, `after` from behind it to the block's end.
    """

    def __init__(self, log_gate: Tensor):
        self.length = 1
        self.upto = self.total = log_gate.unsqueeze(-2)  # (..., J, L, X), (..., J, 1, X)
        self.after = torch.zeros_like(self.upto)

    def at_borders(self) -> tuple[Tensor, Tensor]:
        """(..., J/2, L, X) twice: from the border of two blocks to a token of the second, and from one of the first."""
        return self.upto[..., 1::2, :, :].exp(), self.after[..., ::2, :, :].exp()

    def join(self) -> None:
        (upto_1, upto_2), (after_1, after_2), (total_1, total_2) = (
            x.unflatten(-3, (-1, 2)).unbind(-3) for x in (self.upto, self.after, self.total)
        )
        self.upto = torch.cat([upto_1, total_1 + upto_2], dim=-2)
        self.after = torch.cat([after_1 + total_2, after_2], dim=-2)
        self.total = total_1 + total_2
        self.length *= 2

    @property
    def from_start(self) -> Tensor:
        return self.upto.squeeze(-3).exp()

    @property
    def to_end(self) -> Tensor:
        return self.after.squeeze(-3).exp()

    @property
    def whole(self) -> Tensor:
        return self.total.flatten(-3).exp()


def between(x: Tensor) -> Tensor:
    """(..., L, X) -> (..., L, L, X): [t, s] is the sum of x over the places after s up to t, -inf where s > t."""
    places = torch.arange(x.shape[-2], device=x.device)
    t, s = places.view(-1, 1, 1), places.view(1, -1, 1)
    return x.unsqueeze(-2).masked_fill(s >= t, 0.0).cumsum(-3).masked_fill(s > t, float("-inf"))


class SameDocument:
    """Which tokens of a chunk may see which, and which the entering and leaving states."""

    def __init__(self, segments: Segments, chunk: int, pad: int):
        documents = segments.documents_BT
        tail = documents[:, -1:].expand(-1, pad)
        documents_BNC = torch.cat([documents, tail], dim=1).unflatten(1, (-1, chunk))
        last_BN = documents_BNC[:, :, -1]
        before_BN = torch.cat([torch.zeros_like(last_BN[:, :1]), last_BN[:, :-1]], dim=1)
        self.documents_BNC = documents_BNC
        self.as_last_BNC = documents_BNC == last_BN.unsqueeze(-1)
        self.as_before_BNC = documents_BNC == before_BN.unsqueeze(-1)
        self.keeps_BN = before_BN == last_BN

    @property
    def pairs_BNCC(self) -> Tensor:
        return self.documents_BNC.unsqueeze(-1) == self.documents_BNC.unsqueeze(-2)

    def across(self, length: int) -> Tensor:
        """(B, N, J/2, L, L): whether the tokens of two blocks, of the second by of the first, are of one document."""
        first, second = self.documents_BNC.unflatten(-1, (-1, 2, length)).unbind(-2)
        return second.unsqueeze(-1) == first.unsqueeze(-2)


def _halves(x: Tensor, length: int) -> tuple[Tensor, ...]:
    """(..., C, X) -> (..., J/2, L, X) twice: the first and the second of each two blocks."""
    return x.unflatten(-2, (-1, 2, length)).unbind(-3)


def _chunk_length(length: int) -> int:
    """A power of two that holds a short sequence whole."""
    return min(CHUNK, 1 << (length - 1).bit_length())


def _matmul(a: Tensor, b: Tensor, narrow: torch.dtype) -> Tensor:
    """The product of `a` and `b` rounded to `narrow`, in a's dtype."""
    return (a.to(narrow) @ b.to(narrow)).to(a.dtype)
