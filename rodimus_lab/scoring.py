"""Token log-likelihoods and perplexity.

Shapes: B batch, T time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rodimus_lab.nn.model import IGNORE, LanguageModel
from rodimus_lab.ops.segments import Segments

Precision = Literal["fp32", "tf32", "bf16"]


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context in which a recipe's `precision` is computed: with bf16, matrix products in bfloat16 over float32
    weights. The others are told to the process, by `set_matmul_precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def set_matmul_precision(device: torch.device, precision: Precision) -> None:
    """Products of float32 matrices on CUDA, which a GPU may round to TensorFloat32 (10 bits), but not with fp32."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")


@contextmanager
def scoring(model: LanguageModel) -> Iterator[None]:
    """Evaluation mode without gradients; the mode that was is restored."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def token_log_likelihoods(model: LanguageModel, ids_BT: Tensor, segments: Segments | None = None) -> Tensor:
    """log p_BT in nats (float32): each token given those before it in its document.

    The first token of a document has nothing before it and gets 0, and so does padding.
    """
    targets_BT = torch.full_like(ids_BT, IGNORE)
    targets_BT[:, :-1] = ids_BT[:, 1:]
    if segments is not None:
        same = (segments.ids_BT[:, 1:] == segments.ids_BT[:, :-1]) & segments.valid_BT[:, 1:]
        targets_BT[:, :-1].masked_fill_(~same, IGNORE)
    with scoring(model):
        loss_BT = model.loss(ids_BT, targets_BT, segments, reduction="none")
    log_p_BT = torch.zeros_like(loss_BT)
    log_p_BT[:, 1:] = -loss_BT[:, :-1]
    return log_p_BT


def negative_log_likelihood(
    model: LanguageModel,
    batches: Iterable[tuple[Tensor, ...]],
    device: torch.device,
    end_token: int | None = None,
) -> Tensor:
    """The float64 pair (nats, tokens counted) over batches of (inputs_BT, targets_BT; -100: not counted). With
    `end_token` documents end there, and each is read by itself."""
    total = torch.zeros(2, dtype=torch.float64, device=device)
    with scoring(model):
        for inputs_BT, targets_BT in batches:
            inputs_BT = inputs_BT.to(device, non_blocking=True)
            targets_BT = targets_BT.to(device, non_blocking=True)
            packed: dict[str, Any] = (
                {} if end_token is None else {"segments": Segments.after_ends(inputs_BT, end_token)}
            )
            loss_BT = model.loss(inputs_BT, targets_BT, reduction="none", **packed)
            total[0] += loss_BT.double().sum()
            total[1] += (targets_BT != IGNORE).sum()
    return total


def recall(model: LanguageModel, batches: Iterable[tuple[Tensor, ...]], device: torch.device) -> Tensor:
    """The float64 five (nats, answers counted, answers right, rows with any, rows with all of them right) over batches
    of (inputs_BT, answers_BP; -100: not counted, positions_BP). Right is an answer that is the likeliest token at its
    position."""
    total = torch.zeros(5, dtype=torch.float64, device=device)
    with scoring(model):
        for batch in batches:
            inputs_BT, answers_BP, positions_BP = (tensor.to(device, non_blocking=True) for tensor in batch)
            logits_BPV = model.logits_at(inputs_BT, positions_BP)
            counted_BP, right_BP = answers_BP != IGNORE, logits_BPV.argmax(-1) == answers_BP
            asked_B = counted_BP.any(1)
            total[0] += cross_entropy(
                logits_BPV.flatten(0, 1), answers_BP.flatten(), ignore_index=IGNORE, reduction="sum"
            )
            total[1] += counted_BP.sum()
            total[2] += right_BP.sum()
            total[3] += asked_B.sum()
            total[4] += (asked_B & (right_BP | ~counted_BP).all(1)).sum()
    return total


def perplexity(
    model: LanguageModel, batches: Iterable[tuple[Tensor, Tensor]], *, words: int | None = None
) -> dict[str, float]:
    """Perplexity over batches of (inputs_BT, targets_BT; -100: not counted), on the model's device.

    `ppl` is exp(nll / tokens), per token of the tokenizer; with the number of words that the same text has, `word_ppl`
    is exp(nll / words). `nll` is the sum in nats.
    """
    nll, tokens = negative_log_likelihood(model, batches, model.embedding.weight.device).tolist()
    return summarize(nll, int(tokens), words)


def summarize(nll: float, tokens: int, words: int | None = None) -> dict[str, float]:
    """`perplexity`'s result from the sums of a corpus. Raises `ValueError` where no token was counted."""
    if tokens < 1:
        raise ValueError("no token was counted")
    result: dict[str, float] = {"ppl": _exp(nll / tokens), "nll": nll, "tokens": tokens}
    if words:
        result["word_ppl"] = _exp(nll / words)
    return result


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
