"""Softmax attention: full or sliding window, any sharing of key and value heads (Eq. 1, Eq. 12, Figure 3).

Query head h reads key head h // (H/G) and value head h // (H/J): MHA is G = J = H, MQA G = J = 1, GQA G = J between,
and the paper's SKA G = 1, J = H.

Shapes: B batch, T time, H query heads, G key heads, J value heads, K key width, V value width, S keys in reach.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rodimus_lab.ops.attention.cache import KVCache
from rodimus_lab.ops.attention.masks import cached_token_mask, new_token_mask
from rodimus_lab.ops.backend import Backend, choose, declare
from rodimus_lab.ops.installed import installed
from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.sequence import SequenceShard, refuse_state, sequence_shard, sharded_sequence, tail_before

FLEX_BLOCK = 128


def attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTJV: Tensor,
    *,
    window: int | None = None,
    sinks: int = 0,
    sink_q_BTHK: Tensor | None = None,
    scale: float | None = None,
    cache: KVCache | None = None,
    segments: Segments | None = None,
    backend: str = "auto",
) -> tuple[Tensor, KVCache | None]:
    """softmax(scale * Q K^T + mask) V; token t sees the last `window` tokens up to itself (None: all of them), and the
    first `sinks` tokens of its document, these by the queries `sink_q_BTHK` where they are given.

    `scale` defaults to 1/sqrt(K). With a cache in, the tokens continue what it holds and the updated cache comes out.
    Padding tokens give arbitrary finite values. Raises `UserError` for a backend that cannot run.
    """
    if (shard := sequence_shard()) is not None:
        refuse_state("attention", cache, segments, sinks or None)
        return _across_ranks(shard, q_BTHK, k_BTGK, v_BTJV, window, scale, backend), None
    length = q_BTHK.shape[1]
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    mask: Tensor | None
    new_cache = None if cache is None else cache.append(k_BTGK, v_BTJV, segments, window, sinks)
    is_sink_BS = _are_sinks(k_BTGK, sinks, cache, segments) if sinks else None
    if cache is None:
        plain = segments is None and (window is None or window >= length)
        mask = None if plain else new_token_mask(length, window, segments, q_BTHK.device, is_sink_BS)
    elif length == 1 and segments is None and new_cache is not None:
        # A decoding step looks at the ring after its own token has taken the place of the one that left the window.
        k_BTGK, v_BTJV = new_cache.k_BSGK.to(q_BTHK.dtype), new_cache.v_BSJV.to(q_BTHK.dtype)
        positions_BS = new_cache.positions_beside(sinks)
        mask = (positions_BS >= 0).unsqueeze(1)
        is_sink_BS = positions_BS < sinks if sinks else None
    else:
        new = new_token_mask(length, window, segments, q_BTHK.device, is_sink_BS)
        old = cached_token_mask(length, cache, window, segments, sinks)
        mask = torch.cat([old, new.expand(old.shape[0], -1, -1)], dim=2)
        k_BTGK = torch.cat([cache.k_BSGK.to(k_BTGK.dtype), k_BTGK], dim=1)
        v_BTJV = torch.cat([cache.v_BSJV.to(v_BTJV.dtype), v_BTJV], dim=1)
        if is_sink_BS is not None:
            is_sink_BS = torch.cat([cache.positions_beside(sinks) < sinks, is_sink_BS], dim=1)
    if is_sink_BS is not None and sink_q_BTHK is not None:
        # Heads twice as wide, of which a key fills the half that its query stands in.
        others, own = (k_BTGK.masked_fill(which[:, :, None, None], 0.0) for which in (is_sink_BS, ~is_sink_BS))
        q_BTHK, k_BTGK = torch.cat([q_BTHK, sink_q_BTHK], dim=-1), torch.cat([others, own], dim=-1)
    facts = {
        "device": q_BTHK.device.type,
        "dtype": q_BTHK.dtype,
        "cached": cache is not None,
        "packed": segments is not None,
        "length": length,
        "window": window,
        "sinks": sinks > 0,
        "grad": torch.is_grad_enabled(),
        "widths": (q_BTHK.shape[-1], v_BTJV.shape[-1]),
    }
    run = choose("attention", backend, facts).run
    return run(q_BTHK, k_BTGK, v_BTJV, mask, scale, window), new_cache


def _across_ranks(
    shard: SequenceShard, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None, backend: str
) -> Tensor:
    """Over the keys of this rank and of those before it, as far as they are in reach.

    Queries of zeros stand before this rank's own, so that any backend's causal mask fits; their outputs are dropped.
    """
    reach = shard.size * k.shape[1] if window is None else window - 1
    if k.shape[1] % FLEX_BLOCK == 0:
        reach += -reach % FLEX_BLOCK  # The mask hides what is beyond the window.
    k, v = (torch.cat([tail_before(shard, x, reach), x], dim=1) for x in (k, v))
    before = k.shape[1] - q.shape[1]
    q = torch.cat([q.new_zeros(q.shape[0], before, *q.shape[2:]), q], dim=1)
    with sharded_sequence(None):
        return attention(q, k, v, window=window, scale=scale, backend=backend)[0][:, before:]


def _are_sinks(k_BTGK: Tensor, sinks: int, cache: KVCache | None, segments: Segments | None) -> Tensor:
    """is_sink_BT of the new tokens."""
    zeros_BT = torch.zeros(k_BTGK.shape[:2], dtype=torch.long, device=k_BTGK.device)
    documents = Segments(zeros_BT) if segments is None else segments
    return documents.positions_BT(zeros_BT[:, 0] if cache is None else cache.length_B) < sinks


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, window: int | None) -> Tensor:
    """The definition, with all scores in memory."""
    q, k, v = q.transpose(1, 2), _share(k, q.shape[2]), _share(v, q.shape[2])
    if mask is None:
        mask = new_token_mask(q.shape[2], None, None, q.device)
    scores = (q @ k.mT) * scale
    scores = scores.masked_fill(~mask.unsqueeze(1), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, window: int | None) -> Tensor:
    """torch's scaled_dot_product_attention."""
    q, k, v = q.transpose(1, 2), _share(k, q.shape[2]), _share(v, q.shape[2])
    mask = None if mask is None else mask.unsqueeze(1)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return o.transpose(1, 2)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, window: int | None) -> Tensor:
    """torch's FlexAttention, which skips the blocks outside the window."""
    from rodimus_lab.ops.attention.flex import windowed

    q, k, v = q.transpose(1, 2), _share(k, q.shape[2]), _share(v, q.shape[2])
    return windowed(q, k.contiguous(), v.contiguous(), scale, window).transpose(1, 2)


def flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, window: int | None) -> Tensor:
    """The flash-attn package."""
    from flash_attn import flash_attn_func

    k, v = (_share(x, q.shape[2]).transpose(1, 2) for x in (k, v))
    left = -1 if window is None else window - 1
    return flash_attn_func(q, k, v, softmax_scale=scale, causal=True, window_size=(left, 0))


def _share(x_BTGK: Tensor, heads: int) -> Tensor:
    """(B, T, G, K) -> (B, H, T, K), each head repeated for the query heads that read it, without a copy where G = 1."""
    x_BGTK = x_BTGK.transpose(1, 2)
    groups = x_BGTK.shape[1]
    if groups == 1:
        return x_BGTK.expand(-1, heads, -1, -1)
    return x_BGTK if groups == heads else x_BGTK.repeat_interleave(heads // groups, dim=1)


def _flash_why_not(
    device: str, dtype: torch.dtype, cached: bool, packed: bool, sinks: bool, widths: tuple[int, int], **_: Any
) -> str | None:
    if not installed("flash_attn"):
        return "flash-attn is not installed (pip install -e '.[gpu]' on a CUDA machine)"
    if device != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return "flash-attn needs a CUDA device and half precision"
    if cached or packed or sinks:
        return "caches, sinks, padding and packed documents go through sdpa"
    return "flash-attn needs equal key and value widths" if widths[0] != widths[1] else None


def _flex_why_not(device: str, cached: bool, packed: bool, sinks: bool, **_: Any) -> str | None:
    if device != "cuda":
        return "FlexAttention has no backward pass on this device"
    plain = not (cached or packed or sinks)
    return None if plain else "caches, sinks, padding and packed documents go through sdpa"


def _flex_pays(
    dtype: torch.dtype, grad: bool, length: int, window: int | None, widths: tuple[int, int], **_: Any
) -> bool:
    """In training, where most blocks are skipped: where half are, it is the faster at 4,096 tokens and the slower at
    512 (docs/benchmarks.md). It is compiled anew for every length, of which training has few."""
    usual = dtype in (torch.float16, torch.bfloat16) and all(width in (64, 128) for width in widths)
    share = 2 if length >= 4096 else 4
    return usual and grad and length % FLEX_BLOCK == 0 and window is not None and share * window <= length


declare(
    "attention",
    Backend("flex", flex, _flex_why_not, _flex_pays),
    Backend("sdpa", sdpa),
    Backend("flash_attn", flash, _flash_why_not),
    Backend("naive", naive),
    example={
        "dtype": torch.bfloat16,
        "cached": False,
        "packed": False,
        "length": 2048,
        "window": None,
        "sinks": False,
        "grad": True,
        "widths": (64, 64),
    },
)
