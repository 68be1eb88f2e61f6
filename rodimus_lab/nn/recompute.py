"""Selective recomputation: keep what products, recurrences and attention give, and make again in the backward pass what
is cheap to make from it (norms, convolutions, gates, activations)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

KEPT = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "flex_attention",
        "rodimus_lab::gated_linear",
        "rodimus_lab::gated_norm",
        "rodimus_lab::wkv",
    }
)


def _policy(_context: Any, op: Any, *_arguments: Any, **_options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op.name() in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed(function: Callable[..., Any], *arguments: Any, draws: bool = False) -> Any:
    """`function(*arguments)`, of whose intermediate results only those of `KEPT` are kept.

    A function that `draws` random numbers draws the same ones again. Their state is read for that, which a GPU refuses
    while a CUDA graph is captured.
    """
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(function, *arguments, use_reentrant=False, context_fn=contexts, preserve_rng_state=draws)
