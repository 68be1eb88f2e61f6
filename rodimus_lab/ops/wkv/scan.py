"""RWKV-4's weighted means in plain torch, by a scan of both sums (`diagonal_scan`).

The sums are kept as multiples of exp(p_t), where p_t = max(p_{t-1} + log_w, k_t) is the largest exponent that they
hold: the decay from t-1 to t is then exp(p_{t-1} + log_w - p_t) <= 1, the new term is exp(k_t - p_t) <= 1, and the
denominator is at least 1. The result does not depend on p, which therefore needs no gradient.

Shapes: B batch, T time, D channels; 2: numerator, denominator.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rodimus_lab.ops.diagonal_scan import diagonal_scan, starts_BT
from rodimus_lab.ops.segments import Segments


def scan(
    k_BTD: Tensor,
    v_BTD: Tensor,
    log_w_D: Tensor,
    bonus_D: Tensor,
    sums_BD2: Tensor | None,
    top_BD: Tensor | None,
    segments: Segments | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """wkv_BTD, the sums after the last token over exp(p), and that p, in at least float32; see `wkv`."""
    wide = torch.promote_types(v_BTD.dtype, torch.float32)
    k_BTD, v_BTD, log_w_D, bonus_D = (x.to(wide) for x in (k_BTD, v_BTD, log_w_D, bonus_D))
    if sums_BD2 is None or top_BD is None:
        top_BD = torch.zeros_like(k_BTD[:, 0])
        sums_BD2 = torch.stack([top_BD, top_BD], dim=-1)
    log_w_BTD = log_w_D.expand_as(k_BTD)
    seen_k_BTD = k_BTD
    if segments is not None:
        padding_BT1 = ~segments.valid_BT.unsqueeze(-1)
        seen_k_BTD = k_BTD.masked_fill(padding_BT1, -math.inf)
        log_w_BTD = log_w_BTD.masked_fill(padding_BT1, 0.0)
    with torch.no_grad():
        top_BD = top_BD.masked_fill(sums_BD2[..., 1] == 0, -math.inf)
        before_BTD, after_BTD = running_top(seen_k_BTD, log_w_BTD, top_BD, segments)
        after_BTD = after_BTD.masked_fill(after_BTD == -math.inf, 0.0)  # nothing seen yet: any p will do
    new_BTD2 = (seen_k_BTD - after_BTD).exp().unsqueeze(-1) * torch.stack([v_BTD, torch.ones_like(v_BTD)], dim=-1)
    log_a_BTD1 = (before_BTD + log_w_BTD - after_BTD).unsqueeze(-1)
    h_BTD2, last_BD2 = diagonal_scan(new_BTD2, log_a_BTD1, state_BX=sums_BD2, segments=segments)
    past_BTD2 = torch.cat([sums_BD2.unsqueeze(1), h_BTD2[:, :-1]], dim=1)
    if segments is not None:  # Padding gives 0; the token after it continues the state.
        after_padding_BT = F.pad(~segments.valid_BT[:, :-1], (1, 0))[:, :, None, None]
        past_BTD2 = torch.where(after_padding_BT, sums_BD2.unsqueeze(1), past_BTD2)
    own_BTD = k_BTD + bonus_D
    with torch.no_grad():
        most_BTD = torch.maximum(before_BTD, own_BTD)
    past_weight_BTD, own_weight_BTD = (before_BTD - most_BTD).exp(), (own_BTD - most_BTD).exp()
    numerator_BTD = past_weight_BTD * past_BTD2[..., 0] + own_weight_BTD * v_BTD
    denominator_BTD = past_weight_BTD * past_BTD2[..., 1] + own_weight_BTD
    return numerator_BTD / denominator_BTD, last_BD2, after_BTD[:, -1].clone()


def running_top(k_BTD: Tensor, log_w_BTD: Tensor, top_BD: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
    """p_{t-1} and p_t of p_t = max(p_{t-1} + log_w_t, k_t), from p_0 = top and in each later document from -inf.

    In log2(T) steps: after each, a p knows of twice as many tokens.
    """
    if segments is not None:
        log_w_BTD = log_w_BTD.masked_fill(starts_BT(segments).unsqueeze(-1), -math.inf)
    p = torch.cat([top_BD.unsqueeze(1), k_BTD], dim=1)
    decay = torch.cat([torch.full_like(top_BD, -math.inf).unsqueeze(1), log_w_BTD], dim=1)
    reach = 1
    while reach < p.shape[1]:
        p = torch.cat([p[:, :reach], torch.maximum(p[:, reach:], p[:, :-reach] + decay[:, reach:])], dim=1)
        decay = torch.cat([decay[:, :reach], decay[:, reach:] + decay[:, :-reach]], dim=1)
        reach *= 2
    before = p[:, :-1]
    if segments is not None:
        before = before.masked_fill(starts_BT(segments).unsqueeze(-1), -math.inf)
    return before, p[:, 1:]
