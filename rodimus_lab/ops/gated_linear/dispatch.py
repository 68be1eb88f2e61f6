"""The gated linear recurrence: one call, several backends.

Shapes: B batch, T time, H heads, K key width (the paper's n), V value width (the paper's m per head).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rodimus_lab.ops.backend import Backend, choose, declare, refuse_no_tokens
from rodimus_lab.ops.gated_linear.chunked import chunked
from rodimus_lab.ops.gated_linear.naive import naive
from rodimus_lab.ops.gated_linear.sharded import across_ranks
from rodimus_lab.ops.gated_linear.step import one_step
from rodimus_lab.ops.installed import installed
from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.sequence import refuse_state, sequence_shard
from rodimus_lab.ops.triton_facts import why_no_triton


def gated_linear(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_alpha_BTHK: Tensor | None,
    log_beta_BTHV: Tensor | None = None,
    *,
    scale: float = 1.0,
    state_BHKV: Tensor | None = None,
    segments: Segments | None = None,
    last_state: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """S_t = (alpha_t^T beta_t) * S_{t-1} + k_t^T v_t, o_t = scale * q_t S_t (Eq. 7).

    Gates are given as logarithms <= 0, in at least float32 whatever q, k and v are; they broadcast over their last
    dimension and None means 1. The state is float32 (float64 for float64 inputs). Padding tokens of `segments` leave
    the state alone and give 0; each document after the first starts from a zero state.

    Returns o_BTHV in v's dtype and the state after the last token, without `last_state` an empty tensor in its place.
    Raises `UserError` for a backend that cannot run. Where the sequence is split over ranks (`ops/sequence.py`), the
    outputs and the state are those of the whole one.
    """
    refuse_no_tokens("gated_linear", q_BTHK.shape[1])
    shard = sequence_shard()
    if shard is not None:
        refuse_state("the gated linear recurrence", state_BHKV, segments)
    batch, length, heads, key_width = q_BTHK.shape
    value_width = v_BTHV.shape[-1]
    wide = torch.promote_types(v_BTHV.dtype, torch.float32)
    if log_alpha_BTHK is None:
        log_alpha_BTHK = q_BTHK.new_zeros(1, 1, 1, 1, dtype=wide)
    padding_BT11 = None
    if segments is not None:
        padding_BT11 = ~segments.valid_BT[:, :, None, None]
        k_BTHK, v_BTHV = k_BTHK.masked_fill(padding_BT11, 0.0), v_BTHV.masked_fill(padding_BT11, 0.0)
        log_alpha_BTHK = log_alpha_BTHK.masked_fill(padding_BT11, 0.0)
        if log_beta_BTHV is not None:
            log_beta_BTHV = log_beta_BTHV.masked_fill(padding_BT11, 0.0)
    log_alpha_BTHK = log_alpha_BTHK.to(wide).expand(batch, length, heads, key_width)
    if log_beta_BTHV is not None:
        log_beta_BTHV = log_beta_BTHV.to(wide).expand(batch, length, heads, value_width)
    facts = {
        "device": q_BTHK.device.type,
        "length": length,
        "beta": log_beta_BTHV is not None,
        "packed": segments is not None,
        "dtype": v_BTHV.dtype,
        "key_width": key_width,
    }
    chosen = choose("gated_linear", backend, facts).run
    state_BHKV = None if state_BHKV is None else state_BHKV.to(wide)
    arguments = (q_BTHK, k_BTHK, v_BTHV, log_alpha_BTHK, log_beta_BTHV, scale, state_BHKV, segments)
    if shard is None:
        o_BTHV, state_BHKV = chosen(*arguments, last_state)
    else:
        parts = across_ranks(lambda: chosen(*arguments, True), shard, q_BTHK, log_alpha_BTHK, log_beta_BTHV, scale)
        o_BTHV, state_BHKV = parts
    if padding_BT11 is not None:
        o_BTHV = o_BTHV.masked_fill(padding_BT11, 0.0)
    return o_BTHV, state_BHKV if last_state else o_BTHV.new_empty(0, dtype=wide)


def _from_a_state(run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """For a backend that starts from a state, zeros if need be, and always gives the last one."""

    def started(
        q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, log_beta: Tensor | None, scale: float,
        state: Tensor | None, segments: Segments | None, last_state: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if state is None:
            wide = torch.promote_types(v.dtype, torch.float32)
            state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[-1], dtype=wide)
        return run(q, k, v, log_alpha, log_beta, scale, state, segments)

    return started


def _fla(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, log_beta: None, scale: float, state: Tensor | None,
    segments: None, last_state: bool,
) -> Any:  # fmt: skip
    from fla.ops.gla import chunk_gla

    return chunk_gla(
        q.contiguous(),
        k.to(q.dtype).contiguous(),
        v.contiguous(),
        log_alpha.contiguous(),
        scale=scale,
        initial_state=state,
        output_final_state=last_state,
    )


def _fla_why_not(device: str, beta: bool, packed: bool, dtype: torch.dtype, **_: Any) -> str | None:
    if device != "cuda":
        return "flash-linear-attention's kernels need a CUDA device"
    if not installed("fla"):
        return "flash-linear-attention is not installed (pip install -e '.[kernels]')"
    if beta:
        return "it has no value gate beta"
    if packed:
        return "padding and packed documents go through another path"
    if dtype == torch.float64:
        return "it has no float64"
    return None


def _triton(*arguments: Any) -> Any:
    from rodimus_lab.ops.gated_linear.triton import fused

    return fused(*arguments)


def _triton_why_not(device: str, beta: bool, dtype: torch.dtype, key_width: int, **_: Any) -> str | None:
    if reason := why_no_triton(device):
        return reason
    if beta:
        return "it has no value gate beta"
    if dtype == torch.float64:
        return "it has no float64"
    return None if key_width <= 256 else f"the key width {key_width} is over 256"


def _one_step_why_not(length: int, **_: Any) -> str | None:
    return None if length == 1 else "it is for one token at a time"


declare(
    "gated_linear",
    Backend("step", _from_a_state(one_step), _one_step_why_not),
    Backend("triton", _triton, _triton_why_not),
    Backend("chunked", _from_a_state(chunked)),
    Backend("fla", _fla, _fla_why_not),
    Backend("naive", _from_a_state(naive)),
    example={"length": 512, "beta": False, "packed": False, "dtype": torch.bfloat16, "key_width": 64},
)
