"""The gated linear recurrence in chunks, in plain torch (Eq. 15 to 19 of the paper, made safe).

Eq. 17 divides by cumulated gates, which overflows as soon as they are small. Here no exponent is ever positive: a chunk
of C tokens is cut into sub-chunks of c. Between two sub-chunks the decay from token s to token t factors at the start
of t's sub-chunk into two factors <= 1, so those scores are matrix products; inside a sub-chunk the c x c x K decays
are formed directly. The same split serves the value gate beta. All decays come from sums of log-gates over the steps
in question, never from differences of long sums, so precision does not depend on how far a chunk decays.

With one gate a head and token (RetNet, Mamba2) a score is q k^T times the decay between its two tokens: one C x C
matrix of decays a head and chunk, and nothing as wide as K.

Shapes: B batch, T time, H heads, K key width, V value width, N chunks, C chunk length, M sub-chunks in a chunk, c
sub-chunk length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rodimus_lab.ops.segments import Segments

CHUNK = 64
SUB_CHUNK = 16


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
    batch, length, heads, _ = q_BTHK.shape
    if log_beta_BTHV is None and log_alpha_BTHK.stride(-1) == 0:
        return _one_gate(q_BTHK, k_BTHK, v_BTHV, log_alpha_BTHK[..., :1], scale, state_BHKV, segments)
    sub = SUB_CHUNK
    chunk = min(CHUNK, -(-length // sub) * sub)
    pad = -length % chunk

    def to_chunks(x: Tensor, dtype: torch.dtype) -> Tensor:  # (B, T, H, X) -> (B, H, N, C, X)
        x = F.pad(x.to(dtype).transpose(1, 2), (0, 0, 0, pad))
        return x.reshape(batch, heads, -1, chunk, x.shape[-1])

    q, k = to_chunks(q_BTHK * scale, wide), to_chunks(k_BTHK, wide)
    v = to_chunks(v_BTHV, narrow if log_beta_BTHV is None else wide)
    alpha = _Decay(to_chunks(log_alpha_BTHK, wide), sub)
    beta = None if log_beta_BTHV is None else _Decay(to_chunks(log_beta_BTHV, wide), sub)
    same = None if segments is None else SameDocument(segments, chunk, pad)

    # Within the chunk.
    before_BHNMCK = k.unsqueeze(3) * alpha.to_sub_chunk_start
    across_BHNMcC = _matmul(_split(q, sub) * alpha.within_sub_chunk, before_BHNMCK.mT, narrow)
    near_BHNMcc = (_split(q, sub).unsqueeze(-2) * _split(k, sub).unsqueeze(-3) * alpha.pairs).sum(-1)
    subs = chunk // sub
    if same is not None:
        across_BHNMcC = across_BHNMcC * same.pairs_BNCC.reshape(batch, 1, -1, subs, sub, chunk)
        diagonal = same.pairs_BNCC.reshape(batch, -1, subs, sub, subs, sub).diagonal(dim1=2, dim2=4)
        near_BHNMcc = near_BHNMcc * diagonal.permute(0, 1, 4, 2, 3).unsqueeze(1)
    if beta is None:
        eye = torch.eye(subs, dtype=wide, device=q.device)
        near = near_BHNMcc.unsqueeze(-2) * eye.view(subs, 1, subs, 1)
        scores = across_BHNMcC.unflatten(-1, (subs, sub)) + near
        o = _matmul(scores.reshape(*q.shape[:3], chunk, chunk), v, narrow)
    else:
        o = beta.within_sub_chunk * (across_BHNMcC @ (v.unsqueeze(3) * beta.to_sub_chunk_start))
        o = o + (near_BHNMcc.unsqueeze(-1) * _split(v, sub).unsqueeze(-3) * beta.pairs).sum(-2)
        o = o.reshape(v.shape)

    # From chunk to chunk.
    keys = k * alpha.to_chunk_end
    values = v if beta is None else v * beta.to_chunk_end
    if same is not None:
        keys = keys * same.as_last_BNC[:, None, :, :, None]
    writes_BHNKV = _matmul(keys.mT, values, narrow)
    decay_BHNKV = alpha.whole_chunk.unsqueeze(-1)
    if beta is not None:
        decay_BHNKV = decay_BHNKV * beta.whole_chunk.unsqueeze(-2)
    if same is not None:
        decay_BHNKV = decay_BHNKV * same.keeps_BN[:, None, :, None, None]
    entering = []
    for decay_BHKV, write_BHKV in zip(decay_BHNKV.unbind(2), writes_BHNKV.unbind(2), strict=True):
        entering.append(state_BHKV)
        state_BHKV = decay_BHKV * state_BHKV + write_BHKV
    from_before = _matmul(q * alpha.from_chunk_start, torch.stack(entering, dim=2), narrow)
    if beta is not None:
        from_before = from_before * beta.from_chunk_start
    if same is not None:
        from_before = from_before * same.as_before_BNC[:, None, :, :, None]
    o = (o + from_before).reshape(batch, heads, -1, v.shape[-1])[:, :, :length]
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
    chunk = min(CHUNK, -(-length // SUB_CHUNK) * SUB_CHUNK)
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


class _Decay:
    """Every decay that a chunk needs of one gate, from log_gate (..., N, C, X)."""

    def __init__(self, log_gate: Tensor, sub: int):
        step = _split(log_gate, sub)  # (..., M, c, X)
        total, upto = step.sum(-2), step.cumsum(-2)
        after = F.pad(step.flip(-2).cumsum(-2).flip(-2)[..., 1:, :], (0, 0, 0, 1))
        earlier = F.pad(total.cumsum(-2)[..., :-1, :], (0, 0, 1, 0))
        to_end = after.unsqueeze(-4) + between(total).unsqueeze(-2)  # [i, j]: from a token of j to the end of i
        to_start = F.pad(to_end[..., :-1, :, :, :], (0, 0, 0, 0, 0, 0, 1, 0), value=float("-inf"))

        self.pairs = between(step).exp()
        self.within_sub_chunk = upto.exp()
        self.to_sub_chunk_start = to_start.flatten(-3, -2).exp()
        self.from_chunk_start = (upto + earlier.unsqueeze(-2)).flatten(-3, -2).exp()
        self.to_chunk_end = to_end[..., -1, :, :, :].flatten(-3, -2).exp()
        self.whole_chunk = total.sum(-2).exp()


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
        self.pairs_BNCC = documents_BNC.unsqueeze(-1) == documents_BNC.unsqueeze(-2)
        self.as_last_BNC = documents_BNC == last_BN.unsqueeze(-1)
        self.as_before_BNC = documents_BNC == before_BN.unsqueeze(-1)
        self.keeps_BN = before_BN == last_BN


def _split(x: Tensor, sub: int) -> Tensor:
    """(..., C, X) -> (..., M, c, X)"""
    return x.unflatten(-2, (-1, sub))


def _matmul(a: Tensor, b: Tensor, narrow: torch.dtype) -> Tensor:
    """The product of `a` and `b` rounded to `narrow`, in a's dtype."""
    return (a.to(narrow) @ b.to(narrow)).to(a.dtype)
