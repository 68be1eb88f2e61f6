"""FlexAttention, which skips the blocks outside the window. Importing this loads torch's compiler.

Shapes: B batch, H heads, T time, K key width, V value width.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from rodimus_lab.ops.tracing import untraced


@untraced  # it is compiled by itself; traced from outside, its block mask would be built at every call
def windowed(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, scale: float, window: int | None) -> Tensor:
    """o_BHTV; token t sees the `window` last tokens up to itself (None: all of them)."""
    blocks = _window_blocks(q_BHTK.shape[2], window, q_BHTK.device)
    return _compiled()(q_BHTK, k_BHTK, v_BHTV, block_mask=blocks, scale=scale)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


@cache
def _window_blocks(length: int, window: int | None, device: torch.device) -> Any:
    def seen(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (s <= t) if window is None else (s <= t) & (t - s < window)

    return create_block_mask(seen, None, None, length, length, device=str(device))
