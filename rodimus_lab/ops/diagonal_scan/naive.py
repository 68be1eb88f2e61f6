"""The diagonal recurrences, step by step: the definitions.

    diagonal_scan     h_t = exp(log_a_t) * h_{t-1} + x_t
    selective_scan    h_t = exp(dt_t A) * h_{t-1} + (dt_t * u_t)^T B_t          y_t = h_t C_t

Shapes: B batch, T time, X any further dimensions; M channels, N state expansion.
"""

from __future__ import annotations

import torch
from torch import Tensor


def naive(x_BTX: Tensor, log_a_BTX: Tensor, state_BX: Tensor) -> tuple[Tensor, Tensor]:
    """In the state's dtype; see `diagonal_scan` for the arguments."""
    # Unbound rather than indexed: the gradient of an index is as large as the whole sequence.
    states = []
    for x_BX, log_a_BX in zip(x_BTX.to(state_BX.dtype).unbind(1), log_a_BTX.unbind(1), strict=True):
        state_BX = log_a_BX.exp() * state_BX + x_BX
        states.append(state_BX)
    return torch.stack(states, dim=1), state_BX


def selective_naive(
    u_BTM: Tensor, dt_BTM: Tensor, A_MN: Tensor, B: Tensor, C: Tensor, state_BMN: Tensor, starts_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """With all states in memory; see `selective_scan` for the arguments. B and C are (B, T, N) or (M, N)."""
    wide, (batch, length, channels) = state_BMN.dtype, u_BTM.shape
    log_a_BTMN = dt_BTM.unsqueeze(-1) * A_MN
    if starts_BT is not None:
        log_a_BTMN = log_a_BTMN.masked_fill(starts_BT[:, :, None, None], float("-inf"))
    B_BTMN, C_BTMN = (z.to(wide).unsqueeze(0 if z.ndim == 2 else 2).expand(batch, length, channels, -1) for z in (B, C))
    written_BTMN = ((dt_BTM * u_BTM)[..., None, None] @ B_BTMN.unsqueeze(-2)).squeeze(-2)
    h_BTMN, state_BMN = naive(written_BTMN, log_a_BTMN, state_BMN)
    return (h_BTMN.unsqueeze(-2) @ C_BTMN.unsqueeze(-1))[..., 0, 0], state_BMN
