"""State-space duality (Dao & Gu, 2024): the gated linear recurrence with one gate a head and keys that all heads share.

    S_t = exp(Delta_t A) S_{t-1} + B_t^T (Delta_t x_t),   o_t = C_t S_t

From a zero state it is, dually, a masked attention: o_t = sum over s <= t of (C_t . B_s) a_t/a_s Delta_s x_s, where a_t
is the product of the decays up to t.

Shapes: B batch, T time, H heads, N state expansion, P head width, S time again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rodimus_lab.ops.backend import Backend, choose, declare, refuse_no_tokens
from rodimus_lab.ops.gated_linear import gated_linear
from rodimus_lab.ops.installed import installed
from rodimus_lab.ops.mamba_ssm import load_mamba_ssm
from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.sequence import sequence_shard
from rodimus_lab.ops.tracing import untraced

CHUNK = 256  # of mamba-ssm's kernels, the authors' choice
SHORT = 128  # Up to here the dual is the faster (docs/benchmarks.md), on a GPU with at most so many scores:
SCORES = 2**24


def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    *,
    state_BHNP: Tensor | None = None,
    segments: Segments | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """o_BTHP in x's dtype, and the state after the last token.

    The steps `dt_BTH` > 0 and `A_H` < 0 are in at least float32, as the state is. Padding tokens of `segments` leave
    the state alone and give 0; each document after the first starts from a zero state. Raises `UserError` for a
    backend that cannot run.
    """
    refuse_no_tokens("ssd", x_BTHP.shape[1])
    facts = {
        "device": x_BTHP.device.type,
        "dtype": x_BTHP.dtype,
        "length": x_BTHP.shape[1],
        "scores": x_BTHP.shape[0] * x_BTHP.shape[2] * x_BTHP.shape[1] ** 2,
        "packed": segments is not None,
        "split": sequence_shard() is not None,
        "state": state_BHNP is not None,
    }
    run = choose("ssd", backend, facts).run
    return run(x_BTHP, dt_BTH, A_H, B_BTN, C_BTN, state_BHNP, segments)


def by_gated_linear(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    state_BHNP: Tensor | None,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """The definition, by whichever backend of `gated_linear` suits."""
    heads, dt_BTH1 = x_BTHP.shape[2], dt_BTH.unsqueeze(-1)
    return gated_linear(
        C_BTN.unsqueeze(2).expand(-1, -1, heads, -1),
        B_BTN.unsqueeze(2).expand(-1, -1, heads, -1),
        (dt_BTH1 * x_BTHP).to(x_BTHP.dtype),
        dt_BTH1 * A_H.unsqueeze(-1),
        state_BHKV=state_BHNP,
        segments=segments,
    )


def attention_form(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    state_BHNP: None,
    segments: None,
) -> tuple[Tensor, Tensor]:
    """The dual, with all scores in memory."""
    B_BTN, C_BTN = B_BTN.to(x_BTHP.dtype), C_BTN.to(x_BTHP.dtype)
    x_BHTP, dt_BHT = x_BTHP.transpose(1, 2), dt_BTH.transpose(1, 2)
    # Differences of sums that a strong decay has made large: what rounding takes of the sums is taken along.
    sum_BHT = (dt_BHT * A_H.unsqueeze(-1)).double().cumsum(-1)
    log_a_BHT = sum_BHT.to(dt_BTH.dtype)
    rest_BHT = (sum_BHT - log_a_BHT).detach().to(dt_BTH.dtype)
    log_decay_BHTS = log_a_BHT.unsqueeze(-1) - log_a_BHT.unsqueeze(-2)
    log_decay_BHTS = log_decay_BHTS.add_(rest_BHT.unsqueeze(-1)).sub_(rest_BHT.unsqueeze(-2))
    ahead_TS = torch.ones(log_decay_BHTS.shape[-2:], dtype=torch.bool, device=x_BTHP.device).triu(1)
    weight_BHTS = log_decay_BHTS.masked_fill_(ahead_TS, -torch.inf).exp_() * dt_BHT.unsqueeze(-2)
    scores_BHTS = ((C_BTN @ B_BTN.mT).unsqueeze(1) * weight_BHTS).to(x_BTHP.dtype)
    at_last_BHTP = (weight_BHTS[:, :, -1].unsqueeze(-1) * x_BHTP).to(x_BTHP.dtype)
    last_BHNP = B_BTN.mT.unsqueeze(1) @ at_last_BHTP
    return (scores_BHTS @ x_BHTP).transpose(1, 2).to(x_BTHP.dtype), last_BHNP.to(dt_BTH.dtype)


def _attention_form_why_not(packed: bool, split: bool, state: bool, **_: Any) -> str | None:
    return "it is for whole sequences from a zero state" if packed or split or state else None


def _attention_form_pays(device: str, length: int, scores: int, **_: Any) -> bool:
    return length <= SHORT and (device == "cpu" or scores <= SCORES)


@untraced
def _mamba_ssm(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None, segments: None
) -> tuple[Tensor, Tensor]:
    load_mamba_ssm()
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    if state is not None:  # It keeps a state of (..., P, N).
        state = state.transpose(-1, -2).contiguous()
    chunk = CHUNK if x.shape[1] > CHUNK // 2 else CHUNK // 2  # A sequence is padded to whole ones.
    y, last = mamba_chunk_scan_combined(
        x, dt, A, B.unsqueeze(2), C.unsqueeze(2), chunk_size=chunk, initial_states=state, return_final_states=True
    )
    return y, last.transpose(-1, -2)


def _mamba_ssm_why_not(device: str, dtype: torch.dtype, length: int, packed: bool, split: bool, **_: Any) -> str | None:
    if device != "cuda":
        return "mamba-ssm's kernels need a CUDA device"
    if not installed("mamba_ssm"):
        return "mamba-ssm is not installed (pip install -e '.[gpu]' on a CUDA machine)"
    if packed:
        return "padding and packed documents go through another path"
    if split:
        return "sequences split over ranks go through another path"
    if length == 1:
        return "it is for more than one token at a time"
    return "it has no float64" if dtype == torch.float64 else None


declare(
    "ssd",
    Backend("attention_form", attention_form, _attention_form_why_not, _attention_form_pays),
    Backend("mamba_ssm", _mamba_ssm, _mamba_ssm_why_not),
    Backend("gated_linear", by_gated_linear),
    example={"dtype": torch.bfloat16, "length": 512, "scores": 2**26, "packed": False, "split": False, "state": False},
)
