"""One decoding step of the gated linear recurrence: elementwise, so that a compiler makes it one pass over the state.

Shapes: B batch, H heads, K key width, V value width; T = 1.
"""

from __future__ import annotations

from torch import Tensor

from rodimus_lab.ops.segments import Segments


def one_step(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_alpha_BTHK: Tensor,
    log_beta_BTHV: Tensor | None,
    scale: float,
    state_BHKV: Tensor,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """In the state's dtype; see `gated_linear` for the arguments."""
    wide = state_BHKV.dtype
    q_BHK1, k_BHK1 = (x.squeeze(1).to(wide).unsqueeze(-1) for x in (q_BTHK * scale, k_BTHK))
    v_BH1V = v_BTHV.squeeze(1).to(wide).unsqueeze(-2)
    kept = log_alpha_BTHK.squeeze(1).to(wide).exp().unsqueeze(-1) * state_BHKV
    if log_beta_BTHV is not None:
        kept = log_beta_BTHV.squeeze(1).to(wide).exp().unsqueeze(-2) * kept
    if segments is not None:
        kept = kept.masked_fill((segments.documents_BT > 0)[:, :, None, None], 0.0)
    state_BHKV = kept + k_BHK1 * v_BH1V
    o_BHV = (q_BHK1 * state_BHKV).sum(-2)
    return o_BHV.unsqueeze(1).to(v_BTHV.dtype), state_BHKV
