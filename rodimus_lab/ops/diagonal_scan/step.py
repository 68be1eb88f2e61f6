"""One decoding step of the diagonal recurrences: elementwise, so that a compiler makes it one pass over the state.

Shapes: B batch, X any further dimensions; M channels, N state expansion; T = 1.
"""

from __future__ import annotations

from torch import Tensor


def one_step(x_BTX: Tensor, log_a_BTX: Tensor, state_BX: Tensor) -> tuple[Tensor, Tensor]:
    """In the state's dtype; see `diagonal_scan` for the arguments."""
    state_BX = log_a_BTX.squeeze(1).exp() * state_BX + x_BTX.squeeze(1)
    return state_BX.unsqueeze(1), state_BX


def selective_step(
    u_BTM: Tensor, dt_BTM: Tensor, A_MN: Tensor, B: Tensor, C: Tensor, state_BMN: Tensor, starts_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """In the state's dtype; see `selective_scan` for the arguments. B and C are (B, T, N) or (M, N)."""
    dt_BM1, u_BM1 = dt_BTM.squeeze(1).unsqueeze(-1), u_BTM.squeeze(1).unsqueeze(-1)
    kept_BMN = (dt_BM1 * A_MN).exp() * state_BMN
    if starts_BT is not None:
        kept_BMN = kept_BMN.masked_fill(starts_BT[:, :, None], 0.0)
    # (B, 1, N) and (M, N) both broadcast to (B, M, N).
    state_BMN = kept_BMN + dt_BM1 * u_BM1 * B
    return (state_BMN * C).sum(-1).unsqueeze(1), state_BMN
