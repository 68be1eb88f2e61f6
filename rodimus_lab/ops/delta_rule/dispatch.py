"""The delta rule with decay: one call, several backends.

Shapes: B batch, T time, H heads, K key width, V value width.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch
from torch import Tensor

from rodimus_lab.errors import UserError
from rodimus_lab.ops.backend import Backend, choose, declare, refuse_no_tokens
from rodimus_lab.ops.delta_rule.chunked import chunked
from rodimus_lab.ops.delta_rule.naive import Transition, naive
from rodimus_lab.ops.delta_rule.step import one_step
from rodimus_lab.ops.installed import installed
from rodimus_lab.ops.segments import Segments


def delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_alpha_BTHK: Tensor,
    beta_BTH: Tensor | None = None,
    *,
    a_BTHK: Tensor | None = None,
    b_BTHK: Tensor | None = None,
    scale: float = 1.0,
    state_BHKV: Tensor | None = None,
    segments: Segments | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """o_t = scale * q_t S_t, where with `beta_BTH` (Gated DeltaNet, KDA)

        S_t = (I - beta_t k_t^T k_t) Diag(alpha_t) S_{t-1} + beta_t k_t^T v_t

    and with `a_BTHK` and `b_BTHK` (RWKV-7)

        S_t = (Diag(alpha_t) + a_t^T b_t) S_{t-1} + k_t^T v_t.

    Gates are given as logarithms <= 0, in at least float32 whatever q, k and v are; they broadcast over their last
    dimension. The state is float32 (float64 for float64 inputs). Nothing is normalised: for a stable memory keys (a and
    b) have unit length or less, and beta lies between 0 and 2. Padding tokens of `segments` leave the state alone and
    give 0; each document after the first starts from a zero state.

    Returns o_BTHV in v's dtype and the state after the last token. Raises `UserError` for a backend that cannot run and
    for a beta beside an a or b, or none of them.
    """
    if (a_BTHK is None) != (b_BTHK is None) or (a_BTHK is None) == (beta_BTH is None):
        raise UserError("delta_rule takes either beta, or both a and b")
    refuse_no_tokens("delta_rule", q_BTHK.shape[1])
    batch, _, heads, key_width = q_BTHK.shape
    wide = torch.promote_types(v_BTHV.dtype, torch.float32)
    one_gate = log_alpha_BTHK.shape[-1] == 1 or log_alpha_BTHK.stride(-1) == 0
    log_alpha_BTHK = log_alpha_BTHK[..., :1].to(wide) if one_gate else log_alpha_BTHK.to(wide)
    log_alpha_BTHK = log_alpha_BTHK.expand(*v_BTHV.shape[:3], -1)
    if state_BHKV is None:
        state_BHKV = q_BTHK.new_zeros(batch, heads, key_width, v_BTHV.shape[-1], dtype=wide)
    padding_BT11 = None
    if segments is not None:
        padding_BT11 = ~segments.valid_BT[:, :, None, None]
        k_BTHK, v_BTHV, log_alpha_BTHK = (x.masked_fill(padding_BT11, 0.0) for x in (k_BTHK, v_BTHV, log_alpha_BTHK))
        if beta_BTH is not None:
            beta_BTH = beta_BTH.masked_fill(padding_BT11.squeeze(-1), 0.0)
        else:
            a_BTHK, b_BTHK = (x.masked_fill(padding_BT11, 0.0) for x in (a_BTHK, b_BTHK))  # type: ignore[union-attr]
    facts = {
        "device": q_BTHK.device.type,
        "length": q_BTHK.shape[1],
        "packed": segments is not None,
        "dtype": v_BTHV.dtype,
        "key_width": key_width,
    }
    run = choose("delta_rule", backend, facts).run
    transition = Transition(log_alpha_BTHK, k_BTHK, beta_BTH, a_BTHK, b_BTHK)
    # Decays and triangular systems lose too much in half precision, whatever products run in elsewhere.
    with torch.autocast(q_BTHK.device.type, enabled=False):
        o_BTHV, state_BHKV = run(q_BTHK, v_BTHV, transition, scale, state_BHKV.to(wide), segments)
    return (o_BTHV if padding_BT11 is None else o_BTHV.masked_fill(padding_BT11, 0.0)), state_BHKV


def _fla(q: Tensor, v: Tensor, transition: Transition, scale: float, state: Tensor, segments: None) -> Any:
    log_alpha, k, beta, a, b = transition
    common: dict[str, Any] = {"scale": scale, "initial_state": state, "output_final_state": True}
    q, k, v = q.to(v.dtype).contiguous(), k.to(v.dtype).contiguous(), v.contiguous()
    if beta is None:
        from fla.ops.generalized_delta_rule import chunk_dplr_delta_rule

        assert a is not None
        assert b is not None
        # Theirs reads with `a` and writes along `b`.
        rank_one = {"a": b.to(v.dtype).contiguous(), "b": a.to(v.dtype).contiguous()}
        return chunk_dplr_delta_rule(q, k, v, gk=log_alpha.expand_as(k).contiguous(), **rank_one, **common)
    if log_alpha.shape[-1] == 1 and not (torch.is_grad_enabled() and _one_gate_has_no_backward(q.device)):
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        return chunk_gated_delta_rule(q, k, v, log_alpha.squeeze(-1).contiguous(), beta.contiguous(), **common)
    from fla.ops.kda import chunk_kda

    return chunk_kda(q, k, v, log_alpha.expand_as(k).contiguous(), beta.contiguous(), **common)


def _one_gate_has_no_backward(device: torch.device) -> bool:
    """flash-linear-attention refuses it on Hopper with these Triton versions, which compile it wrongly."""
    version = tuple(int(part) for part in importlib.metadata.version("triton").split("+")[0].split(".")[:3])
    on_hopper = torch.cuda.get_device_capability(device)[0] == 9
    return on_hopper and (3, 4) <= version < (3, 7, 1) and not installed("tilelang")


def _fla_why_not(device: str, packed: bool, dtype: torch.dtype, key_width: int, **_: Any) -> str | None:
    if device != "cuda":
        return "flash-linear-attention's kernels need a CUDA device"
    if not installed("fla"):
        return "flash-linear-attention is not installed (pip install -e '.[kernels]')"
    if packed:
        return "padding and packed documents go through another path"
    if dtype not in (torch.float16, torch.bfloat16):
        return "it is for half precision"
    return None if key_width <= 256 else f"the key width {key_width} is over 256"


def _one_step_why_not(length: int, **_: Any) -> str | None:
    return None if length == 1 else "it is for one token at a time"


declare(
    "delta_rule",
    Backend("step", one_step, _one_step_why_not),
    Backend("fla", _fla, _fla_why_not),
    Backend("chunked", chunked),
    Backend("naive", naive),
    example={"length": 512, "packed": False, "dtype": torch.bfloat16, "key_width": 64},
)
