"""The last inputs of a convolution as its state.

Shapes: B batch, T time, D channels, W inputs that are kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rodimus_lab.ops.segments import Segments


def last_inputs(x_BTD: Tensor, kept: int, state_BWD: Tensor | None, ids_BT: Tensor | None) -> Tensor:
    """The last `kept` inputs of the last token's document, from the state where there are fewer."""
    start = max(0, x_BTD.shape[1] - kept)
    last = x_BTD[:, start:]
    if ids_BT is not None:
        own = (ids_BT[:, start:] == ids_BT[:, -1:]) & (ids_BT[:, start:] >= 0)
        last = last * own.unsqueeze(-1)
    if last.shape[1] < kept:
        if state_BWD is None:
            state_BWD = x_BTD.new_zeros(x_BTD.shape[0], kept, x_BTD.shape[2])
        last = torch.cat([state_BWD[:, last.shape[1] :].to(x_BTD.dtype), last], dim=1)
    elif state_BWD is not None:
        last = last.clone()  # A view would keep all of x in memory as long as the state.
    return last


def history_of(
    x_BTD: Tensor, kept: int, state_BWD: Tensor | None, segments: Segments | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The last `kept` inputs before x and x, each one's document, and the state after the last."""
    length, continued = x_BTD.shape[1], state_BWD is not None
    if state_BWD is None:
        state_BWD = x_BTD.new_zeros(x_BTD.shape[0], kept, x_BTD.shape[2])
    history, documents = torch.cat([state_BWD.to(x_BTD.dtype), x_BTD], dim=1), None
    if segments is not None:
        history, documents = _close_gap(history, segments, kept)
    new_state = history[:, length:]
    if documents is not None:
        new_state = new_state * (documents[:, length:] == documents[:, -1:]).unsqueeze(-1)
    elif continued and length > kept:
        new_state = new_state.clone()  # A view would keep the whole history in memory as long as the state.
    return history, documents, new_state


def _close_gap(history: Tensor, segments: Segments, kept: int) -> tuple[Tensor, Tensor]:
    """Move the state next to the first token of each row, over the left padding; with it, each input's document."""
    padding_B1 = (~segments.valid_BT).sum(1, keepdim=True)
    index = torch.arange(history.shape[1], device=history.device).expand(history.shape[:2])
    source = torch.where(index < kept + padding_B1, index - padding_B1, index)
    moved = history.gather(1, source.clamp(min=0).unsqueeze(-1).expand_as(history))
    moved = moved * (source >= 0).unsqueeze(-1)
    return moved, F.pad(segments.documents_BT, (kept, 0))
