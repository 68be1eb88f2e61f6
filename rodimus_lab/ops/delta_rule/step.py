"""One decoding step of the delta rule: elementwise, so that a compiler makes it two passes over the state.

Shapes: B batch, H heads, K key width, V value width; T = 1.
"""

from __future__ import annotations

from torch import Tensor

from rodimus_lab.ops.delta_rule.naive import Transition
from rodimus_lab.ops.segments import Segments


def one_step(
    q_BTHK: Tensor,
    v_BTHV: Tensor,
    transition: Transition,
    scale: float,
    state_BHKV: Tensor,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """In the state's dtype; see `delta_rule` for the arguments."""
    wide = state_BHKV.dtype
    *log_alpha_k_b, a_BTHK = transition.terms()
    q_BHK1, log_alpha_BHK1, k_BHK1, b_BHK1 = (
        x.squeeze(1).to(wide).unsqueeze(-1) for x in (q_BTHK * scale, *log_alpha_k_b)
    )
    v_BH1V = v_BTHV.squeeze(1).to(wide).unsqueeze(-2)
    if segments is not None:
        state_BHKV = state_BHKV.masked_fill((segments.documents_BT > 0)[:, :, None, None], 0.0)
    held_BH1V = (b_BHK1 * state_BHKV).sum(-2, keepdim=True)
    kept_BHKV = log_alpha_BHK1.exp() * state_BHKV
    if a_BTHK is None:
        state_BHKV = kept_BHKV + k_BHK1 * (v_BH1V - held_BH1V)
    else:
        state_BHKV = kept_BHKV + a_BTHK.squeeze(1).unsqueeze(-1) * held_BH1V + k_BHK1 * v_BH1V
    o_BHV = (q_BHK1 * state_BHKV).sum(-2)
    return o_BHV.unsqueeze(1).to(v_BTHV.dtype), state_BHKV
