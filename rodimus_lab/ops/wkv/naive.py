"""RWKV-4's weighted means, token by token: the definition, with both sums as multiples of exp(top).

Shapes: B batch, T time, D channels; 2: numerator, denominator.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rodimus_lab.ops.diagonal_scan import starts_BT
from rodimus_lab.ops.segments import Segments


def naive(
    k_BTD: Tensor,
    v_BTD: Tensor,
    log_w_D: Tensor,
    bonus_D: Tensor,
    sums_BD2: Tensor | None,
    top_BD: Tensor | None,
    segments: Segments | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """In at least float32; see `wkv` for the arguments."""
    wide = torch.promote_types(v_BTD.dtype, torch.float32)
    k_BTD, v_BTD, log_w_D, bonus_D = (x.to(wide) for x in (k_BTD, v_BTD, log_w_D, bonus_D))
    if sums_BD2 is None or top_BD is None:
        top_BD = torch.zeros_like(k_BTD[:, 0])
        sums_BD2 = torch.stack([top_BD, top_BD], dim=-1)
    starts = valid = None
    if segments is not None:
        starts, valid = starts_BT(segments), segments.valid_BT
    outputs = []
    for t, (k, v) in enumerate(zip(k_BTD.unbind(1), v_BTD.unbind(1), strict=True)):
        if starts is not None:
            sums_BD2 = sums_BD2.masked_fill(starts[:, t, None, None], 0.0)
        seen = torch.where(sums_BD2[..., 1] > 0, top_BD, -math.inf)  # Without a sum, exp(top) is of no meaning.
        value = torch.stack([v, torch.ones_like(v)], dim=-1)
        numerator, denominator = _joined(sums_BD2, seen, value, k + bonus_D)[0].unbind(-1)
        outputs.append(numerator / denominator)
        new_sums, new_top = _joined(sums_BD2, seen + log_w_D, value, k)
        if valid is not None:
            new_sums = torch.where(valid[:, t, None, None], new_sums, sums_BD2)
            new_top = torch.where(valid[:, t, None], new_top, top_BD)
        sums_BD2, top_BD = new_sums, new_top
    return torch.stack(outputs, dim=1), sums_BD2, top_BD


def _joined(sums: Tensor, exponent: Tensor, value: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """exp(exponent) sums + exp(own) value over exp(top), and top, the larger exponent, which needs no gradient."""
    top = torch.maximum(exponent, own).detach()
    return (exponent - top).exp().unsqueeze(-1) * sums + (own - top).exp().unsqueeze(-1) * value, top
