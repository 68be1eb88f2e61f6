"""One decoding step of softmax attention over a ring of keys and values, which is overwritten.

Shapes: B rows, H query heads, G key heads, J value heads, K key width, V value width, S slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rodimus_lab.errors import UserError
from rodimus_lab.ops.attention.cache import KVCache
from rodimus_lab.ops.backend import Backend, choose, declare
from rodimus_lab.ops.triton_facts import why_no_triton


def attention_step(
    q_BHK: Tensor,
    k_BGK: Tensor,
    v_BJV: Tensor,
    cache: KVCache,
    *,
    frequency_K: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """o_BHV of one token a row over the last S tokens, itself included; its key and value take their slot in `cache`.

    `frequency_K` (K/2 values, float64) turns the halves of q and k together by position * frequency. The row's
    position is the cache's length, which goes up by one; S is the window, or no less than all tokens to come. Forward
    only. Raises `UserError` for a backend that cannot run.
    """
    facts = {
        "device": q_BHK.device.type,
        "dtype": q_BHK.dtype,
        "widths": (q_BHK.shape[-1], v_BJV.shape[-1]),
        "grad": torch.is_grad_enabled(),
    }
    if cache.k_BSGK.shape[1] == 0:
        raise UserError("the cache of keys and values has no slot; allocate it for the context to come")
    scale = q_BHK.shape[-1] ** -0.5 if scale is None else scale
    return choose("attention_step", backend, facts).run(q_BHK, k_BGK, v_BJV, cache, frequency_K, scale)


def naive(
    q_BHK: Tensor, k_BGK: Tensor, v_BJV: Tensor, cache: KVCache, frequency_K: Tensor | None, scale: float
) -> Tensor:
    """The definition, with all scores in memory; the turning in at least float32."""
    heads, slots = q_BHK.shape[1], cache.k_BSGK.shape[1]
    rows = torch.arange(q_BHK.shape[0], device=q_BHK.device)
    if frequency_K is not None:
        angle_B1K = (cache.length_B.unsqueeze(1) * frequency_K).unsqueeze(1)
        q_BHK, k_BGK = _turned(q_BHK, angle_B1K), _turned(k_BGK, angle_B1K)
    slot_B = cache.length_B % slots
    cache.k_BSGK[rows, slot_B] = k_BGK.to(cache.k_BSGK.dtype)
    cache.v_BSJV[rows, slot_B] = v_BJV.to(cache.v_BSJV.dtype)
    cache.length_B.add_(1)
    k_BHSK, v_BHSV = (
        x.to(q_BHK.dtype).transpose(1, 2).repeat_interleave(heads // x.shape[2], dim=1)
        for x in (cache.k_BSGK, cache.v_BSJV)
    )
    scores_BHS = (k_BHSK @ q_BHK.unsqueeze(-1)).squeeze(-1) * scale
    empty_BS = torch.arange(slots, device=q_BHK.device) >= cache.length_B.unsqueeze(1)
    weight_BHS = scores_BHS.masked_fill(empty_BS.unsqueeze(1), float("-inf")).softmax(-1)
    return (weight_BHS.unsqueeze(-2) @ v_BHSV).squeeze(-2)


def sink_attention_step(
    q_BHK: Tensor, k_BGK: Tensor, v_BJV: Tensor, cache: KVCache, *, sinks: int, sink_q_BHK: Tensor
) -> Tensor:
    """As `attention_step` where the first `sinks` slots keep their tokens and are read by `sink_q_BHK`, in plain torch.
    Queries and keys come turned."""
    heads, slots = q_BHK.shape[1], cache.k_BSGK.shape[1]
    position_B, index = cache.length_B, torch.arange(slots, device=q_BHK.device)
    slot_B = torch.where(position_B < slots, position_B, sinks + (position_B - sinks) % max(slots - sinks, 1))
    rows = torch.arange(q_BHK.shape[0], device=q_BHK.device)
    cache.k_BSGK[rows, slot_B] = k_BGK.to(cache.k_BSGK.dtype)
    cache.v_BSJV[rows, slot_B] = v_BJV.to(cache.v_BSJV.dtype)
    cache.length_B.add_(1)
    k_BHSK, v_BHSV = (
        x.to(q_BHK.dtype).transpose(1, 2).repeat_interleave(heads // x.shape[2], dim=1)
        for x in (cache.k_BSGK, cache.v_BSJV)
    )
    parts = ((k_BHSK[:, :, :sinks], sink_q_BHK), (k_BHSK[:, :, sinks:], q_BHK))
    scores_BHS1 = torch.cat([k @ q.unsqueeze(-1) for k, q in parts], dim=2)
    empty_BS = index >= cache.length_B.unsqueeze(1)
    scores_BHS = scores_BHS1.squeeze(-1) * q_BHK.shape[-1] ** -0.5
    weight_BHS = scores_BHS.masked_fill(empty_BS.unsqueeze(1), float("-inf")).softmax(-1)
    return (weight_BHS.unsqueeze(-2) @ v_BHSV).squeeze(-2)


def _turned(x_BHK: Tensor, angle_B1K: Tensor) -> Tensor:
    wide = torch.promote_types(x_BHK.dtype, torch.float32)
    cos, sin = angle_B1K.cos().to(wide), angle_B1K.sin().to(wide)
    first, second = x_BHK.to(wide).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BHK.dtype)


def _triton(*arguments: Any) -> Tensor:
    from rodimus_lab.ops.attention.step_triton import split_attention

    return split_attention(*arguments)


def _triton_why_not(device: str, dtype: torch.dtype, widths: tuple[int, int], grad: bool) -> str | None:
    if grad:
        return "it has no backward pass"
    if dtype == torch.float64:
        return "it has no float64"
    if widths[0] % 2 or max(widths) > 256:
        return "it needs even head widths of at most 256"
    return why_no_triton(device)


declare(
    "attention_step",
    Backend("triton", _triton, _triton_why_not),
    Backend("naive", naive),
    example={"dtype": torch.bfloat16, "widths": (64, 64), "grad": False},
)
