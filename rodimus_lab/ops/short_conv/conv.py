"""Causal depthwise convolution over time, with its last inputs as state.

    y_t = bias + sum_j weight[:, W-1-j] * x_{t-j}, j = 0 .. W-1

Shapes: B batch, T time, D channels, W kernel width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rodimus_lab.ops.backend import Backend, choose, declare
from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.sequence import halo


def short_conv(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None = None,
    *,
    state_BWD: Tensor | None = None,
    segments: Segments | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Convolve within each document; `state_BWD` holds the last W-1 inputs, oldest first (zeros at the start).

    Returns y_BTD and the state after the last token. Padding reads as nothing, wherever it stands; its own outputs are
    arbitrary.
    """
    width = weight_DW.shape[1]
    state_BWD = halo("the short convolution", x_BTD, width - 1, state_BWD, segments)
    weight_DW = weight_DW.to(x_BTD.dtype)
    if bias_D is not None:
        bias_D = bias_D.to(x_BTD.dtype)
    if state_BWD is None:
        state_BWD = x_BTD.new_zeros(x_BTD.shape[0], width - 1, x_BTD.shape[2])
    history = torch.cat([state_BWD.to(x_BTD.dtype), x_BTD], dim=1)
    documents = None
    if segments is not None:
        history, documents = _close_gap(history, segments, width - 1)
    facts = {"device": x_BTD.device.type, "packed": documents is not None}
    y_BTD = choose("short_conv", backend, facts).run(history, weight_DW, bias_D, documents)
    new_state = history[:, x_BTD.shape[1] :]
    if documents is not None:
        new_state = new_state * (documents[:, x_BTD.shape[1] :] == documents[:, -1:]).unsqueeze(-1)
    return y_BTD, new_state


def _close_gap(history: Tensor, segments: Segments, kept: int) -> tuple[Tensor, Tensor]:
    """Move the state next to the first token of each row, over the left padding; with it, each input's document."""
    padding_B1 = (~segments.valid_BT).sum(1, keepdim=True)
    index = torch.arange(history.shape[1], device=history.device).expand(history.shape[:2])
    source = torch.where(index < kept + padding_B1, index - padding_B1, index)
    moved = history.gather(1, source.clamp(min=0).unsqueeze(-1).expand_as(history))
    moved = moved * (source >= 0).unsqueeze(-1)
    return moved, F.pad(segments.documents_BT, (kept, 0))


def _taps(history: Tensor, weight_DW: Tensor, bias_D: Tensor | None, documents: Tensor | None) -> Tensor:
    """The definition: one shifted product a tap; a compiler fuses them into one pass."""
    width = weight_DW.shape[1]
    length = history.shape[1] - (width - 1)
    y_BTD = history.new_zeros(()) if bias_D is None else bias_D
    for tap in range(width):
        term = history[:, tap : tap + length] * weight_DW[:, tap]
        if documents is not None and tap < width - 1:
            term = term * (documents[:, tap : tap + length] == documents[:, -length:]).unsqueeze(-1)
        y_BTD = y_BTD + term
    return y_BTD


def _conv1d(history: Tensor, weight_DW: Tensor, bias_D: Tensor | None, documents: None) -> Tensor:
    return F.conv1d(history.mT, weight_DW.unsqueeze(1), bias_D, groups=weight_DW.shape[0]).mT


def _conv1d_why_not(packed: bool, **_: Any) -> str | None:
    return "it would mix packed documents" if packed else None


declare(
    "short_conv",
    Backend("taps", _taps),
    Backend("conv1d", _conv1d, _conv1d_why_not),
    example={"packed": False},
)
