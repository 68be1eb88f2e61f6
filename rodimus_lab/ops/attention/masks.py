"""Who may look at whom: causal, windowed, within a document, into a cache; sinks are seen from beyond the window.

Shapes: B batch, T queries, S cache slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rodimus_lab.ops.attention.cache import KVCache
from rodimus_lab.ops.segments import Segments


def new_token_mask(
    length: int,
    window: int | None,
    segments: Segments | None,
    device: torch.device,
    is_sink_BT: Tensor | None = None,
) -> Tensor:
    """mask_BTT (B = 1 without segments): token t sees the `window` last tokens up to itself and the sinks before them,
    in its own document.

    Padding sees itself, so that no row is empty, and is seen by nothing else.
    """
    t, s = torch.arange(length, device=device).unsqueeze(1), torch.arange(length, device=device)
    mask = (s <= t).unsqueeze(0)
    if window is not None:
        near = t - s < window
        mask = mask & (near if is_sink_BT is None else near | is_sink_BT.unsqueeze(1))
    if segments is not None:
        ids = segments.ids_BT
        same = (ids.unsqueeze(2) == ids.unsqueeze(1)) & (ids >= 0).unsqueeze(1)
        mask = mask & (same | (s == t))
    return mask


def cached_token_mask(
    length: int, cache: KVCache, window: int | None, segments: Segments | None, sinks: int = 0
) -> Tensor:
    """mask_BTS: which cached tokens each new token sees. Only document 0 continues the cached one."""
    slots_B1S = cache.positions_beside(sinks).unsqueeze(1)
    if segments is None:
        query_BT = cache.length_B.unsqueeze(1) + torch.arange(length, device=slots_B1S.device)
        mask = (slots_B1S >= 0).expand(-1, length, -1)
    else:
        query_BT = segments.positions_BT(cache.length_B)
        mask = (slots_B1S >= 0) & (segments.ids_BT == 0).unsqueeze(2)
    return mask if window is None else mask & ((query_BT.unsqueeze(2) - slots_B1S < window) | (slots_B1S < sinks))
