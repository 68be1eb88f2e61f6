"""The delta rule with decay, step by step: the definition.

    S_t = (Diag(alpha_t) + a_t^T b_t) S_{t-1} + k_t^T v_t          o_t = scale * q_t S_t

with row vectors: b_t S_{t-1} is what the memory holds for b_t, and a_t where that is written. The delta rule proper
(Yang et al., 2024 and 2025) decays, then replaces a share beta_t of what the memory holds for a key by the value:

    S_t = (I - beta_t k_t^T k_t) Diag(alpha_t) S_{t-1} + beta_t k_t^T v_t

Shapes: B batch, T time, H heads, K key width, V value width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rodimus_lab.ops.segments import Segments


class Transition(NamedTuple):
    """How one state follows from the last: the delta rule proper with `beta_BTH`, else the form with `a_BTHK` and
    `b_BTHK`. `log_alpha_BTHK` has one value of K or 1 and the dtype of the state."""

    log_alpha_BTHK: Tensor
    k_BTHK: Tensor
    beta_BTH: Tensor | None
    a_BTHK: Tensor | None
    b_BTHK: Tensor | None

    def terms(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """log_alpha, k, b and a in log_alpha's dtype. No a is -k: what is held for b and the value then share one
        write, k_t^T (v_t - b_t S_{t-1}). The delta rule is of that kind, with beta k for k and alpha k for b."""
        log_alpha, wide = self.log_alpha_BTHK, self.log_alpha_BTHK.dtype
        k = self.k_BTHK.to(wide)
        if self.beta_BTH is not None:
            return log_alpha, self.beta_BTH.to(wide).unsqueeze(-1) * k, log_alpha.exp() * k, None
        assert self.a_BTHK is not None
        assert self.b_BTHK is not None
        return log_alpha, k, self.b_BTHK.to(wide), self.a_BTHK.to(wide)


def naive(
    q_BTHK: Tensor,
    v_BTHV: Tensor,
    transition: Transition,
    scale: float,
    state_BHKV: Tensor,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """O(T) matrix-vector steps in the state's dtype; see `delta_rule` for the arguments."""
    wide = state_BHKV.dtype
    fresh_BT = None
    if segments is not None:
        documents_BT = segments.documents_BT
        before_BT = torch.cat([torch.zeros_like(documents_BT[:, :1]), documents_BT[:, :-1]], dim=1)
        fresh_BT = documents_BT != before_BT
    # Unbound rather than indexed: the gradient of an index is as large as the whole sequence.
    *log_alpha_k_b, a_BTHK = transition.terms()
    q, v, log_alpha, k, b = (x.to(wide).unbind(1) for x in (q_BTHK, v_BTHV, *log_alpha_k_b))
    a = None if a_BTHK is None else a_BTHK.unbind(1)
    outputs = []
    for t in range(len(q)):
        if fresh_BT is not None:
            state_BHKV = state_BHKV.masked_fill(fresh_BT[:, t, None, None, None], 0.0)
        held_BH1V = b[t].unsqueeze(-2) @ state_BHKV
        state_BHKV = log_alpha[t].exp().unsqueeze(-1) * state_BHKV
        if a is None:
            state_BHKV = state_BHKV + k[t].unsqueeze(-1) @ (v[t].unsqueeze(-2) - held_BH1V)
        else:
            state_BHKV = state_BHKV + a[t].unsqueeze(-1) @ held_BH1V + k[t].unsqueeze(-1) @ v[t].unsqueeze(-2)
        outputs.append(((scale * q[t]).unsqueeze(-2) @ state_BHKV).squeeze(-2))
    return torch.stack(outputs, dim=1).to(v_BTHV.dtype), state_BHKV
