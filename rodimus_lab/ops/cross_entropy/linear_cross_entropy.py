"""Cross entropy of a linear head, without ever holding the (tokens x vocabulary) logits.

The tokens are walked in chunks. For a scalar loss the gradients of a chunk are formed while its logits are at hand, so
the logits are computed once; the backward pass only scales them. On CUDA the vocabulary is padded to a multiple of 64
inside, which the matrix units want and the caller never sees.

Shapes: N tokens (any leading shape), D model width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rodimus_lab.ops.backend import Backend, choose, declare
from rodimus_lab.ops.derivative import once_differentiable
from rodimus_lab.ops.triton_facts import why_no_triton

ALIGN = {"cuda": 64}
CHUNK_ELEMENTS = {"cuda": 1 << 29, "cpu": 1 << 24}


def cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    backend: str = "auto",
) -> Tensor:
    """-log softmax(x W^T + b)[target] in nats, float32 (float64 for float64 inputs).

    Tokens whose target is `ignore_index` count nothing: "none" gives them 0, "mean" divides by the others (0 where
    there is none). Matrix products run in the autocast dtype where autocast is on, else in x's. Raises
    `ValueError` for any other reduction.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"cross_entropy has no reduction {reduction!r}; take 'mean', 'sum' or 'none'")
    shape = targets_N.shape
    x_ND, targets_N = x_ND.reshape(-1, x_ND.shape[-1]), targets_N.reshape(-1)
    run = choose("cross_entropy", backend, {"device": x_ND.device.type}).run
    losses = run(x_ND, weight_VD, targets_N, bias_V, ignore_index, reduction == "none")
    if reduction == "none":
        return losses.reshape(shape)
    if reduction == "sum":
        return losses
    return losses / (targets_N != ignore_index).sum().clamp(min=1)


def naive(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, bias_V: Tensor | None, ignore_index: int, each: bool
) -> Tensor:
    """The definition, with all logits in memory."""
    dtype = _compute_dtype(x_ND)
    logits = F.linear(x_ND.to(dtype), weight_VD.to(dtype))
    wide = logits.to(torch.promote_types(dtype, torch.float32))
    if bias_V is not None:
        wide = wide + bias_V.to(wide.dtype)
    return F.cross_entropy(wide, targets_N, ignore_index=ignore_index, reduction="none" if each else "sum")


def chunked(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, bias_V: Tensor | None, ignore_index: int, each: bool
) -> Tensor:
    """A chunk of tokens at a time; `each` recomputes a chunk's logits in the backward pass instead."""
    if not each:
        return _LinearCrossEntropy.apply(x_ND, weight_VD, targets_N, bias_V, ignore_index, torch.is_grad_enabled())
    parts = []
    for rows in _chunks(x_ND.shape[0], weight_VD.shape[0], x_ND.device.type):
        arguments = (x_ND[rows], weight_VD, targets_N[rows], bias_V, ignore_index, True)
        parts.append(
            checkpoint(naive, *arguments, use_reentrant=False) if torch.is_grad_enabled() else naive(*arguments)
        )
    return torch.cat(parts)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        bias_V: Tensor | None,
        ignore_index: int,
        differentiate: bool,
    ) -> Tensor:
        device = x_ND.device.type
        dtype = _compute_dtype(x_ND)
        wide = torch.promote_types(dtype, torch.float32)
        vocab = weight_VD.shape[0]
        with torch.autocast(device, enabled=False):
            pad = -vocab % ALIGN.get(device, 1)
            x, weight = x_ND.to(dtype), F.pad(weight_VD.to(dtype), (0, 0, 0, pad))
            bias = None if bias_V is None else F.pad(bias_V.to(wide), (0, pad))
            total = x.new_zeros((), dtype=wide)
            dx_ND = torch.empty_like(x_ND) if differentiate else None
            dweight = torch.zeros_like(weight, dtype=wide) if differentiate else None
            dbias = torch.zeros_like(bias) if differentiate and bias is not None else None
            losses_of = _losses_of(device, wide)
            for rows in _chunks(x.shape[0], vocab, device):
                logits = x[rows] @ weight.T
                losses, dlogits = losses_of(logits, targets_N[rows], bias, vocab, ignore_index, differentiate)
                total += losses.sum()
                if dx_ND is None or dweight is None:
                    continue
                dlogits = dlogits.to(dtype)
                dx_ND[rows] = (dlogits @ weight).to(dx_ND.dtype)
                _add_product(dweight, dlogits.T, x[rows])
                if dbias is not None:
                    dbias += dlogits.sum(0, dtype=wide)
        if dweight is not None:
            dweight = dweight[:vocab].to(weight_VD.dtype)
        if dbias is not None and bias_V is not None:
            dbias = dbias[:vocab].to(bias_V.dtype)
        ctx.save_for_backward(dx_ND, dweight, dbias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (scale,) = grads
        dx_ND, dweight, dbias = (g if g is None else g * scale.to(g.dtype) for g in ctx.saved_tensors)
        return dx_ND, dweight, None, dbias, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, on CUDA summed in total's dtype with nothing rounded to a's on the way."""
    if total.is_cuda and total.dtype != a.dtype:
        torch.addmm(total, a, b, total.dtype, out=total)
    else:
        total += a @ b


def _losses_and_gradient(
    logits: Tensor, targets: Tensor, bias: Tensor | None, vocab: int, ignore_index: int, differentiate: bool
) -> tuple[Tensor, Tensor]:
    """losses_N, and with `differentiate` their gradients in the logits' place or beside them."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        wide = wide + bias
    log_p = wide[:, :vocab].log_softmax(-1)
    counted = (targets != ignore_index).unsqueeze(-1)
    target = torch.where(counted, targets.unsqueeze(-1), 0)
    losses = torch.where(counted, -log_p.gather(-1, target), 0.0).squeeze(-1)
    if not differentiate:
        return losses, logits
    dlogits = log_p.exp_().scatter_add_(-1, target, -torch.ones_like(target, dtype=log_p.dtype))
    if not counted.all():
        dlogits = dlogits.masked_fill_(~counted, 0.0)
    return losses, F.pad(dlogits, (0, logits.shape[-1] - vocab)) if vocab < logits.shape[-1] else dlogits


def _losses_of(device: str, wide: torch.dtype) -> Any:
    if wide == torch.float32 and why_no_triton(device) is None:
        from rodimus_lab.ops.cross_entropy.triton import losses_and_gradient

        return losses_and_gradient
    return _losses_and_gradient


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _chunks(tokens: int, vocab: int, device: str) -> list[slice]:
    """Equal runs of tokens, each with at most CHUNK_ELEMENTS logits; one empty run where there is no token."""
    limit = CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cpu"])
    size = max(1, math.ceil(tokens / math.ceil(max(tokens, 1) * vocab / limit)))
    return [slice(start, start + size) for start in range(0, max(tokens, 1), size)]


declare("cross_entropy", Backend("chunked", chunked), Backend("naive", naive), example={})
