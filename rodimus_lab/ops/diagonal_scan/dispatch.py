"""The elementwise linear recurrence: one call, several backends.

Shapes: B batch, T time, X any further dimensions, channels before state expansions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rodimus_lab.ops.backend import Backend, choose, declare, refuse_no_tokens
from rodimus_lab.ops.diagonal_scan.chunked import chunked
from rodimus_lab.ops.diagonal_scan.naive import naive
from rodimus_lab.ops.diagonal_scan.step import one_step
from rodimus_lab.ops.installed import installed
from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.triton_facts import why_no_triton


def diagonal_scan(
    x_BTX: Tensor,
    log_a_BTX: Tensor,
    *,
    state_BX: Tensor | None = None,
    segments: Segments | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = exp(log_a_t) * h_{t-1} + x_t, element by element.

    `log_a_BTX` is <= 0 (-inf forgets all), in at least float32 whatever x is; its dimensions may be 1. The state is
    float32 (float64 for float64 inputs). Padding tokens of `segments` leave the state alone and give 0; each document
    after the first starts from a zero state.

    Returns h_BTX in x's dtype and the state after the last token. Raises `UserError` for a backend that cannot run.
    """
    refuse_no_tokens("diagonal_scan", x_BTX.shape[1])
    wide = torch.promote_types(x_BTX.dtype, torch.float32)
    log_a_BTX = log_a_BTX.to(wide)
    if state_BX is None:
        state_BX = x_BTX.new_zeros(x_BTX[:, 0].shape, dtype=wide)
    padding = None
    if segments is not None:
        further = (slice(None), slice(None), *[None] * (x_BTX.ndim - 2))
        padding = ~segments.valid_BT[further]
        x_BTX = x_BTX.masked_fill(padding, 0.0)
        log_a_BTX = log_a_BTX.masked_fill(padding, 0.0).masked_fill(starts_BT(segments)[further], float("-inf"))
    facts = {
        "device": x_BTX.device.type,
        "length": x_BTX.shape[1],
        "dtype": x_BTX.dtype,
        "dimensions": x_BTX.ndim,
    }
    run = choose("diagonal_scan", backend, facts).run
    h_BTX, state_BX = run(x_BTX, log_a_BTX.expand(-1, x_BTX.shape[1], *log_a_BTX.shape[2:]), state_BX.to(wide))
    h_BTX = h_BTX.to(x_BTX.dtype)
    return (h_BTX if padding is None else h_BTX.masked_fill(padding, 0.0)), state_BX


def starts_BT(segments: Segments) -> Tensor:
    """True for the first token of each document after document 0."""
    documents = segments.documents_BT
    before = torch.cat([torch.zeros_like(documents[:, :1]), documents[:, :-1]], dim=1)
    return documents != before


def _triton(*arguments: Any) -> Any:
    from rodimus_lab.ops.diagonal_scan.triton import fused

    return fused(*arguments)


def _triton_why_not(device: str, dtype: torch.dtype, **_: Any) -> str | None:
    return "it has no float64" if dtype == torch.float64 else why_no_triton(device)


def _fla(x: Tensor, log_a: Tensor, state: Tensor) -> Any:
    from fla.ops.hgrn import fused_recurrent_hgrn

    return fused_recurrent_hgrn(x, log_a.expand(x.shape), initial_state=state, output_final_state=True)


def _fla_why_not(device: str, dtype: torch.dtype, dimensions: int, **_: Any) -> str | None:
    if device != "cuda":
        return "flash-linear-attention's kernels need a CUDA device"
    if not installed("fla"):
        return "flash-linear-attention is not installed (pip install -e '.[kernels]')"
    if dimensions != 3:
        return "it knows one dimension of channels only"
    return "it has no float64" if dtype == torch.float64 else None


def _one_step_why_not(length: int, **_: Any) -> str | None:
    return None if length == 1 else "it is for one token at a time"


declare(
    "diagonal_scan",
    Backend("step", one_step, _one_step_why_not),
    Backend("triton", _triton, _triton_why_not),
    Backend("chunked", chunked),
    Backend("fla", _fla, _fla_why_not),
    Backend("naive", naive),
    example={"length": 512, "dtype": torch.bfloat16, "dimensions": 3},
)
