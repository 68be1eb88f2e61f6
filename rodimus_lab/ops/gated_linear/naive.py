"""The gated linear recurrence, step by step: the definition (Eq. 7 and 14 of the paper).

    S_t = (alpha_t^T beta_t) * S_{t-1} + k_t^T v_t          o_t = scale * q_t S_t

Shapes: B batch, T time, H heads, K key width (the paper's n), V value width (the paper's m per head).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rodimus_lab.ops.segments import Segments


def naive(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_alpha_BTHK: Tensor,
    log_beta_BTHV: Tensor | None,
    scale: float,
    state_BHKV: Tensor,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """O(T) matrix-vector steps in the state's dtype; see `gated_linear` for the arguments."""
    wide = state_BHKV.dtype
    fresh_BT = None
    if segments is not None:
        documents_BT = segments.documents_BT
        before_BT = torch.cat([torch.zeros_like(documents_BT[:, :1]), documents_BT[:, :-1]], dim=1)
        fresh_BT = documents_BT != before_BT
    # Unbound rather than indexed: the gradient of an index is as large as the whole sequence.
    q, k, v, log_alpha = (x.to(wide).unbind(1) for x in (q_BTHK, k_BTHK, v_BTHV, log_alpha_BTHK))
    log_beta = None if log_beta_BTHV is None else log_beta_BTHV.to(wide).unbind(1)
    outputs = []
    for t in range(len(q)):
        decay_BHKV = log_alpha[t].exp().unsqueeze(-1)
        if log_beta is not None:
            decay_BHKV = decay_BHKV * log_beta[t].exp().unsqueeze(-2)
        if fresh_BT is not None:
            decay_BHKV = decay_BHKV.masked_fill(fresh_BT[:, t, None, None, None], 0.0)
        state_BHKV = decay_BHKV * state_BHKV + k[t].unsqueeze(-1) @ v[t].unsqueeze(-2)
        outputs.append(((scale * q[t]).unsqueeze(-2) @ state_BHKV).squeeze(-2))
    return torch.stack(outputs, dim=1).to(v_BTHV.dtype), state_BHKV
